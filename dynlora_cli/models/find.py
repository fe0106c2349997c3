"""Where a model's files are on this machine: built in, in a folder, or in the cache of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import WEIGHT_FILES, IndexForm, fits, inside, read_object, refuse_links
from dynlora_cli.models.pipelines.find import INDEX as PIPELINE
from dynlora_cli.models.pipelines.find import find_pipeline, needs_pipeline
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model

BUILTIN = {"builtin:tiny": Path(__file__).parents[1] / "assets" / "builtin_tiny"}
ASKS_FOR_TRUST = "trust_remote_code=True"  # in the errors of transformers
# What a model needs to run; no pickles, and no weights of other frameworks.
HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
HUB_WEIGHTS = ["*.safetensors"]
# Ends of the names of architectures that do not go on with a text.
NO_WRITERS = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM")


def find_model(options: Model, *, weights: bool = True) -> tuple[Path, str]:
    """The model's local folder, and how an adapter should name it; of a pipeline, the folder of its denoiser.

    Args:
        options: a recipe's `model` section.
        weights: fetch them, too, where the model is the hub's.

    Raises:
        UsageError: a local folder that holds no model, or an unknown built-in one.
        MachineError: a hub id that is neither cached nor reachable.
    """
    name = options.name_or_path
    if needs_pipeline(options):
        return find_pipeline(options)
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UsageError(
                f"model.name_or_path: no built-in model {name!r}{did_you_mean(name, BUILTIN)}",
                f"there is: {', '.join(BUILTIN)}",
            )
        return BUILTIN[name], str(BUILTIN[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / PIPELINE).is_file():
                raise UsageError(
                    f"model.name_or_path: {name} holds a pipeline of diffusers, which model.task {options.task} does "
                    "not learn with",
                    "set model.task: text-to-image",
                )
            raise UsageError(
                f"model.name_or_path: {name} holds no config.json", "name a folder in the Hugging Face layout"
            )
        _refuse_unsafe(folder)
        return folder.resolve(), str(folder.resolve())
    if folder.exists() or not is_hub_name(name):
        raise UsageError(f"model.name_or_path: there is no folder {name}", "name a folder, a hub id or builtin:tiny")
    return _from_hub(name, options.revision, weights=weights), name


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one on the hub: neither built in nor a folder, be it a missing one."""
    like_a_path = name.startswith(("builtin:", ".", "/", "~")) or name.count("/") > 1
    return not like_a_path and not Path(name).exists()


def quantization_of(folder: Path) -> str | None:
    """The method by which a model folder's weights are stored quantized, such as "bitsandbytes"; None: they are not."""
    config = folder / "config.json"
    return quantization_in(read_object(config)) if config.is_file() else None


def quantization_in(config: Mapping[str, Any]) -> str | None:
    """The same, of the content of a config.json."""
    stored = config.get("quantization_config")
    return str(stored.get("quant_method") or "unknown") if isinstance(stored, dict) else None


def needs_trust(folder: Path, *, trained_with_it: bool = False) -> UsageError:
    """The error of a model whose code nobody trusts."""
    again = "; the run was trained with it, which its folder cannot decide again" if trained_with_it else ""
    return UsageError(
        f"the model in {folder} is made of Python code of its own, which was not run{again}",
        "if you trust whoever made it: model.trust_remote_code: true in the recipe of `dynlora train`, "
        "and --trust-remote-code for merge, eval, export and prune",
    )


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a model folder comes with a chat template, found without loading it."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_object(config).get("chat_template"))


def is_encoder_decoder(folder: Path) -> bool:
    """Whether a model folder's config says that an encoder reads and a decoder writes."""
    return read_object(folder / "config.json").get("is_encoder_decoder") is True


def refuse_no_writer(folder: Path) -> None:
    """Check that a model folder's config is that of a model which goes on with a text, before it is loaded as one.

    Raises:
        UsageError: an encoder reads there and a decoder writes, or all that it is for is something else.
    """
    named = read_object(folder / "config.json").get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    what = "is an encoder with a decoder" if is_encoder_decoder(folder) else ""
    if names and all(name.endswith(NO_WRITERS) for name in names):
        what = f"is a {names[0]}"
    if what:
        raise UsageError(
            f"the model in {folder} {what}, and it is to ask and to answer",
            "name a causal language model, best a chat one",
        )


def _refuse_unsafe(folder: Path) -> None:
    """Check that a model folder names nothing outside itself.

    Raises:
        UsageError: a link or an index that leaves it, or an adapter, in whose place the library would load another
            model, from wherever that adapter says.
    """
    refuse_links(folder, besides=WEIGHT_FILES)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} holds an adapter_config.json beside its config.json: another model would be loaded in its place",
            "name a folder that holds a model alone",
        )
    for index in folder.glob("*.index.json"):
        for name in fits(IndexForm, read_object(index), index).files:
            inside(folder, name, index)


def _from_hub(name: str, revision: str | None, *, weights: bool) -> Path:
    """The local snapshot of a hub model, fetched if need be and allowed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES + HUB_WEIGHTS * weights))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise MachineError(
            f"model {name!r} is neither a local folder nor to be had from the hub: {first_line}",
            "check the name, or fetch it where there is a network and give its folder: --set model.name_or_path=FOLDER",
        ) from None
