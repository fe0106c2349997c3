"""`dynlora export`: the adapter in the form another tool reads, read back as that tool does and compared."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import __version__, plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.base import find_base
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.adapters.images.by_timestep import no_single_weight
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.dtypes import FULL, rounding_note
from dynlora_cli.config.options import given
from dynlora_cli.config.sections import Model
from dynlora_cli.config.types import Section
from dynlora_cli.errors import MachineError, MeasureError, UsageError
from dynlora_cli.evaluation.agreement import agreement
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.evaluation.predictions import adapted_predictions, predictions_of, rows_to_compare
from dynlora_cli.export.exporter import Job, Merged, Shelf
from dynlora_cli.export.gguf.outtypes import MAX_KL, QUANTIZED
from dynlora_cli.export.hub.login import Address
from dynlora_cli.export.hub.push import push
from dynlora_cli.files import whole
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.library.library import ADAPTERS, Library
from dynlora_cli.library.loaded import check_all
from dynlora_cli.merging.fold import plan_merge, write_merged
from dynlora_cli.models.find import is_hub_name
from dynlora_cli.models.linear import is_linear, linear_shape
from dynlora_cli.models.place import Place, structure
from dynlora_cli.rounding.floats import changed
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.tasks import task as tasks

# The relative error of a number by rounding, in files of this type; of smaller ones what the number of bits gives.
ROUNDING = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "fp8": 2.0**-3, "q8_0": 2.0**-6}
ROUNDING |= {name: 2.0 ** -int(name.lstrip("iq")[0]) for name in QUANTIZED}


def run(
    path: Path,
    to: str,
    out: Path,
    *,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    outtype: str = "f16",
    dtype: str = "",
    options: Section | None = None,
    max_kl: float | None = None,
    overwrite: bool = False,
    address: Address | None = None,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Write the export and check it.

    Args:
        path: a run folder, or any LoRA folder in PEFT's layout.
        to: a file of export/targets/, by its name.
        out: a new folder.
        base_name: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        outtype: of a GGUF model, see export/gguf/outtypes.py.
        dtype: of the factors, one that the exporter takes, see config/dtypes.py; "": float32, and of a pipeline's file
            as it came.
        options: those that the exporter itself brings; None: their defaults.
        max_kl: nats per token by which the export may differ; None: by its number format.
        overwrite: replace an earlier export.
        address: on a hub, where it is sent to; None: it stays here.
        emit: takes notes.

    Returns:
        The summary, which is also in export.json.

    Raises:
        MeasureError: the export computes something else; nothing is left of it.
    """
    started = time.monotonic()
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    exporter = plugins.load("exporters", to)
    options = options or given("exporters", to, [])
    adapter = _read(path, to, exporter, options, base_name)
    if adapter.note:
        emit(note(adapter.note))
    dtype = dtype or (adapter.image.dtype if adapter.image else FULL)
    place = None if adapter.image else _base(adapter, (base_name, trust_remote_code), exporter, emit)
    run_folder.refuse_inputs(out, [adapter.folder, *([place.folder] if place else [])])
    job = replace(_job(adapter.rounded(dtype), place, outtype, options), dtype=dtype)
    with run_folder.replaced(out, overwrite=overwrite) as folder:
        facts, checks = _write_checked(job, exporter, place, folder, max_kl, adapter)
        facts |= _rounding(adapter, job)
        if getattr(exporter, "for_peft", False) or adapter.image:
            written = job.adapter if adapter.image else adapter
            checks["peft_check"] = check_files(written, folder, base_name, trust_remote_code)
        summary = {**_source(job, place, to, out), **facts, **checks, "notes": job.notes, **_ends(folder, started)}
        whole.write_json(folder / run_folder.EXPORT_RECORD, summary)
    if "peft_check" in checks:
        tell(checks["peft_check"], out, emit)
    return summary | ({"pushed": push(address, out, summary, adapter, place, emit)} if address else {})


def _read(path: Path, to: str, exporter: ModuleType, options: Section, base_name: str | None) -> Adapter:
    """The adapter as the exporter wants it.

    Raises:
        UsageError: it is of a diffusion pipeline, and the exporter for language models; or the other way.
    """
    of_pipelines = getattr(exporter, "of_pipelines", False)
    adapter = read_adapter(path, base_name, images=True)
    if adapter.image and not of_pipelines:
        raise UsageError(
            f"{adapter.folder} is an adapter for a diffusion pipeline, and --to {to} is for language models",
            "use --to diffusers or --to kohya",
        )
    if not of_pipelines:
        if adapter.schedule:
            raise no_single_weight(adapter.folder)
        return adapter
    if base_name:
        raise UsageError(f"--base is not for --to {to}, which needs no pipeline", "leave it out")
    return exporter.prepared(adapter, options)


def run_library(
    root: Path,
    to: str,
    out: Path,
    *,
    base_name: str | None = None,
    trust_remote_code: bool = False,
    options: Section | None = None,
    max_kl: float | None = None,
    overwrite: bool = False,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Write every adapter of a library that the consumer can read, check each, and add what serves them together.

    Args:
        root: the library's folder.
        to: a file of export/targets/ that takes a library; the others as of `run`.

    Raises:
        UsageError: the library is empty or damaged, or none of its adapters can be read there.
        MeasureError: an export computes something else; nothing is left of any.
    """
    started = time.monotonic()
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    exporter, library = plugins.load("exporters", to), Library.open(root)
    entries = check_all(library)
    run_folder.refuse_inputs(out, [root])
    options = options or given("exporters", to, [])
    written: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with run_folder.replaced(out, overwrite=overwrite) as folder:
        for entry in entries:
            adapter = read_adapter(entry.folder, base_name)
            place = _base(adapter, (base_name, trust_remote_code), exporter, emit)
            job, part = _job(adapter, place, "f32", options), folder / ADAPTERS / entry.name
            try:
                written[entry.name] = _one_of_many(job, exporter, place, part, max_kl)
            except UsageError as error:
                whole.remove(part)
                left_out[entry.name] = error.message
                emit(note(f"{entry.name} is left out: {error.message}"))
        if not written:
            raise UsageError(f"no adapter of {root} can be exported to {to}", "the notes above say why")
        assert library.base is not None
        shelf = Shelf(root.resolve(), _name_of(place) or library.base.name, written, left_out)
        summary = {
            **{"ok": True, "command": "export", "to": to, "output_dir": str(out), "library": str(root)},
            **{"base_model": shelf.base, "adapters": written, "left_out": left_out},
            **exporter.write_library(shelf, folder),
            **_ends(folder, started),
        }
        whole.write_json(folder / run_folder.EXPORT_RECORD, summary)
    return summary


def _one_of_many(
    job: Job, exporter: ModuleType, place: Place | None, part: Path, max_kl: float | None
) -> dict[str, Any]:
    """Write and check one adapter of a library, in a folder of its own.

    Raises:
        UsageError: the consumer cannot read it.
    """
    part.mkdir(parents=True)
    facts, checks = _write_checked(job, exporter, place, part, max_kl, job.adapter)
    return {**facts, "parameters": job.adapter.parameters, **checks}


def _write_checked(
    job: Job, exporter: ModuleType, place: Place | None, folder: Path, max_kl: float | None, source: Adapter
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one adapter and read it back; what the exporter tells of it, and how well it agrees with its source."""
    facts = exporter.write(job, folder)
    _write_reading(job, place, folder)
    most = getattr(exporter, "MAX_KL", MAX_KL[job.outtype]) if max_kl is None else max_kl
    return facts, _check(job, exporter, place, folder, most, source)


def _rounding(source: Adapter, job: Job) -> dict[str, Any]:
    """What rounding changed, for the summary and the notes; nothing where nothing was rounded."""
    if job.dtype == FULL:
        return {}
    names = [name for name in source.layers if name in job.adapter.layers]
    before, after = ([(f.layers[name].a_CI, f.layers[name].b_OC) for name in names] for f in (source, job.adapter))
    lost = changed(before, after)
    job.notes.append(rounding_note(job.dtype, lost))
    return {"dtype": job.dtype, "rounding": lost}


def _write_reading(job: Job, place: Place | None, folder: Path) -> None:
    """Put beside an adapter in PEFT's form what its task needs there, such as how texts become vectors."""
    if (folder / WEIGHTS).is_file():
        adapter = job.adapter
        options = place.options if place else Model(name_or_path=str(adapter.folder), task=adapter.task)
        tasks.of(options).carry((adapter.folder, *([place.folder] if place else [])), folder)


def _name_of(place: Place | None) -> str | None:
    """How another program finds a base: its folder, or its name on a hub; None where it is not here."""
    if place is None:
        return None
    name = place.options.name_or_path
    return name if is_hub_name(name) and not Path(name).expanduser().is_dir() else str(place.folder.resolve())


def _source(job: Job, place: Place | None, to: str, out: Path) -> dict[str, Any]:
    """What was exported and how, for the summary; options only of an exporter that has some."""
    adapter, options = job.adapter, job.options.model_dump()
    return {
        "ok": True,
        "command": "export",
        "to": to,
        "output_dir": str(out),
        "adapter": str(adapter.folder),
        "base_model": str(place.folder) if place else adapter.config.get("base_model_name_or_path"),
        "parameters": adapter.parameters,
        "ranks": adapter.ranks,
        **({"options": options} if options else {}),
    }


def _ends(folder: Path, started: float) -> dict[str, Any]:
    """The end of every summary: what was written, by which version, and how long it took."""
    return {"files": _files(folder), "dynlora_version": __version__, "seconds": time.monotonic() - started}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file, by its path in the folder."""
    return {
        str(file.relative_to(folder)): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _base(adapter: Adapter, base: tuple[str | None, bool], exporter: ModuleType, emit: Emit) -> Place | None:
    """The base; None where it is not on this machine and the exporter can do without, which a note says."""
    try:
        return find_base(adapter, *base)
    except MachineError as error:
        if exporter.needs_base or base[0]:
            raise
        emit(note(f"weights are compared and logits are not: {error.message}"))
        return None


def _job(adapter: Adapter, place: Place | None, outtype: str, options: Section) -> Job:
    """What the exporter is given; what it may never ask for is made when it asks."""
    own = (adapter.folder / "tokenizer_config.json").is_file()

    @cache
    def merged() -> Merged:
        assert place is not None
        plan = plan_merge(adapter, place)

        def write(folder: Path) -> None:
            write_merged(plan, adapter, place, folder)

        return Merged(plan.config, plan.parameters(), plan.parameter, write, plan.untied)

    return Job(
        adapter=adapter,
        tokenizer_folder=adapter.folder if own else place.folder if place else None,
        base_folder=place.folder if place else None,
        base_config=read_object(place.folder / "config.json") if place else None,
        linear_layers=_linear_layers(place) if place else None,
        merged=merged,
        options=options,
        outtype=outtype,
    )


def _linear_layers(place: Place) -> dict[str, tuple[int, int]]:
    modules = structure(place).named_modules()
    return {name: linear_shape(module) for name, module in modules if is_linear(module)}


def _check(
    job: Job, exporter: ModuleType, place: Place | None, folder: Path, max_kl: float, source: Adapter
) -> dict[str, Any]:
    """What was written, read back by the consumer's rules, against the adapter it came from."""
    found = exporter.read_back(job, folder)
    if place is None:
        difference = _weight_difference(job.adapter, found)
        if difference > 1e-5:
            raise MeasureError(
                f"the export's weights differ by {difference:.3g}; nothing was kept", "please report this"
            )
        return {"max_logit_difference": None, "max_weight_difference": difference}
    rows = rows_to_compare(job.adapter, place)
    reference = adapted_predictions(source, place, rows)
    of_files = getattr(exporter, "ROUNDING", ROUNDING[job.outtype if job.dtype == FULL else job.dtype])
    rounding = of_files if isinstance(found, Adapter) else max(of_files, ROUNDING["bf16"])
    measured = agreement(reference, _predictions(found, job, place, rows), rows, rounding)
    if math.isnan(max_kl) or measured.kl > max_kl:
        raise MeasureError(
            f"the export is {measured.kl:.3g} nats per token away from base + adapter, more than {max_kl:g}; "
            "nothing was kept",
            "raise --max-kl if that is meant, or choose " + ("--outtype f16" if job.dtype == FULL else "--dtype bf16"),
        )
    return {"max_logit_difference": measured.max_logit_difference, "check": measured.as_dict()}


def _predictions(found: Any, job: Job, place: Place, rows: list[Tensor]) -> list[Tensor]:
    if isinstance(found, Adapter):
        return adapted_predictions(found, place, rows)
    if isinstance(found, Path):
        return predictions_of(replace(place, folder=found), rows)
    return predictions_of(place, rows, found, tied_weights=not job.merged().untied, adapter=job.adapter)


def _weight_difference(adapter: Adapter, found: Adapter) -> float:
    """Largest |ΔW - ΔW'|, relative to the largest |ΔW| of the layer; layers that one of them lacks count as 0."""
    worst = 0.0
    for name in adapter.layers.keys() | found.layers.keys():
        before, after = (_delta(each, name) for each in (adapter, found))
        largest = before.abs().max().item() or 1.0
        worst = max(worst, (before - after).abs().max().item() / largest)
    return worst


def _delta(adapter: Adapter, name: str) -> Tensor:
    """ΔW of a layer; zero if the adapter does not adapt it."""
    return adapter.layers[name].delta_OI() if name in adapter.layers else torch.zeros(1)
