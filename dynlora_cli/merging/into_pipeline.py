"""The walk from adapters and a diffusion pipeline to a folder with the merged one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora_cli import __version__
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.images.of_run import as_image
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files import whole
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.place import refuse_full_disk
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way
from dynlora_cli.merging.pipeline import Plan, check_pipeline, plan_pipeline, write_pipeline
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.models.pipelines.find import BUILTIN
from dynlora_cli.models.pipelines.parts import PipelineFolder, open_pipeline
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, note


def of_pipelines(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters as they are named in their pipeline; [] where they are for language models.

    Raises:
        UsageError: some are for the one and some for the other.
    """
    found = [as_image(adapter) for adapter in adapters]
    kept = [adapter for adapter in found if adapter is not None]
    if kept and len(kept) < len(found):
        other = adapters[found.index(None)]
        raise UsageError(
            f"{kept[0].folder} is an adapter for a diffusion pipeline, and {other.folder} one for a language model",
            "merge adapters of one base",
        )
    return kept


def into_pipeline(
    adapters: Sequence[Adapter],
    out: Path | None,
    way: Way,
    *,
    base_name: str | None = None,
    overwrite: bool = False,
    emit: Emit = lambda event: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Write the pipeline with the adapters folded in, and read every changed weight again.

    Args:
        adapters: of one pipeline, as of `of_pipelines`.
        out: a new folder; None: `merged` inside the only adapter's, which must be a run.
        way: how several are combined.
        base_name: the pipeline's folder, in place of the one on record.
        overwrite: replace an earlier merge.
        emit: takes notes.

    Returns:
        The summary, as data.

    Raises:
        UsageError: the adapters and the pipeline do not go together, or `out` cannot be written to.
        MeasureError: a weight does not come out as it should.
    """
    started = time.monotonic()
    out = out or adapters[0].folder / "merged"
    pipeline = open_pipeline(*_name(adapters[0], base_name))
    _refuse_place(out, [adapter.folder for adapter in adapters], pipeline.folder)
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    for each in adapters:
        _refuse_another(each, pipeline)
    plan = plan_pipeline(_sum(adapters, way, pipeline), pipeline)
    refuse_full_disk(out, plan.bytes, "the merged pipeline")
    if plan.left_out:
        emit(note(f"left out, since no pipeline loads it or it holds other weights: {_some(plan.left_out)}"))
    with run_folder.replaced(out, overwrite=overwrite) as folder:
        writing = time.monotonic()
        write_pipeline(plan, folder)
        writing = time.monotonic() - writing
        summary = {
            **_facts(adapters, plan, out, way),
            "rounding": check_pipeline(plan, folder).share,
            "write_seconds": writing,
            "seconds": time.monotonic() - started,
        }
        whole.write_json(folder / run_folder.MERGE_RECORD, {**summary, "dynlora_version": __version__})
    return summary


def _name(adapter: Adapter, base_name: str | None) -> tuple[str, str]:
    """The pipeline's folder, and who named it.

    Raises:
        UsageError: nobody did.
    """
    if base_name:
        return base_name, "--base"
    if not adapter.base_name:
        raise UsageError(
            f"{adapter.folder} does not say which pipeline it is for", "name the pipeline's folder with --base FOLDER"
        )
    if adapter.base_name not in BUILTIN and not Path(adapter.base_name).expanduser().is_dir():
        raise MachineError(
            f"the pipeline of {adapter.folder} was at {adapter.base_name}, and is not there",
            "say where it is with --base FOLDER",
        )
    return adapter.base_name, f"the pipeline of {adapter.folder},"


def _sum(adapters: Sequence[Adapter], way: Way, pipeline: PipelineFolder) -> Adapter:
    """The adapters as one, at their weights.

    Raises:
        UsageError: they do not go together.
    """
    if len(adapters) > 1:  # whatever each says of its base: all are added to this one
        base = {"base_model_name_or_path": str(pipeline.folder)}
        return combine([replace(each, config={**each.config, **base}, record={}) for each in adapters], way).adapter
    weights = way.weights or [1.0]
    if len(weights) > 1:
        raise UsageError(f"--weights has {len(weights)} numbers for one adapter", "give one for each")
    if weights[0] == 1:
        return adapters[0]
    if adapters[0].kind != "LoRA":
        raise UsageError(f"{adapters[0].folder} is a {adapters[0].kind}, which takes no weight", "leave --weights out")
    layers = {name: replace(f, b_OC=weights[0] * f.b_OC) for name, f in adapters[0].layers.items()}
    return adapters[0].with_layers(layers)


def _refuse_place(out: Path, adapters: Sequence[Path], pipeline: Path) -> None:
    """Refuse an output folder that holds what is read, or lies in the pipeline."""
    run_folder.refuse_inputs(out, [*adapters, pipeline])
    if pipeline in out.resolve().parents:
        raise UsageError(f"--out {out} lies in the pipeline that is read, {pipeline}", "choose a folder beside it")


def _refuse_another(adapter: Adapter, pipeline: PipelineFolder) -> None:
    """Refuse a pipeline whose denoiser is not the one that a run learned on, as far as the run's record tells."""
    before = (adapter.record.get("base_model") or {}).get("fingerprint")
    part = next(iter(adapter.layers)).partition(".")[0]
    denoiser = pipeline.folder / part
    if not before or part not in pipeline.parts or not (denoiser / "config.json").is_file():
        return
    if what := changed_since(before, denoiser, read_object(denoiser / "config.json")):
        raise UsageError(
            f"{denoiser} is not the model that {adapter.folder} was trained on: {what}",
            "name the right one with --base FOLDER",
        )


def _facts(adapters: Sequence[Adapter], plan: Plan, out: Path, way: Way) -> dict[str, Any]:
    layers = {variant.part: len(variant.layers) for variant in plan.variants}
    several = {"method": way.method} if len(adapters) > 1 else {}
    return {
        "ok": True,
        "command": "merge",
        "into": "pipeline",
        "output_dir": str(out),
        "adapters": [str(adapter.folder) for adapter in adapters],
        "base_model": str(plan.pipeline.folder),
        **several,
        "weights": list(way.weights or [1.0] * len(adapters)),
        "layers": layers,
        "modules": sum(layers.values()),
        "dtypes": _dtypes(plan),
        "bytes": plan.bytes,
        "left_out": plan.left_out,
    }


def _dtypes(plan: Plan) -> dict[str, list[str]]:
    """Number formats of the weights that were added to, by the first file of each variant."""
    return {
        f"{variant.part}/{variant.files[0].name}": sorted(
            {str(variant.weights.entries[tensor].dtype).removeprefix("torch.") for tensor in variant.layers}
        )
        for variant in plan.variants
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
