"""A mode: one way in which the same training step is run, such as compiled, sharded or with checkpointing.

Modes are the files of execution/modes. A recipe switches one on by a key of its section `train`; `plan` makes one
object of all those, and training calls that object at fixed points, whatever the modes are:

    refuse       the devices are known, nothing has been read yet
    prepare      the base model is loaded and has no components yet
    apply        the components are in place, and nothing has run through them
    begin        optimizer, batches and rank control exist; the next pass is the run's first
    before_step  an optimizer step is next
    report       the last step is done

Whatever a mode changes, it changes through `patches`, which are undone when the run is over, well or badly.

What a file of execution/modes holds beside its class `Mode`, each of it optional and read without importing the file:

    KEY = "gradient_checkpointing"   the key of `train` that switches it on, if that is not the file's name
    ORDER = 30                       modes take turns by this number, then by name; 100 where it is missing
    ALWAYS = True                    it takes part even where its key is false, since it has to switch something off
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli import plugins
from dynlora_cli.models.patched import Patches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.config.sections import Train
    from dynlora_cli.lora.whole import Trained

LAST = 100


class Mode:
    """What modes are made of; each of them overrides the few methods that it needs.

    Args:
        train: this section of the recipe.
        patches: of the run; they undo at its end what the mode has changed.

    Attributes:
        changed: names of the modules that the mode has changed, for whoever wants to know.
        loads_on_host: the base is loaded into the host's memory, and `apply` brings it to the devices.
        keeps_casts: autocast may keep the casts of weights from one use to the next.
        even_batches: training batches are to have few different shapes.
        no_answers: why a model run so is not asked to write answers between steps (`eval.samples`), in words.
        in_short_runs: it also runs where there are few steps (healing) or none (a dry run, on the device "meta").
    """

    loads_on_host = False
    keeps_casts = True
    even_batches = False
    no_answers: str | None = None
    in_short_runs = True

    def __init__(self, train: Train, patches: Patches) -> None:
        self.train, self.patches = train, patches
        self.changed: list[str] = []

    def refuse(self, device: torch.device, processes: int) -> None:
        """Say what the machine lacks.

        Raises:
            DynloraError: this cannot run here; says what to change.
        """

    def prepare(self, model: PreTrainedModel) -> None:
        """Change the base model, or refuse it.

        Raises:
            DynloraError: the mode cannot run this model.
        """

    def apply(self, model: PreTrainedModel, trained: Trained) -> None:
        """Change the model with its components.

        Args:
            model: every process has the same.
            trained: the components, in a `Pool`; or a `WholeModel`, whose `layers` are empty.

        Raises:
            DynloraError: the mode cannot run this model.
        """

    def begin(
        self, model: PreTrainedModel, trained: Trained, forward: Callable[[], object], tell: Callable[[str], None]
    ) -> None:
        """Get ready for the first pass.

        Args:
            model, trained: as in `apply`.
            forward: runs the run's first batch through the model, without gradients.
            tell: leaves a note in the run's log, at any time from now on.
        """

    def before_step(self, step: int, passes_left: int) -> None:
        """An optimizer step is next.

        Args:
            step: its number, from 1.
            passes_left: forward passes from now until components change, or until the end.
        """

    def report(self) -> list[str]:
        """Notes for the run's log, at its end."""
        return []


class Modes(AbstractContextManager["Modes"]):
    """The modes of one run, in their order. Leaving the `with` block, or `close`, undoes what they have changed."""

    def __init__(self, modes: list[Mode], patches: Patches) -> None:
        self.modes, self.patches = modes, patches

    def __iter__(self) -> Iterator[Mode]:
        return iter(self.modes)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.patches.close()

    def for_short_runs(self) -> Modes:
        """Those that also take part in a dry run, of which one step is imagined."""
        return Modes([mode for mode in self if mode.in_short_runs], self.patches)

    @property
    def keeps_casts(self) -> bool:
        return all(mode.keeps_casts for mode in self)

    @property
    def even_batches(self) -> bool:
        return any(mode.even_batches for mode in self)

    @property
    def no_answers(self) -> list[str]:
        return [mode.no_answers for mode in self if mode.no_answers]

    def loads_to(self, device: torch.device) -> torch.device:
        """Where the base is loaded to, if it will compute on `device`; "meta", the structure alone, stays "meta"."""
        waits = any(mode.loads_on_host for mode in self) and device.type != "meta"
        return torch.device("cpu") if waits else device

    # What training calls, at the points that this file's docstring names; see `Mode` for each of them.

    def refuse(self, device: torch.device, processes: int) -> None:
        for mode in self:
            mode.refuse(device, processes)

    def prepare(self, model: PreTrainedModel) -> None:
        for mode in self:
            mode.prepare(model)

    def apply(self, model: PreTrainedModel, trained: Trained) -> None:
        for mode in self:
            mode.apply(model, trained)

    def begin(
        self, model: PreTrainedModel, trained: Trained, forward: Callable[[], object], tell: Callable[[str], None]
    ) -> None:
        for mode in self:
            mode.begin(model, trained, forward, tell)

    def before_step(self, step: int, passes_left: int) -> None:
        for mode in self:
            mode.before_step(step, passes_left)

    def report(self) -> list[str]:
        return [note for mode in self for note in mode.report()]


def plan(train: Train) -> Modes:
    """The modes that a recipe's `train` switches on; nothing is changed yet."""
    patches = Patches()
    return Modes([_load(name)(train, patches) for name in _names(train)], patches)


def without_long_runs(train: Train) -> dict[str, Any]:
    """Settings of `train` that switch off the modes which do not pay in a run of few steps."""
    return {plugins.switch(name): False for name in _names(train) if not _load(name).in_short_runs}


def _names(train: Train) -> list[str]:
    """Names of the modes that are on, in their order."""

    def turn(name: str) -> tuple[int, str]:
        return plugins.declared("modes", name, "ORDER", LAST), name

    names = sorted(plugins.names("modes"), key=turn)
    return [n for n in names if getattr(train, plugins.switch(n), False) or plugins.declared("modes", n, "ALWAYS")]


def _load(name: str) -> type[Mode]:
    return plugins.load("modes", name).Mode
