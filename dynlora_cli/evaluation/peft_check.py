"""What stock PEFT makes of an adapter that was just written, against what was trained: asked of PEFT, where installed.

    read_back    logits of base + adapter as PEFT loads it, against those of the model as training left it
    check_files  whether PEFT puts something into every layer, found on the model's structure alone

The base is in memory once: PEFT gets the model's modules anew, plain, with the same weights in them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.base import find_base
from dynlora_cli.adapters.expert_files import parts_of
from dynlora_cli.adapters.find import CONFIG, IMAGE_WEIGHTS, WEIGHTS
from dynlora_cli.adapters.images import write as images
from dynlora_cli.adapters.images.pipeline import as_trained
from dynlora_cli.adapters.replaced import lengthen, tables_of
from dynlora_cli.adapters.token_rows import LIST
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import DynloraError, MeasureError
from dynlora_cli.evaluation.agreement import predictions, probe_rows
from dynlora_cli.evaluation.diffusers_check import check_file
from dynlora_cli.files.foreign import read_object
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.models.patched import no_warnings
from dynlora_cli.models.place import Place, input_table
from dynlora_cli.models.randomness import seeded
from dynlora_cli.models.streamed import streamed
from dynlora_cli.models.token_rows import without_rows
from dynlora_cli.runs.events import Emit, note

NOT_CHECKED = "what PEFT makes of the adapter was not checked"
ABSENT = f"{NOT_CHECKED}: PEFT is not installed"
# As a share of the logits' spread. In 16 or fewer bits, another order of operations alone makes a difference of some
# hundredths, and routers may choose other experts.
TOLERANCE = {torch.float32: 1e-3}
ROUGH = 0.1


@seeded(0)  # PEFT draws first values, which it reads over at once
def read_back(
    place: Place, trained: PreTrainedModel, tokenizer: Any, folder: Path, layers: Iterable[str], numbers: Any
) -> dict[str, Any]:
    """Compare the adapter in a folder, as PEFT loads it, with the model that it was written from.

    Args:
        place: of the base.
        trained: with components in it; stays as it is.
        tokenizer: for the probe text.
        folder: with adapter_config.json.
        layers: names of those that the adapter has components in.
        numbers: gives the context (autocast) in which the model computes.

    Returns:
        checked: whether a comparison was possible; reason: why not; peft: its version; difference: root mean square of
        the logits' differences, as a share of their spread; problem: None, or what is wrong, in words.
    """
    if importlib.util.find_spec("peft") is None:
        return {"checked": False, "reason": ABSENT}
    found: dict[str, Any] = {"checked": True, "peft": importlib.metadata.version("peft"), "problem": None}
    longest = place.files.context_length
    rows = [row[:, :longest] for row in probe_rows(tokenizer)]
    was = trained.training
    try:
        wanted = _logits(trained.eval(), rows, numbers())
        plain = streamed(place)
        _share(plain, trained)
    except Exception as error:  # a model that needs other inputs, or whose structure is not made without its weights
        return {"checked": False, "reason": f"{NOT_CHECKED}: {_first_line(error)}"}
    finally:
        trained.train(was)
    try:
        with no_warnings:  # PEFT warns of exactly what is checked here
            loaded = _loaded(plain, folder)
            lost = _without_adapter(loaded, layers)
            with as_trained(loaded, folder / WEIGHTS):
                logits = _logits(loaded, rows, numbers())
    except torch.OutOfMemoryError:
        return {"checked": False, "reason": f"{NOT_CHECKED}: too little memory"}
    except Exception as error:
        return found | {"problem": f"PEFT refuses it: {_first_line(error)}"}
    precise = not place.options.load_in_4bit and not place.options.load_in_8bit
    allowed = TOLERANCE.get(trained.dtype, ROUGH) if precise else ROUGH
    found["difference"] = _apart(wanted, logits)
    if lost:
        found["problem"] = _sentence(lost)
    elif not found["difference"] <= allowed:
        found["problem"] = f"its logits are {found['difference']:.2g} of their spread apart, more than {allowed:g}"
    elif hasattr(plain, "probe"):
        found["problem"] = _in_its_pipeline(place, trained, wanted, folder, numbers, allowed)
    return found


def _in_its_pipeline(
    place: Place, trained: PreTrainedModel, wanted: Tensor, folder: Path, numbers: Any, allowed: float
) -> str | None:
    """What is wrong with the file that a pipeline of diffusers loads, as far as its denoiser goes; None: nothing."""
    file = folder / IMAGE_WEIGHTS
    if not file.is_file():
        return None
    plain: Any = streamed(place)
    _share(plain, trained)
    try:
        with no_warnings:
            plain.load_lora_adapter(load_file(file), prefix=plain.config.model_type)
            with as_trained(plain, file):
                apart = _apart(wanted, _logits(plain, [], numbers()))
    except Exception as error:
        return f"diffusers refuses {IMAGE_WEIGHTS}: {_first_line(error)}"
    return None if apart <= allowed else f"by {IMAGE_WEIGHTS} its pipeline draws otherwise, {apart:.2g} of the spread"


@seeded(0)
def check_files(adapter: Adapter, folder: Path, base: str | None = None, trust: bool | Model = False) -> dict[str, Any]:
    """Whether PEFT finds every layer of an adapter that was written to a folder; no weights of the base are read.

    Args:
        adapter: as it was written.
        folder: with adapter_config.json.
        base, trust: of `find_base`; nothing is fetched.

    Returns:
        checked, reason, peft and problem, as of `read_back`.
    """
    if adapter.image:
        return check_file(adapter, folder / images.file_name(adapter))
    if importlib.util.find_spec("peft") is None:
        return {"checked": False, "reason": ABSENT}
    name = base or adapter.base_name
    if not (name.startswith("builtin:") or Path(name).expanduser().is_dir()):
        return {"checked": False, "reason": f"{NOT_CHECKED}: its base, {name or 'unnamed'}, is no folder here"}
    try:
        plain = streamed(find_base(adapter, base, trust))
        lengthen(plain, tables_of(plain, adapter))
    except DynloraError as error:
        return {"checked": False, "reason": f"{NOT_CHECKED}: {error.message}"}
    found = {"checked": True, "peft": importlib.metadata.version("peft"), "problem": None}
    try:
        with no_warnings:
            lost = _without_adapter(_loaded(plain, folder), adapter.layers)
    except Exception as error:
        return found | {"problem": f"PEFT refuses it: {_first_line(error)}"}
    return found | {"problem": _sentence(lost)}


def tell(found: dict[str, Any], folder: Path, emit: Emit) -> None:
    """Say so if nothing was checked, and `refuse` what PEFT reads otherwise.

    Raises:
        MeasureError: there is a problem.
    """
    if not found["checked"]:
        emit(note(found["reason"]))
    refuse(found, folder)


def refuse(found: dict[str, Any], folder: Path) -> None:
    """Fail if PEFT reads the adapter otherwise; its files stay where they are.

    Raises:
        MeasureError: there is a problem.
    """
    if (problem := found.get("problem")) and "reader" in found:
        raise MeasureError(
            f"{found['reader']} does not read what was written: {problem}",
            f"the file is kept in {folder}; please report this",
        )
    if problem:
        raise MeasureError(
            f"stock PEFT does not compute what was written: {problem}",
            f"the adapter is kept in {folder}, and `dynlora merge` makes a plain model of it; please report this",
        )


def _sentence(lost: list[str]) -> str | None:
    return f"PEFT puts nothing into {len(lost)} of its layers, such as {lost[0]}" if lost else None


def _loaded(plain: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel

    _make_room(plain, folder)
    device = "cpu" if plain.device.type == "meta" else str(plain.device)
    loaded: Any = PeftModel.from_pretrained(plain, str(folder), torch_device=device).eval()
    return loaded.get_base_model()


def _make_room(plain: PreTrainedModel, folder: Path) -> None:
    """Enlarge the tables for tokens that the adapter has rows for, as its model card tells people to do."""
    named = read_object(folder / CONFIG).get(LIST)
    if not named:
        return
    plain.tie_weights()  # PEFT asks which parameters are the same object
    size = 1 + max(max(indices) for indices in (named.values() if isinstance(named, dict) else [named]))
    table = input_table(plain)
    if table is not None and size > len(table._parameters["weight"]):  # type: ignore[arg-type]
        plain.resize_token_embeddings(size, mean_resizing=False)


def _without_adapter(model: PreTrainedModel, layers: Iterable[str]) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    def place_of(name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError:  # the slice of one expert, which PEFT knows as a part of a parameter
            return model.get_submodule(parts_of(name)[0])

    return [name for name in layers if not isinstance(place_of(name), BaseTunerLayer)]


def _share(plain: nn.Module, trained: nn.Module) -> None:
    """Put the weights of a model with components into the same model without, as they are, not as copies."""
    plain._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.data, requires_grad=False)
        for name, parameter in trained._parameters.items()
    }
    plain._buffers = dict(trained._buffers)
    for name, value in vars(trained).items():
        if isinstance(value, Tensor):  # some models keep tensors as plain attributes
            setattr(plain, name, value)
    for name, child in list(plain.named_children()):
        other = without_rows(getattr(trained, name))
        other = other.base if isinstance(other, ComponentLinear) else other
        if type(child) is type(other):
            _share(child, other)
        elif any(isinstance(part, ComponentLinear) for part in other.modules()):
            raise TypeError(f"{type(child).__name__} {name} became a {type(other).__name__} while it ran")
        else:  # quantized
            setattr(plain, name, other)


@torch.no_grad()
def _logits(model: PreTrainedModel, rows: list[Tensor], numbers: AbstractContextManager[Any]) -> Tensor:
    with numbers:
        return torch.cat(predictions(model, rows))


def _apart(wanted: Tensor, found: Tensor) -> float:
    across = -1 if wanted.shape[-1] > 1 else 0  # a single output, of many texts, is spread over these
    spread = (wanted - wanted.mean(across, keepdim=True)).square().mean().sqrt()
    return ((found - wanted).square().mean().sqrt() / spread.clamp(min=1e-30)).item()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
