"""What a run holds on this machine: its folder, which nobody else may write to; its devices; its checkpoint.

with Session.open(recipe, ...) as session:      the folder is ours, a checkpoint is found and the devices are ready
    with session.recording(run): ...            the run is on record, and its events go to files and listener
        session.finish(run)                     adapter, summary, report
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli.config.dtypes import FULL, rounding_note
from dynlora_cli.config.load import to_yaml
from dynlora_cli.config.resume import flat
from dynlora_cli.data.load import Data
from dynlora_cli.data.vocabulary import tokenizer_sha256
from dynlora_cli.evaluation.peft_check import NOT_CHECKED, read_back, refuse
from dynlora_cli.execution import elastic
from dynlora_cli.execution.alike import same_facts
from dynlora_cli.execution.launch import is_main_process
from dynlora_cli.execution.mode import Modes, plan
from dynlora_cli.files.place import OutputPlace
from dynlora_cli.files.whole import write_text
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.place import Place
from dynlora_cli.runs import events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, send
from dynlora_cli.runs.log import RunLog
from dynlora_cli.runs.record import Adapted, Record
from dynlora_cli.training import outputs, roots
from dynlora_cli.training.held_out import forgotten, held_out_loss
from dynlora_cli.training.origin import Begun
from dynlora_cli.training.resume import find_checkpoint, go_back_to, same_inputs, writing
from dynlora_cli.training.routers import refuse_other_members
from dynlora_cli.training.run import Run
from dynlora_cli.training.setup import make_accelerator
from dynlora_cli.training.step import hold_alike

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.chat.template import Writing


@dataclass(frozen=True)
class Given:
    """What the folder of a new run is to hold beside what the run itself leaves there.

    Attributes:
        texts: files by their names.
        adapted: what the rows were made from, for dynlora.json.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    adapted: Adapted | None = None


NOTHING = Given()


@dataclass
class Session:
    """One process's part in a run, from the first look at its folder to its end.

    Attributes:
        recipe: of the run.
        folder: of the run.
        place: the folder's place, held as its only writer; None in all processes but the first.
        listener: takes every event.
        accelerator: this process's device, and the other processes.
        modes: how the steps are run; what they change is undone when the session ends.
        checkpoint: what the run goes on from; None for a new one.
        before: the record of the run that the checkpoint is of.
        begins: nothing of the run is in the folder yet; it may go on from a checkpoint of another folder.
        run_id: names the run and its checkpoints.
        given: what goes into the run folder beside what the run leaves there.
        record: dynlora.json, once the run is on record.
    """

    recipe: Recipe
    folder: Path
    place: OutputPlace | None
    listener: Emit | None
    accelerator: Accelerator
    modes: Modes
    checkpoint: Path | None
    before: Mapping[str, Any] | None
    begins: bool
    run_id: str | None
    given: Given = NOTHING
    record: Record = field(default_factory=Record)

    @classmethod
    @contextmanager
    def open(
        cls,
        recipe: Recipe,
        listener: Emit | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
        resume_from: Path | None = None,
    ) -> Iterator[Session | Finished]:
        """Hold the output folder for as long as the block runs, and look what is in it.

        Args:
            recipe: checked already.
            listener: takes every event of the run.
            overwrite: replace an earlier run in the output folder.
            resume: go on with the newest valid checkpoint of the output folder.
            resume_from: go on with this checkpoint folder.

        Raises:
            UsageError: the folder is not free, or there is nothing to go on with.
            MachineError: this machine lacks something that the recipe needs.
        """
        folder = Path(recipe.output_dir)
        # Of several processes the first one writes.
        with run_folder.place_of(folder) if is_main_process() else nullcontext() as place, plan(recipe.train) as modes:
            _tell_of_the_old(place, folder, listener)
            try:
                checkpoint = find_checkpoint(folder, recipe, resume, resume_from, listener)
                if checkpoint is None and resume:
                    yield Finished.in_folder(folder, place, listener)
                    return
                begins = checkpoint is None or run_folder.run_of(checkpoint) != folder.resolve()
                before = run_folder.read_record(run_folder.run_of(checkpoint)) if checkpoint else None
                if begins and place:
                    run_folder.refuse_occupied(folder, overwrite=overwrite)
                accelerator = make_accelerator(recipe, folder, modes)
                modes.refuse(accelerator.device, accelerator.num_processes)
                if accelerator.num_processes > 1:
                    same_facts(_asked_for(recipe, checkpoint))
                name = outputs.identity(before)
                yield cls(recipe, folder, place, listener, accelerator, modes, checkpoint, before, begins, name)
            except BaseException:
                if place:
                    place.settle()
                _tell_of_the_old(place, folder, listener)
                raise

    @property
    def writing(self) -> Writing:
        """How the run writes its rows: as it began to."""
        return writing(self.before, self.accelerator)

    @property
    def begun(self) -> Begun | None:
        """The components that a run began with, for one that goes on; None for a new one."""
        if self.before is None or self.before["budget"] is None:
            return None
        return Begun.on_record(self.before)

    def tell(self, text: str) -> None:
        """Say something at once, before the run is on record; other processes than the main one are silent."""
        if self.place:
            send(self.listener, events.note(text))

    def refuse_other_inputs(self, data: Data, files: BaseFiles) -> None:
        """Check that all processes see the same rows and model, and a run which goes on those that it began with.

        Raises:
            DynloraError: a process sees other ones.
            UsageError: the run does.
        """
        if self.checkpoint and self.before is not None:
            same_inputs(run_folder.run_of(self.checkpoint), self.before, data, files)
        if self.accelerator.num_processes > 1:
            facts = {
                "what was read of the rows": data.sha256,
                "the base model": str(fingerprint(files.folder, files.config)),
                "the tokenizer": tokenizer_sha256(files.tokenizer),
            }
            same_facts(facts)

    def save(self, run: Run) -> None:
        """Write a checkpoint; with the first one of a run, the run that it replaces is given up."""
        outputs.write_checkpoint(run, self.folder, self.run_id)
        if self.place:
            self.place.give_up_old()

    @contextmanager
    def recording(self, run: Run) -> Iterator[None]:
        """Put the run on record, or back to its checkpoint; inside the block its events go to files and listener."""
        hold_alike(run, "before the first step")
        self.record = outputs.start_record(run, self.run_id)
        if began := elastic.job():
            self.record["elastic_job"] = began
        if adapted := self.given.adapted or (self.before or {}).get("adapted"):
            self.record["adapted"] = adapted
        if self.begins and self.place:
            self.place.keep_old()
            self.place.path.mkdir(exist_ok=True)  # an old one stays where it is a volume of a container
            outputs.write_record(self.folder, self.record, run)
            for name, text in self.given.texts.items():
                write_text(self.folder / name, text)
        if self.checkpoint:
            refuse_other_members(self.before or {}, self.record)
            go_back_to(self.checkpoint, run, self.folder, self.record)
            hold_alike(run, f"in {self.checkpoint.name}")
        with self._log(run):
            outputs.write_record(self.folder, self.record, run)
            run.emit(outputs.start_event(run))
            if self.checkpoint:
                run.note(f"resuming from {self.checkpoint}")
            self.accelerator.init_trackers(self.folder.name, config=_plain(self.recipe))
            yield
        self.accelerator.end_training()
        if "peft_check" in self.record["summary"]:
            refuse(self.record["summary"]["peft_check"], self.folder)

    @contextmanager
    def _log(self, run: Run) -> Iterator[None]:
        """Events go to the run's files and to the listener; other processes than the main one are silent."""
        if not self.accelerator.is_main_process:
            yield
            return
        with RunLog(self.folder, keep_until_step=run.progress.step) as log:

            def emit(event: events.Event) -> None:
                log(event)
                send(self.listener, event)

            run.emit = emit
            yield

    def finish(self, run: Run) -> dict[str, Any]:
        """Write the adapter (or model), the complete record and the report.

        Returns:
            The summary.
        """
        kind = roots.settle_root(self.folder, run)
        saved = self._rounded(run, kind)
        roots.write_root(self.folder, run)
        summary = outputs.summarize(run, self.folder, kind, saved) | forgotten(run)
        if run.trained.layers and self.accelerator.is_main_process:
            summary["peft_check"] = self._read_back(run)
        outputs.finish(self.folder, self.record, run, summary)
        run.emit(events.end(summary))
        return summary

    def _rounded(self, run: Run, kind: str) -> dict[str, Any] | None:
        """Round the components to `adapter.save_dtype`, and measure what is left; None where nothing is rounded."""
        dtype = self.recipe.adapter.save_dtype
        if dtype == FULL or not isinstance(run.trained, Pool):
            return None
        was = (run.progress.best if kind == "best" else run.progress.last) or {}
        lost = roots.round_off(run, run.trained)
        saved: dict[str, Any] = held_out_loss(run) if run.val_batches else {}
        run.note(rounding_note(dtype, lost, was.get("loss"), saved.get("loss")))
        return {**was, **saved, "save_dtype": dtype, "rounding": lost, "loss_float32": was.get("loss")}

    def _read_back(self, run: Run) -> dict[str, Any]:
        """What PEFT makes of the adapter in the run's root."""
        if self.recipe.train.shard_base:
            found: dict[str, Any] = {"checked": False, "reason": f"{NOT_CHECKED}: the base is sharded"}
        else:
            place = Place(self.recipe.model, run.base.folder, run.data.labels, chosen=False)
            layers = [name for name, layer in run.trained.layers.items() if layer.count]
            found = read_back(place, run.model, run.base.tokenizer, self.folder, layers, self.accelerator.autocast)
        if not found["checked"]:
            run.note(found["reason"])
        return found


@dataclass(frozen=True)
class Finished:
    """Stands in for a `Session` where --resume finds a run that has ended already."""

    summary: dict[str, Any]

    @classmethod
    def in_folder(cls, folder: Path, place: OutputPlace | None, listener: Emit | None) -> Finished:
        """The summary on record; what is missing of the report is made."""
        made = place and outputs.write_pages(folder)
        text = "what was missing of its report is made" if made else "nothing to do"
        send(listener, events.note(f"{folder} is finished already; {text}"))
        return cls(run_folder.read_record(folder)["summary"])


def _asked_for(recipe: Recipe, checkpoint: Path | None) -> dict[str, str]:
    """What processes must have been told alike before they do anything together."""
    return {
        "the recipe": to_yaml(recipe),
        "the version of torch": torch.__version__.partition("+")[0],
        "the step to go on from": checkpoint.name if checkpoint else "none",
    }


def _tell_of_the_old(place: OutputPlace | None, folder: Path, listener: Emit | None) -> None:
    """Say that an earlier run has come back, where the one that was to replace it ended too early."""
    if place and place.brought_back:
        place.brought_back = False
        text = f"{folder} is the earlier run again: the one that was to replace it ended before it had saved anything"
        send(listener, events.note(text))


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: dotted keys, plain values."""
    values = flat(recipe.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
