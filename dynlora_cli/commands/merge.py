"""`dynlora merge`: one adapter into its base, or several into one adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import __version__, plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer, stored_quantized
from dynlora_cli.adapters.images.by_timestep import plain_at
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.config.options import given
from dynlora_cli.errors import MachineError, MeasureError, UsageError
from dynlora_cli.evaluation.agreement import Agreement, agreement, predictions
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.evaluation.predictions import adapted_predictions, predictions_of, rows_to_compare
from dynlora_cli.files import whole
from dynlora_cli.files.place import refuse_full_disk
from dynlora_cli.merging import images
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.fold import Plan, plan_merge, write_merged
from dynlora_cli.merging.into_pipeline import into_pipeline, of_pipelines
from dynlora_cli.merging.merged_folder import record_of, summary_of
from dynlora_cli.merging.method import Way
from dynlora_cli.models.dequantize import quantized_layers, write_dequantized
from dynlora_cli.models.linear import dense_weight, is_transposed
from dynlora_cli.models.load import DTYPES, Base, precision_of
from dynlora_cli.models.place import Place
from dynlora_cli.models.quiet import quiet
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs import record as records
from dynlora_cli.runs.events import Emit

# In nats per token. NF4 changes predictions by some tenths, by half a nat in tiny models. Another base is further away.
OF_ANOTHER_MODEL = 2.0
MAX_CHANGED = 0.01  # share of positions
MAX_KL = 0.01  # nats per token: far above what rounding to bf16 does, far below what a wrong merge does


@dataclass(frozen=True)
class Wanted:
    """How a merged model is written, and how far it may be from base + adapter.

    Attributes:
        base_weights: original | dequantized; of an adapter that was trained on a quantized base: add to the weights
            as they were before, or as training saw them.
        dtype: keep | float32 | bfloat16 | float16.
        max_kl: nats per token; above it nothing is left.
        max_changed: share of choices that may change beyond what rounding explains; above it nothing is left.
    """

    base_weights: str = "original"
    dtype: str = "keep"
    max_kl: float = MAX_KL
    max_changed: float = MAX_CHANGED


def run(
    paths: Sequence[Path],
    into: str,
    out: Path | None,
    way: Way,
    wanted: Wanted,
    *,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    at_step: float | None = None,
    overwrite: bool = False,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Merge adapters into their base, or into one adapter.

    Args:
        paths: of the adapters.
        into: base | adapter.
        out: a new folder; None: `merged` inside the only adapter's.
        way: how several adapters are combined.
        wanted: how a model is written.
        at_step: the timestep at which adapters whose rank goes by it are taken.
        base_name, trust_remote_code, overwrite, emit: as of `into_base`.

    Returns:
        The summary, as data.
    """
    adapters = plain_at(read_all(paths, emit, base_name), at_step)
    if into == "adapter":
        assert out is not None
        return into_adapter(
            adapters,
            out,
            way,
            base_name=base_name,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            emit=emit,
        )
    if for_pipeline := of_pipelines(adapters):
        return into_pipeline(for_pipeline, out, way, base_name=base_name, overwrite=overwrite, emit=emit)
    return into_base(
        adapters[0] if len(adapters) == 1 else combine(adapters, way).adapter,
        out,
        wanted,
        base_name=base_name,
        trust_remote_code=trust_remote_code,
        inputs=[each.folder for each in adapters],
        overwrite=overwrite,
        emit=emit,
    )


@quiet
def into_base(
    adapter: Adapter,
    out: Path | None,
    wanted: Wanted = Wanted(),
    *,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    inputs: Sequence[Path] = (),
    overwrite: bool = False,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Write the base model with the adapter folded in, and check that it predicts the same.

    Args:
        adapter: to be merged.
        out: a new folder; None: `merged` inside the adapter's.
        wanted: how the model is written, and how far it may be off.
        base_name: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        inputs: folders of the adapters that it was combined from.
        overwrite: replace an earlier merge.
        emit: takes notes.

    Returns:
        The summary, as data.

    Raises:
        MeasureError: the merged model predicts something else.
    """
    started = time.monotonic()
    out = out or adapter.folder / "merged"
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    place = find_base(adapter, base_name, trust_remote_code)
    run_folder.refuse_inputs(out, [adapter.folder, *inputs, place.folder])
    quantized = _quantized_base(adapter, place, wanted.base_weights, emit)
    with TemporaryDirectory() as full, run_folder.replaced(out, overwrite=overwrite) as folder:
        place, plan = _plan(adapter, place, quantized, wanted, Path(full))
        refuse_full_disk(out, _bytes_of(plan), "the merged model")
        writing = time.monotonic()
        size = write_merged(plan, adapter, place, folder)
        writing = time.monotonic() - writing
        emit({"event": "note", "text": f"merged {len(plan.modules)} of {len(adapter.layers)} modules; checking"})
        checks, to_trained_base = _compare(adapter, place, folder, quantized, wanted.base_weights, _rounding(plan))
        _refuse_difference(checks, to_trained_base, wanted)
        summary = {
            **_facts(adapter, place, plan, out),
            "base_weights": wanted.base_weights,
            "dtype": wanted.dtype,
            "bytes": size,
            "check": checks.as_dict(),
            "trained_base": to_trained_base.as_dict() if to_trained_base else None,
            "write_seconds": writing,
            "seconds": time.monotonic() - started,
        }
        whole.write_json(folder / run_folder.MERGE_RECORD, {**summary, "dynlora_version": __version__})
    return summary


def _plan(adapter: Adapter, place: Place, quantized: Base | None, wanted: Wanted, full: Path) -> tuple[Place, Plan]:
    """What will be written, and the base that it is made of: the one given, or its dequantized copy in `full`."""
    number = DTYPES.get(wanted.dtype)
    if wanted.base_weights == "original":
        return place, plan_merge(adapter, place, dtype=number)
    assert quantized is not None
    if place.files.quantization:
        place = write_dequantized(quantized, place, full, number)
        return place, plan_merge(adapter, place, dtype=number)
    original = partial(_dequantized, quantized)
    return place, plan_merge(adapter, place, original, number, quantized_layers(quantized))


def _refuse_difference(checks: Agreement, to_trained_base: Agreement | None, wanted: Wanted) -> None:
    """Refuse a merged model that predicts something else than base + adapter.

    Raises:
        MeasureError: it does; the message has the number that is too large.
    """
    if math.isnan(wanted.max_kl) or checks.kl > wanted.max_kl:
        raise MeasureError(
            f"the merged model is {checks.kl:.3g} nats per token away from base + adapter, more than "
            f"{wanted.max_kl:g}; nothing was kept",
            "raise --max-kl if that is meant, or report this",
        )
    if checks.changed > wanted.max_changed:
        raise MeasureError(
            f"the merged model chooses another token at {checks.changed:.1%} of the positions, more than "
            f"{wanted.max_changed:.1%}, and rounding to the stored type does not explain it; nothing was kept",
            "raise --max-changed if that is meant, or report this",
        )
    if to_trained_base and to_trained_base.kl > OF_ANOTHER_MODEL:
        raise MeasureError(
            f"the merged model is {to_trained_base.kl:.3g} nats per token away from what training saw, far more "
            "than quantizing explains; nothing was kept",
            "name the model that the quantized base was made from with --base FOLDER",
        )


def _compared(task: str) -> str:
    """What of the two models is compared."""
    return "vectors" if plugins.declared("tasks", task, "AUTO_MODEL") == "AutoModel" else "logits"


def _facts(adapter: Adapter, place: Place, plan: Plan, out: Path) -> dict[str, Any]:
    return {
        "ok": True,
        "command": "merge",
        "into": "base",
        "output_dir": str(out),
        "adapters": [str(adapter.folder)],
        "base_model": str(place.folder),
        "compared": _compared(place.options.task),
        "modules": len(plan.modules),
        "untied": plan.untied,
    }


def _quantized_base(adapter: Adapter, place: Place, base_weights: str, emit: Emit) -> Base | None:
    """The base as QLoRA training saw it, where the adapter was trained so; or where the person asks for it."""
    if base_weights == "original" and place.files.quantization:
        return None  # which is refused
    if stored := stored_quantized(adapter):
        return base_in_memory(adapter, stored, read_tokenizer(adapter, stored))
    if (adapter.record.get("base_model") or {}).get("quantization"):
        problem = f"the quantized base that {adapter.folder} was trained on, {adapter.base_name}, is not there"
        if base_weights == "dequantized":
            raise MachineError(problem, "bring it back, or leave --base-weights out")
        emit({"event": "note", "text": f"{problem}: the result was not compared with it"})
        return None
    options = place.options
    if not (options.load_in_4bit or options.load_in_8bit):
        if base_weights == "original":
            return None
        if adapter.record:
            raise UsageError(f"{adapter.folder} was not trained on a quantized base", "leave --base-weights out")
        emit({"event": "note", "text": "nothing says how the base was quantized; NF4 with double quantization assumed"})
        options = options.model_copy(update={"load_in_4bit": True})
    return base_in_memory(adapter, replace(place, options=options), read_tokenizer(adapter, place))


def _dequantized(base: Base, module: str) -> Tensor:
    """A layer's weight as training saw it, in its own layout."""
    layer = base.model.get_submodule(module)
    weight = dense_weight(layer).cpu()
    return weight.T.contiguous() if is_transposed(layer) else weight.contiguous()


def _bytes_of(plan: Plan) -> int:
    needed = sum(plan.changed.get(name, entry).size for name, entry in plan.weights.entries.items())
    return needed + sum(new.size for new in plan.added.values())


def _rounding(plan: Plan) -> float:
    """By what share a number of the merged model's files may be off, of the coarsest type that was written."""
    types = {new.dtype for new in (*plan.changed.values(), *plan.added.values()) if new.dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


def _compare(
    adapter: Adapter, place: Place, folder: Path, quantized: Base | None, base_weights: str, rounding: float
) -> tuple[Agreement, Agreement | None]:
    """The merged files against base + adapter on the probe text.

    Returns:
        the check, against the weights that were added to; and for a QLoRA adapter that went into the weights as they
        were, how far the result is from what training saw, for information.
    """
    rows = rows_to_compare(adapter, place)
    found = predictions_of(replace(place, folder=folder), rows)
    if quantized is None:
        return agreement(adapted_predictions(adapter, place, rows), found, rows, rounding), None
    with attached(quantized.model, adapter), precision_of(quantized)():
        as_trained = agreement(predictions(quantized.model, rows), found, rows, rounding)
    if base_weights == "dequantized":
        return as_trained, None
    return agreement(adapted_predictions(adapter, place, rows), found, rows, rounding), as_trained


@quiet
def into_adapter(
    adapters: Sequence[Adapter],
    out: Path,
    way: Way,
    *,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Write one adapter that does what several do together.

    Args:
        adapters: two or more, of one base.
        out: a new folder.
        way: how they are combined.
        base_name: folder or hub id of the base model, in place of the one on record; PEFT is asked on its structure.
        trust_remote_code: Python code that comes with the base may run.
        overwrite: replace what dynlora wrote there.
        emit: takes notes.

    Returns:
        The summary, as data.

    Raises:
        MeasureError: PEFT reads the adapter otherwise; it is kept.
    """
    started = time.monotonic()
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    run_folder.refuse_inputs(out, [adapter.folder for adapter in adapters])
    way = replace(way, options=way.options or given("methods", way.method, []))
    combined = combine(adapters, way)
    adapter = combined.adapter
    if "births" not in adapter.record and any(len(each.births) > 1 for each in adapters):
        text = "which run a component began in is known no more: merging has mixed them, or cannot tell"
        emit({"event": "note", "text": text})
    dtype = images.dtype_of(adapters)
    adapter = adapter.rounded(dtype)
    summary = summary_of(adapters, combined, out, way) | {"seconds": time.monotonic() - started}
    if dtype != FULL:
        emit({"event": "note", "text": f"written in {dtype}, as the files of the adapters are"})
        summary["save_dtype"] = dtype
    with run_folder.replaced(out, overwrite=overwrite) as folder:
        file = save(adapter, folder, dtype=dtype)
        summary["peft_check"] = check_files(adapter, folder, base_name, trust_remote_code)
        run_folder.copy_tokenizer(adapters[0].folder, folder)
        records.write(folder, record_of(adapters, adapter, out, summary, file))
    tell(summary["peft_check"], out, emit)
    return summary


def read_all(paths: Sequence[Path], emit: Emit, base_name: str | None = None) -> list[Adapter]:
    """The adapters that the paths name; how each was found goes to `emit`."""
    adapters = [read_adapter(path, base_name, images=True) for path in paths]
    for adapter in adapters:
        if adapter.note:
            emit({"event": "note", "text": adapter.note})
    return adapters
