"""X-LoRA in PEFT's own form: read, and written so that stock PEFT loads it.

    out/name/
      adapter_config.json          peft_type XLORA, the classifier's settings, and `adapters`: a path for each
      adapter_model.safetensors    the classifier
      adapters/NAME/               each adapter, as plain PEFT files

PEFT follows the paths in `adapters`; we never do, and read what lies in the folder under the last name of each path.
The keys must be "0", "1" and so on: PEFT itself finds no adapter under another one. What PEFT 0.21 saves is put
together again: it takes the numbers in the names of layers for those of adapters, and so writes layer 0 of the
classifier as `layers.weight` into the file of adapter "0", in the folder 0/. That file holds no adapter, but layer 0 of
all of them; PEFT itself loads the adapters from where `adapters` says, so they must be copied into the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.adapters.routed import MEMBERS, MOST_MEMBERS, RoutedAdapter, read_numbers, write_members
from dynlora_cli.config.options import options, section
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, first_fault, fits, read_object, refuse_links
from dynlora_cli.files.names import A_NAME, is_name
from dynlora_cli.files.whole import write_json

METHOD = "x-lora"
KIND = "XLORA"
PREFIX = "base_model.internal_xlora_classifier."
OF_PEFT = "base_model.lora_model."  # begins the names in the files that PEFT 0.21 saves below an X-LoRA


class XLoraForm(BaseModel):
    """The keys of adapter_config.json that are used beside the options; it may have been made by somebody else."""

    model_config = ConfigDict(strict=True)
    adapters: dict[str, str] = Field(min_length=1, max_length=MOST_MEMBERS)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


def is_xlora(folder: Path) -> bool:
    """Whether a folder's adapter_config.json says that it is an X-LoRA."""
    return (folder / CONFIG).is_file() and read_object(folder / CONFIG).get("peft_type") == KIND


def write_xlora(
    folder: Path,
    home: Path,
    values: Mapping[str, Any],
    members: Mapping[str, Adapter],
    tensors: Mapping[str, Tensor],
    hidden: int,
) -> None:
    """Write an X-LoRA, adapter_config.json last.

    Args:
        folder: empty.
        home: where the folder will be in the end, which PEFT looks for the adapters in.
        values: the variant's own keys.
        members: the adapters by name, in the order of their columns.
        tensors: the classifier's numbers.
        hidden: width of the model's hidden states.
    """
    write_members(folder, members)
    named = {PREFIX + name: value.cpu().contiguous() for name, value in tensors.items()}
    (folder / WEIGHTS).write_bytes(to_bytes(named, metadata={"format": "pt"}))
    first = next(iter(members.values()))
    config = {
        "peft_type": KIND,
        "task_type": first.config.get("task_type"),
        "base_model_name_or_path": first.config.get("base_model_name_or_path"),
        "revision": first.config.get("revision"),
        "inference_mode": True,
        "hidden_size": hidden,
        "adapters": {str(at): str(home.resolve() / MEMBERS / name) for at, name in enumerate(members)},
        "use_trainable_adapters": False,
        **values,
    }
    write_json(folder / CONFIG, config)


def read_xlora(
    folder: Path, read: Callable[[Path], Adapter], record: dict[str, Any], note: str | None
) -> RoutedAdapter:
    """The X-LoRA in a folder, and its adapters.

    Args:
        folder: with adapter_config.json.
        read: reads an adapter from its folder.
        record: dynlora.json, or {}.
        note: how the folder was found.

    Raises:
        UsageError: it is damaged or incomplete.
        MeasureError: a number is not finite.
    """
    path = folder / CONFIG
    config = read_object(path)
    form = fits(XLoraForm, config, path)
    values = {key: config[key] for key in options("variants", METHOD) if key in config}
    for key in ("softmax_temperature", "scaling_pass_value", "global_scaling_weight", "xlora_dropout_p"):
        if isinstance(values.get(key), int):  # 1 for 1.0, in JSON that others wrote
            values[key] = float(values[key])
    try:
        checked = section(options("variants", METHOD)).model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}", COPY_AGAIN) from None
    if list(form.adapters) != [str(at) for at in range(len(form.adapters))]:
        raise UsageError(
            f'{path}: the keys of `adapters` are {", ".join(form.adapters)}, and must be "0", "1" and so on: PEFT '
            "finds no adapters under others",
            "name them so, in the order in which the classifier was trained",
        )
    homes = {_home(folder, key, text) for key, text in form.adapters.items()}
    if len(homes) < len(form.adapters):
        raise UsageError(f"{path}: two adapters have the same name", "give their folders different names")
    members = {home.name: read(home) for home in (_home(folder, *item) for item in form.adapters.items())}
    tensors = _classifier(folder, form.adapters)
    first = next(iter(members.values()))
    kept = {key: config.get(key) for key in ("base_model_name_or_path", "task_type", "revision")}
    return RoutedAdapter(
        folder,
        {},
        {"peft_type": KIND, "fan_in_fan_out": first.config.get("fan_in_fan_out"), **kept},
        record,
        note=note,
        model_type=first.model_type,
        method=METHOD,
        options=checked.model_dump(),
        members=members,
        tensors=tensors,
    )


def _classifier(folder: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The classifier's numbers by name, from the file of the X-LoRA and those of PEFT's below it.

    Raises:
        UsageError: there are none, or not all.
    """
    tensors = {name.removeprefix(PREFIX): value for name, value in read_numbers(folder / WEIGHTS).items()}
    for key in keys:
        if _is_scattered(folder / key):
            scattered = read_numbers(folder / key / WEIGHTS)
            for what in ("weight", "bias"):
                if (name := f"{PREFIX}layers.{what}") in scattered:
                    tensors.setdefault(f"layers.{key}.{what}", scattered[name])
    if "layers.0.weight" not in tensors:
        raise UsageError(
            f"{folder / WEIGHTS} lacks the classifier (or its first layers), and {folder / '0'} has none from PEFT",
            f"save `model.base_model.internal_xlora_classifier.state_dict()` with {PREFIX!r} before each name",
        )
    return tensors


def _is_scattered(folder: Path) -> bool:
    """Whether this is what PEFT 0.21 saves for an adapter of an X-LoRA: parts of all, and no adapter.

    Raises:
        UsageError: it is a link, or its file is damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        return False
    refuse_links(folder.parent)
    refuse_links(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.startswith(OF_PEFT) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}", COPY_AGAIN) from None


def _home(folder: Path, key: str, path: str) -> Path:
    """Where an adapter lies inside the folder, by the last name of its path, or by its key."""
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if not is_name(name):
        raise UsageError(f"{folder / CONFIG}: adapters: {name!r} is no name: {A_NAME}", "rename its folder")
    for own in (folder / MEMBERS / name, folder / MEMBERS / key, folder / key):
        if (own / CONFIG).is_file() and not _is_scattered(own):
            refuse_links(own.parent)
            return own
    raise UsageError(
        f"{folder}: the adapter {key} of this X-LoRA is {path}, and nothing outside the folder is read",
        f"copy it to {folder / MEMBERS / name}",
    )
