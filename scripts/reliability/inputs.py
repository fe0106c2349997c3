"""Recipes, rows and adapters that somebody has damaged: each is read, or refused in words with the right exit code."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from .trial import Kind, Lost, ProvesNothing, Trial

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
ROWS_OF = {
    "completion": {"prompt": "a b", "completion": "b", "weight": 1.0},
    "chat": {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    "both": {"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "c"}], "weight": 1.0},
    "instruction": {"instruction": "say", "input": "this", "output": "that"},
    "turns": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text": {"text": "a text of some words"},
}
ENDINGS = ("jsonl", "json", "csv", "txt", "parquet")
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"use_dora": True},
    {"use_rslora": True, "bias": "lora_only"},
    {"peft_type": "VERA", "projection_prng_key": 0, "save_projection": False},
    {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2], "layers_to_transform": [0]},
)
OF_A_RUN = ("dynlora.json", "metrics.jsonl", "rank_events.jsonl")


def _load(made: Path) -> None:  # noqa: ARG001 - every kind is asked alike
    """Nothing has to be made; modules are loaded here, once, and not in every process that tries a batch."""
    import dynlora_cli.adapters.read
    import dynlora_cli.config.load
    import dynlora_cli.data.load
    import dynlora_cli.runs.log  # noqa: F401

    _recipes()
    _tokenizer()


def _read(trial: Trial, path: Path, before: bytes, now: bytes, *reads: Callable[[], object]) -> str:
    """Write damaged content, and read it in every way.

    Returns:
        Whether it was read or refused.

    Raises:
        Lost: it was refused without saying where; the assertions of `answered` are lost likewise.
    """
    from mutated import answered

    if before == now:
        raise ProvesNothing("the damage left everything as it was")
    path.write_bytes(now)
    refused = [error for read in reads if (error := answered(read))]
    for error in refused:
        told = f"{error.message} {error.hint}"
        if not any(where in told for where in (str(trial.work), path.name, "dataset.train")):
            raise Lost(f"refused without naming the file or the key: {told[:1000]}")
    return "refused in words" if refused else "read"


# -- recipes ---------------------------------------------------------------------------------------------------------


@cache
def _recipes() -> tuple[tuple[str, dict[str, Any]], ...]:
    """Recipes as text and as what they hold: all that we ship, and that of the tests."""
    import yaml
    from mutated import RECIPE

    texts = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.rglob("*.yaml"))]
    return ((json.dumps(RECIPE), RECIPE), *((text, yaml.safe_load(text)) for text in texts))


def _recipe(trial: Trial) -> str:
    from mutated import damaged, mutation

    from dynlora_cli.config.load import load_recipe

    text, content = trial.chance.choice(_recipes())
    if trial.number % 3:
        before, now = json.dumps(content).encode(), mutation(content, trial.chance, bytes_too=trial.number % 9 == 1)
    else:
        before, now = text.encode(), damaged(text.encode(), trial.chance)
    path = trial.work / "recipe.yaml"
    return _read(trial, path, before, now, lambda: _only_2(load_recipe, path))


def _only_2(read: Callable[[Path], object], path: Path) -> None:
    """A recipe is either read or must change; nothing in it is the machine's fault."""
    from dynlora_cli.errors import DynloraError

    try:
        read(path)
    except DynloraError as refused:
        if refused.exit_code != 2:
            raise Lost(f"exit code {refused.exit_code}, expected 2: {refused.message}") from None
        raise


# -- rows ------------------------------------------------------------------------------------------------------------


@cache
def _tokenizer() -> Any:
    from data_helpers import CHATML, byte_tokenizer

    return byte_tokenizer(CHATML)


def _row(trial: Trial) -> str:
    from data_helpers import dataset, task_named

    from dynlora_cli.data.load import load_data

    ending = ENDINGS[trial.number % len(ENDINGS)]
    row = trial.chance.choice(list(ROWS_OF.values()))
    whole = [row] * trial.chance.randrange(4)
    before = _file_of(ending, [*whole, row])
    now = _file_of_damaged(ending, whole, row, before, trial.chance)
    path = trial.work / f"rows.{ending}"
    load = partial(load_data, task=task_named(), seed=0)
    return _read(trial, path, before, now, lambda: load(dataset(path), _tokenizer()))


def _file_of_damaged(ending: str, whole: list[dict], row: dict, before: bytes, chance: Random) -> bytes:
    """A file of rows with one value of one row changed, or bytes of the file."""
    from mutated import changed, damaged, mutation

    if ending == "jsonl":
        lines = [json.dumps(each).encode() for each in whole]
        return b"".join(line + b"\n" for line in [*lines, mutation(row, chance, bytes_too=chance.random() < 0.3)])
    if ending in ("txt", "parquet") or chance.random() < 0.3:
        return damaged(before, chance)
    now = changed(row, chance)
    if ending == "csv":
        return _file_of(ending, [*whole, now if isinstance(now, dict) else {"prompt": str(now)}])
    return _file_of(ending, [*whole, now])


def _file_of(ending: str, rows: list[Any]) -> bytes:
    if ending == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if ending == "json":
        return json.dumps(rows).encode()
    if ending == "txt":
        return "\n\n".join(json.dumps(row) for row in rows).encode()
    if ending == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(errors="surrogatepass")
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


# -- adapters --------------------------------------------------------------------------------------------------------


def _prepare_adapter(made: Path) -> None:
    """A run folder whose adapter has one layer."""
    import torch
    from mutated import CONFIG, EXAMPLE, LAYER
    from safetensors.torch import save

    _load(made)
    folder = made / "adapter"
    if folder.exists():
        return
    shutil.copytree(EXAMPLE, folder)
    weights = {f"{LAYER}_A.weight": torch.ones(2, 64), f"{LAYER}_B.weight": torch.ones(64, 2)}
    (folder / "adapter_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))


def _adapter(trial: Trial) -> str:
    from mutated import mutation

    from dynlora_cli.adapters.read import read_adapter
    from dynlora_cli.runs.folder import read_record
    from dynlora_cli.runs.log import read_run

    folder = Path(shutil.copytree(trial.made / "adapter", trial.work / "run"))
    reads: list[Callable[[], object]] = [lambda: read_adapter(folder)]
    match trial.number % 3:
        case 0:
            name = "adapter_config.json"
            config = json.loads((folder / name).read_text()) | trial.chance.choice(CONFIGS)
            before, now = json.dumps(config).encode(), mutation(config, trial.chance, bytes_too=trial.number % 2 == 0)
        case 1:
            name = "adapter_model.safetensors"
            before = (folder / name).read_bytes()
            now = _damaged_weights(before, trial.chance)
        case _:
            name = trial.chance.choice(OF_A_RUN)
            before = (folder / name).read_bytes()
            now = _damaged_log(name, before, trial.chance)
            reads += [lambda: read_run(folder), lambda: read_record(folder)]
    return _read(trial, folder / name, before, now, *reads)


def _damaged_weights(whole: bytes, chance: Random) -> bytes:
    """A safetensors file with another header, another length of it, or damaged bytes."""
    from mutated import damaged, mutation

    end = 8 + int.from_bytes(whole[:8], "little")
    if chance.random() < 0.3:
        return damaged(whole, chance)
    header = mutation(json.loads(whole[8:end]), chance, bytes_too=chance.random() < 0.3)
    size = len(header) if chance.random() < 0.8 else chance.getrandbits(64)
    return size.to_bytes(8, "little") + header + whole[end:]


def _damaged_log(name: str, before: bytes, chance: Random) -> bytes:
    from mutated import mutation

    bytes_too = chance.random() < 0.3
    if name.endswith(".json"):
        return mutation(json.loads(before), chance, bytes_too=bytes_too)
    lines = before.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    return b"".join(
        [*lines[:at], mutation(json.loads(lines[at]), chance, bytes_too=bytes_too) + b"\n", *lines[at + 1 :]]
    )


RECIPES = Kind(
    name="recipes",
    what="a recipe with a changed key or value, or damaged bytes, is read, or refused with exit code 2",
    tried=10_000,
    bounded=100,
    batch=500,
    seconds=60,
    prepare=_load,
    run=_recipe,
)
ROWS = Kind(
    name="rows",
    what="a file of rows (JSON lines, JSON, CSV, text, Parquet) with one damaged row or damaged bytes is read or refused",
    tried=5_000,
    bounded=100,
    batch=250,
    seconds=60,
    prepare=_load,
    run=_row,
)
ADAPTERS = Kind(
    name="adapters",
    what="an adapter with a damaged config, weights file, record or log is read or refused",
    tried=5_000,
    bounded=100,
    batch=250,
    seconds=60,
    prepare=_prepare_adapter,
    run=_adapter,
)
