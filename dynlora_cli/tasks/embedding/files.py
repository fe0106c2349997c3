"""The files by which sentence-transformers knows how texts become vectors: read from a base, written to a run.

    modules.json                         what follows what: the model, pooling, normalisation
    1_Pooling/config.json                mean, first or last token
    sentence_bert_config.json            tokens that are read of a text
    config_sentence_transformers.json    prompts, and that vectors are compared by their cosine

They are written in the form that all versions since 2.0 read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, fits, inside, read_object
from dynlora_cli.files.strict_json import loads
from dynlora_cli.files.whole import write_json
from dynlora_cli.tasks.embedding.pooling import Reading

MODULES, SETTINGS, LENGTHS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"
MOST_MODULES = 20
_NO_LIMIT = 1 << 30
_Form = TypeVar("_Form", bound=BaseModel)
# Their names for what is done here, the older ones as keys that are true.
_THEIRS = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
_OLDER = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


class _Pooling(BaseModel):
    model_config = ConfigDict(extra="ignore")
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True
    word_embedding_dimension: int | None = None
    embedding_dimension: int | None = None
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_lasttoken: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False


class _Lengths(BaseModel):
    model_config = ConfigDict(extra="ignore")
    max_seq_length: int | None = None
    do_lower_case: bool = False


class _Tokenizer(BaseModel):
    model_config = ConfigDict(extra="ignore")
    model_max_length: int | float | None = None


class _Settings(BaseModel):
    model_config = ConfigDict(extra="ignore")
    prompts: dict[str, str | None] = {}


def own_reading(folder: Path, pooling: str | None = None) -> Reading | None:
    """How the files in a model's folder say that its texts become vectors; None where they do not say.

    Args:
        folder: of the model.
        pooling: what is done whatever they say of it.

    Raises:
        UsageError: they are damaged, or say something that is not done here.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    kinds = {_kind(module, path): module for module in _list(path)}
    if strange := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UsageError(
            f"{path}: the model has a module {strange[0]} behind its hidden states, which is not supported",
            "name a base with Transformer, Pooling and Normalize alone",
        )
    if "Pooling" not in kinds:
        return None
    place = _pooling_file(folder)
    lengths = _optional(_Lengths, folder / LENGTHS)
    prompts = {name: text or "" for name, text in _optional(_Settings, folder / SETTINGS).prompts.items()}
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    return Reading(
        pooling=pooling or _mode(fits(_Pooling, read_object(place), place), place),
        normalize="Normalize" in kinds,
        query_prompt=prompts.get("query", ""),
        passage_prompt=passage,
        longest=lengths.max_seq_length or _of_tokenizer(folder),
        lower_case=lengths.do_lower_case,
    )


def own_length(folder: Path) -> int | None:
    """Tokens that are read of a text, as the files of a folder say; None where they do not."""
    return _optional(_Lengths, folder / LENGTHS).max_seq_length


def own_dimension(folder: Path) -> int:
    """Numbers of a hidden state, as the files of a folder that has them say.

    Raises:
        UsageError: they do not.
    """
    path = _pooling_file(folder)
    found = fits(_Pooling, read_object(path), path)
    size = found.embedding_dimension or found.word_embedding_dimension
    if not size:
        raise UsageError(f"{path} is damaged: it does not say how long vectors are", COPY_AGAIN)
    return size


def _pooling_file(folder: Path) -> Path:
    """Where a folder that has the files keeps its pooling."""
    path = folder / MODULES
    places = [str(module.get("path") or POOLING) for module in _list(path) if _kind(module, path) == "Pooling"]
    return inside(folder, places[0] if places else POOLING, path) / "config.json"


def _of_tokenizer(folder: Path) -> int | None:
    """Where newer versions keep the number of tokens that are read; a tokenizer without a limit has a huge one."""
    limit = _optional(_Tokenizer, folder / "tokenizer_config.json").model_max_length
    return int(limit) if limit and 0 < limit < _NO_LIMIT else None


def _list(path: Path) -> list[dict[str, Any]]:
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}", COPY_AGAIN) from None
    if not isinstance(found, list) or len(found) > MOST_MODULES or not all(isinstance(each, dict) for each in found):
        raise UsageError(f"{path} is damaged: it holds no short list of modules", COPY_AGAIN)
    return found


def _kind(module: Mapping[str, Any], path: Path) -> str:
    kind = module.get("type")
    if not isinstance(kind, str):
        raise UsageError(f"{path} is damaged: a module has no type", COPY_AGAIN)
    return kind.rpartition(".")[2]


def _optional(form: type[_Form], path: Path) -> _Form:
    return fits(form, read_object(path), path) if path.is_file() else form()


def _mode(config: _Pooling, path: Path) -> str:
    """Our name of the pooling."""
    named = config.pooling_mode
    modes = [named] if isinstance(named, str) else named or []
    modes = modes or [mode for key, mode in _OLDER.items() if getattr(config, key)] or ["mean"]
    if len(modes) != 1 or modes[0] not in _THEIRS or not config.include_prompt:
        shown = " and ".join(modes) + ("" if config.include_prompt else ", without the tokens of the prompt")
        raise UsageError(
            f"{path}: pooling by {shown} is not supported",
            f"set model.pooling to one of {', '.join(_THEIRS.values())}, if that is meant",
        )
    return _THEIRS[modes[0]]


def write_reading(folder: Path, reading: Reading, dimension: int) -> None:
    """Write the files beside a model or an adapter.

    Args:
        folder: of the model.
        reading: what they say.
        dimension: numbers of a hidden state.
    """
    modules = [("Transformer", ""), ("Pooling", POOLING), *([("Normalize", NORMALIZE)] if reading.normalize else [])]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    for _, path in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    theirs = {ours: name for name, ours in _THEIRS.items()}[reading.pooling]
    write_json(
        folder / POOLING / "config.json",
        {"word_embedding_dimension": dimension, **{key: mode == theirs for key, mode in _OLDER.items()}},
    )
    if reading.normalize:
        write_json(folder / NORMALIZE / "config.json", {})
    write_json(folder / LENGTHS, {"max_seq_length": reading.longest, "do_lower_case": reading.lower_case})
    prompts = {"query": reading.query_prompt, "document": reading.passage_prompt}
    write_json(folder / SETTINGS, {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    write_json(folder / MODULES, listed)


def write_cross_encoder(folder: Path, longest: int | None) -> None:
    """Write the files by which sentence-transformers (6 and newer) loads a model that scores pairs of texts.

    Args:
        folder: of the model or the adapter.
        longest: tokens that are read of a pair at most.
    """
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    write_json(
        folder / LENGTHS,
        {
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
            "config_kwargs": {"num_labels": 1},  # the base of an adapter says something else
            **({"max_seq_length": longest} if longest else {}),
        },
    )
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    write_json(folder / SETTINGS, {"model_type": "CrossEncoder", "activation_fn": sigmoid, "prompts": {}})
    write_json(folder / MODULES, [{"idx": 0, "name": "0", "path": "", "type": kind}])
