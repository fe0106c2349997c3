"""Reads any LoRA folder in PEFT's layout, dynlora's own or another tool's: plain LoRA, rsLoRA, DoRA, with patterns,
biases and trained rows of tokens.
Of PEFT's other kinds HiRA, and VeRA as the LoRA that it equals; mlx-lm's adapters as well.

Whatever would change the result without being understood is refused; nothing is skipped, and no pickle is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters import mlx as mlx_adapter
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.births import born_of
from dynlora_cli.adapters.find import (
    CONFIG,
    PACKED,
    PACKED_WEIGHTS,
    WEIGHTS,
    damage,
    find_adapter,
    is_image,
    is_packed,
    refuse_hypernet,
    refuse_image,
)
from dynlora_cli.adapters.images.by_timestep import with_schedule
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.keys import sorted_tensors, without_wrappers
from dynlora_cli.adapters.numbers import check_numbers
from dynlora_cli.adapters.packed import archive
from dynlora_cli.adapters.routed import is_routed, read_routed
from dynlora_cli.adapters.token_rows import TOKEN_ADAPTER, token_rows
from dynlora_cli.adapters.xlora import is_xlora, read_xlora
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import PeftForm, fits, read_object, refuse_links, shown
from dynlora_cli.files.peft_fields import CHANGED_BASE, OF_TRAINING, READ, REFUSED
from dynlora_cli.runs.folder import CHECKPOINTS, RECORD, read_record, run_of
from dynlora_cli.text import to_type


def read_adapter(path: Path, base: str | None = None, *, routed: bool = False, images: bool = False) -> Adapter:
    """Read the adapter that `path` names.

    Args:
        path: a folder, see `find_adapter`.
        base: folder or hub id of the base model, in place of the one on record; looked at where the adapter does not
            say how wide its layers are, as VeRA.
        routed: a `RoutedAdapter` is welcome: one that is put on a model, but has no factors of its own.
        images: an adapter of a diffusion pipeline is welcome: one file, see adapters/images/.

    Raises:
        UsageError: no adapter there, or one that is damaged, a pickle, or none that can be carried out exactly.
        MeasureError: its weights are not finite.
    """
    folder, note = find_adapter(path)
    if is_image(folder):
        if not images:
            refuse_image(folder)
        if note:  # found in a folder, which somebody else may have made
            refuse_links(folder.parent)
        return read_image(folder, note)
    refuse_links(folder)
    refuse_hypernet(folder)
    if fault := damage(folder):
        raise UsageError(f"{folder} {fault}", "name another checkpoint")
    if (in_ours := is_routed(folder)) or is_xlora(folder):
        if not routed:
            raise no_single_update(folder)
        read = read_routed if in_ours else read_xlora
        return read(folder, lambda own: read_adapter(own, base), _record_of(folder), note)
    if is_packed(folder):
        mlx, file = False, folder / PACKED_WEIGHTS
        config, tensors = archive.read(folder, _read_tensors(file))
        config, _ = _checked(config, folder / PACKED)
    else:
        config, mlx = _checked(read_object(folder / CONFIG), folder / CONFIG)
        file = folder / (mlx_adapter.FILE if mlx else WEIGHTS)
        tensors = _read_tensors(file)
    found = sorted_tensors(mlx_adapter.peft_tensors(tensors, file) if mlx else tensors, file)
    if mlx:
        found.notes.append("an adapter of mlx-lm's")
    elif config["peft_type"] == "LORA" and (unknown := _unknown(config)):
        found.notes.append(f"{CONFIG} has keys that PEFT 0.21 does not have, and they were not used: {unknown}")
    parts = found.parts
    record = _record_of(folder)
    notes = "; ".join(filter(None, [note, *found.notes])) or None
    rows = token_rows(found.tokens, config, file)
    adapter = Adapter(folder, {}, config, record, found.whole, rows, notes)
    adapter = replace(adapter, model_type=_model_type(adapter, base))
    layers = plugins.load("kinds", kind_of_files(config)).read(adapter, parts, base)
    _refuse_both(layers, rows, file)
    born, fault = born_of({name: factors.rank for name, factors in layers.items()}, folder, record)
    layers = {name: replace(factors, born=born[name]) for name, factors in layers.items()}
    adapter = replace(adapter, note="; ".join(filter(None, [notes, fault])) or None).with_layers(layers)
    return with_schedule(adapter, _metadata(file), file)


def _refuse_both(layers: Collection[str], rows: Collection[str], file: Path) -> None:
    """Refuse components on a table that has trained rows: PEFT computes with no such table."""
    tables = {name: name.removesuffix(TOKEN_ADAPTER) for name in layers}
    both = [table for name, table in tables.items() if table in rows or name != table]
    if both:
        raise UsageError(
            f"{file}: {both[0]} has trained rows and components, and which of them is added to which is not to be told",
            "train one of the two",
        )


def no_single_update(folder: Path) -> UsageError:
    """What a command says that needs one update for all texts."""
    return UsageError(
        f"{folder} is a router over adapters: it weighs them anew at each token, so there is no single update "
        "to merge, prune, export or keep in a library",
        "use it with eval, generate, chat or serve, or make a fixed blend of its adapters: "
        + to_type(
            "merge", "--adapter", f"{folder}/adapters/A", "--adapter", f"{folder}/adapters/B", "--into", "adapter"
        ),
    )


def _record_of(folder: Path) -> dict[str, Any]:
    """dynlora.json of the run that the folder is of, or whose checkpoint it is."""
    run = run_of(folder) if folder.resolve().parent.name == CHECKPOINTS else folder
    own = folder if (folder / RECORD).is_file() else run
    return read_record(own) if (own / RECORD).is_file() else {}


def _model_type(adapter: Adapter, base: str | None) -> str:
    """Of the base: from the run's record, else from a folder that is named; empty where nobody says."""
    recorded = (adapter.record.get("base_model") or {}).get("model_type")
    config = Path(base or adapter.base_name) / "config.json"
    if not recorded and config.is_file():
        recorded = read_object(config).get("model_type")
    return str(recorded or "")


def _checked(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], bool]:
    """adapter_config.json, of a file, as PEFT writes it, and whether it was mlx-lm's."""
    mlx = mlx_adapter.is_of_mlx(config)
    if mlx:
        config = mlx_adapter.peft_config(config, path)
    fits(PeftForm, config, path)
    kind = config.get("peft_type")
    if kind != str(kind).upper() or kind_of_files(config) not in _readable():
        raise UsageError(
            f"{path}: peft_type is {kind}, not LORA", "PEFT's `convert_to_lora` makes a LoRA of many kinds"
        )
    for key, why in REFUSED.items():
        if config.get(key):
            value = shown(repr(config[key]))[1:-1]
            raise UsageError(f"{path}: {key}: {value}: {why}, which is not supported", "use it with PEFT itself")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise UsageError(
            f"{path}: init_lora_weights {start!r} changed the base model's weights too",
            "save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {without_wrappers(name): value for name, value in (config.get(key) or {}).items()}
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = [without_wrappers(name) for name in config[key]]
    return config, mlx


def _unknown(config: Mapping[str, Any]) -> str:
    """Keys that are set and that nobody here knows, as a newer PEFT may write them."""
    known = {*READ, *OF_TRAINING, *REFUSED}
    return ", ".join(sorted(shown(key)[1:-1] for key, value in config.items() if value and key not in known))


def kind_of_files(config: Mapping[str, Any]) -> str:
    """The file of adapters/kinds/ that reads adapters with this adapter_config.json."""
    return str(config.get("peft_type")).lower().replace("_", "-")


def _readable() -> set[str]:
    """The kinds that PEFT has files for; DoRA is in LoRA's."""
    return {name for name in plugins.names("kinds") if hasattr(plugins.load("kinds", name), "read")}


def _metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a file that has been read."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = [file for ending in ("*.bin", "*.pt") for file in sorted(path.parent.glob(ending))]
        if pickles:
            raise UsageError(
                f"{pickles[0]} is a pickle, which can run any code when it is opened; it was not",
                "if you trust its source, load it with PEFT and save it again: safetensors is PEFT's default",
            )
        raise UsageError(
            f"{path.parent} holds {PACKED if path.name == PACKED_WEIGHTS else CONFIG} but no {path.name}",
            "the files are incomplete; copy them again",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}", "copy it again, or train again") from None
    check_numbers(tensors, path)
    return tensors
