"""Each chunk trained by itself, and the components of all put side by side, then cut.

A sum of rank-1 components is added to another by putting both beside each other, so that nothing is lost before the
cut. The runs lie in the folder beside the output folder until all is done; --resume skips those that are finished.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.config.load import to_yaml
from dynlora_cli.config.sections import Source, TrainSource
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.documents.study import DocumentRow
from dynlora_cli.drafts.document import HELD_OUT, ROWS, with_enough_steps
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.files.whole import write_text
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.merged_folder import record_of, summary_of
from dynlora_cli.merging.method import Way
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import load_base, precision_of
from dynlora_cli.runs import events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs import record as records
from dynlora_cli.runs.log import RunLog
from dynlora_cli.runs.report.write import write_card, write_report
from dynlora_cli.tasks import task as tasks
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.runs.events import Emit
    from dynlora_cli.runs.record import Adapted

RUNS = "runs"
FORMAT = "grounded"
ANSWERS_AT_ONCE = 8


@dataclass(frozen=True)
class Parts:
    """What is trained in parts.

    Attributes:
        recipe: of one run on all rows; its output folder is that of the sum.
        recipe_text: for the run folder.
        rows: of all chunks.
        texts: files for the run folder: the rows.
        adapted: what they were made from.
        beside: the folder beside the output folder, which holds the rows.
        may_lengthen: more passes may be made over few rows than the recipe says.
        overwrite: the output folder may hold an earlier run.
        train: trains one run and returns its summary, as `dynlora train` does.
    """

    recipe: Recipe
    recipe_text: str
    rows: Sequence[DocumentRow]
    texts: Mapping[str, str]
    adapted: Adapted
    beside: Path
    may_lengthen: bool
    overwrite: bool
    train: Callable[..., dict[str, Any]]

    @property
    def out(self) -> Path:
        return Path(self.recipe.output_dir)


def run(parts: Parts, emit: Emit) -> dict[str, Any]:
    """Train the chunks, put them together, cut, and measure.

    Returns:
        The summary.

    Raises:
        Interrupted: Ctrl-C; finished runs stay.
    """
    began = time.monotonic()
    groups = together(parts.rows)
    adapters, steps = [], 0
    for number, chunks in enumerate(groups, 1):
        emit({"event": "progress", "text": f"part {number} of {len(groups)}: {counted(len(chunks), 'chunk')}"})
        recipe = _recipe_of(parts, chunks)
        steps += _trained(parts, recipe, emit).get("steps") or 0
        adapters.append(read_adapter(Path(recipe.output_dir)))
    way = Way(method="exact", budget=parts.recipe.rank.parsed_budget())
    whole = combine(adapters, Way(method="exact")).adapter if len(adapters) > 1 else adapters[0]
    combined = combine(adapters, way) if len(adapters) > 1 else None
    cut = combined.adapter if combined else whole
    losses, data = _measured(parts, whole, cut)
    kept = combined.energy_kept if combined else 1.0
    summary: dict[str, Any] = {
        **(summary_of(adapters, combined, parts.out, way) if combined else {"ok": True, "output_dir": str(parts.out)}),
        "adapters": [adapter.folder.name for adapter in adapters],  # which are gone with the folder beside
        "model": parts.recipe.model.name_or_path,
        "variant": parts.recipe.adapter.variant,
        "steps": steps,
        **losses,
        "energy_kept": kept,
        "parameters_start": whole.parameters,
        "parameters": cut.parameters,
        "components_start": whole.components,
        "components": cut.components,
        "ranks": cut.ranks,
        "importance": {name: factors.energy() for name, factors in cut.layers.items()},
        "seconds": time.monotonic() - began,
    }
    return _write(parts, adapters, whole, cut, data, summary, emit)


def together(rows: Sequence[DocumentRow]) -> list[list[int]]:
    """Chunks that are trained in one run: each by itself, but one of a single row, which no run takes, with the next.

    Args:
        rows: of all chunks; a chunk whose rows are all held out is in none of the runs.
    """
    counts = Counter(row.chunk for row in rows if not row.held_out)
    groups: list[list[int]] = [[]]
    for chunk in sorted(counts):
        if sum(counts[one] for one in groups[-1]) > 1:
            groups.append([])
        groups[-1].append(chunk)
    if len(groups) > 1 and sum(counts[one] for one in groups[-1]) == 1:
        last = groups.pop()
        groups[-1] += last
    return groups


def _recipe_of(parts: Parts, chunks: Sequence[int]) -> Recipe:
    """The recipe of the run on some chunks, whose rows are written."""
    folder = parts.beside / RUNS
    folder.mkdir(exist_ok=True)
    name = f"chunk-{chunks[0] + 1:05d}"
    own = [row for row in parts.rows if row.chunk in chunks]
    sources: dict[str, Any] = {"train": [], "val": []}
    for key, kind, held in (("train", TrainSource, False), ("val", Source, True)):
        text = "".join(row.line() for row in own if row.held_out == held)
        if text:
            file = folder / f"{name}-{key}.jsonl"
            write_text(file, text)
            sources[key] = [kind(path=str(file), format=FORMAT)]
    dataset = parts.recipe.dataset.model_copy(update={**sources, "val_size": 0.0})
    update: dict[str, Any] = {"dataset": dataset, "output_dir": str(folder / name)}
    if not sources["val"]:  # nothing to look at, and a recipe that asks for it is refused when it is read again
        update["eval"] = parts.recipe.eval.model_copy(update={"steps": None, "early_stopping_patience": None})
    recipe = parts.recipe.model_copy(update=update)
    rows = sum(not row.held_out for row in own)
    return with_enough_steps(recipe, parts.recipe_text, rows)[0] if parts.may_lengthen else recipe


def _trained(parts: Parts, recipe: Recipe, emit: Emit) -> dict[str, Any]:
    """The run of a chunk, or what is left of it to do; one that another recipe made is refused."""
    folder = Path(recipe.output_dir)
    if (folder / run_folder.RECORD).is_file():
        record = run_folder.read_record(folder)
        if "summary" in record or any(
            run_folder.fault_of(step, record) is None for step in run_folder.step_folders(folder)
        ):
            return parts.train(recipe, listener=emit, resume=True)
    return parts.train(recipe, listener=emit, overwrite=True)


def _measured(parts: Parts, whole: Adapter, cut: Adapter) -> tuple[dict[str, float], Data]:
    """The held-out loss of the base, of the sum, and of what is left of it after the cut; and all rows."""
    recipe, files = parts.recipe, BaseFiles.find(parts.recipe.model)
    places = {"train": ROWS, "val": HELD_OUT}
    update = {
        key: [one.model_copy(update={"path": str(parts.beside / name)}) for one in getattr(recipe.dataset, key)]
        for key, name in places.items()
    }
    data = load_data(
        recipe.dataset.model_copy(update=update),
        files.tokenizer,
        task=tasks.of(recipe.model, recipe.train),
        seed=recipe.seed,
        max_length=files.context_length,
        table=files.table_rows,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(recipe.model, files, files.tokenizer, device=device, labels=None, seed=recipe.seed)
    base.model.requires_grad_(False)
    longest, pad = max(example.tokens for example in data.val), int(files.tokenizer.pad_token_id)

    def loss() -> float:
        batches = Batches.in_order(data.val, micro_batch_size=ANSWERS_AT_ONCE, max_length=longest, pad_id=pad)
        on_device = (batch.to(device) for at in range(batches.steps_per_epoch) for batch in batches.step(0, at))
        return held_out(base.model, on_device, autocast=precision_of(base))["loss"]

    found = {"loss_before": loss()}
    for name, adapter in (("loss_of_sum", whole), ("loss_after", cut)):
        with attached(base.model, adapter):
            found[name] = loss()
    return found, data


def _write(
    parts: Parts,
    adapters: Sequence[Adapter],
    whole: Adapter,
    cut: Adapter,
    data: Data,
    summary: dict[str, Any],
    emit: Emit,
) -> dict[str, Any]:
    """A run folder like that of one run on all rows, in which the rows are."""
    saved = cut.rounded(parts.recipe.adapter.save_dtype)
    with run_folder.replaced(parts.out, overwrite=parts.overwrite) as folder:
        file = save(saved, folder, dtype=parts.recipe.adapter.save_dtype)
        summary["adapter_bytes"] = file.stat().st_size
        trust = parts.recipe.model
        summary["peft_check"] = check_files(saved, folder, None, trust)
        run_folder.copy_tokenizer(adapters[0].folder, folder)
        for name, text in {run_folder.RECIPE: parts.recipe_text, **parts.texts}.items():
            write_text(folder / name, text)
        records.write(folder, _record(parts, adapters, cut, data, summary, file))
        with RunLog(folder) as log:
            log(_cut_event(whole, cut, summary))
        write_report(folder)
        write_card(folder)
    tell(summary["peft_check"], parts.out, emit)
    emit(events.end(summary))
    return summary


def _record(
    parts: Parts, adapters: Sequence[Adapter], cut: Adapter, data: Data, summary: dict[str, Any], file: Path
) -> records.Record:
    """dynlora.json: the recipe and the rows are those of one run on all of them, so that others find the rows."""
    found = record_of(adapters, cut, parts.out, summary, file)
    first = adapters[0].record
    rows = {
        "counts": data.counts,
        "train_rows": len(data.train),
        "val_rows": len(data.val),
        "sha256": data.sha256,
        "turned": dict(data.writing.turned),
        "date": data.writing.date,
    }
    found["data"] = cast("records.Data", {**found["data"], **rows})
    found["recipe"], found["recipe_yaml"] = parts.recipe.model_dump(mode="json"), to_yaml(parts.recipe)
    found["adapted"] = {**parts.adapted, "chunks_added": True}
    kept = ("tokenizer_sha256", "versions", "seeds", "device", "dtype", "started")
    return cast("records.Record", {**found, **{key: first[key] for key in kept if key in first}})


def _cut_event(whole: Adapter, cut: Adapter, summary: dict[str, Any]) -> dict[str, Any]:
    """The cut, in the form of an event of training."""
    return {
        "event": "prune",
        "step": 0,
        "target_parameters": cut.parameters,
        "components_before": whole.components,
        "parameters_before": whole.parameters,
        "threshold": None,
        "removed": {name: rank - cut.ranks.get(name, 0) for name, rank in whole.ranks.items()},
        "measured_loss_change": summary["loss_after"] - summary["loss_of_sum"],
        "components": cut.components,
        "parameters": cut.parameters,
        "ranks": cut.ranks,
    }
