"""What an objective is: a file in tasks/objectives, whose name is the one in recipes (`train.objective`).

Its class `Objective`, under the one below, says what training lowers. What is held out is measured as the task says,
unless the class is a `Judge` (data/examples.py) as well. Beside it may stand, as literals that are read without
importing the file:

FORMS = ("Preference",)
    The neutral forms (data/forms.py) that it learns from, in place of the task's.

TEACHES = "which of two answers is better"
    What is learned from such rows, for the comment that `dynlora init` writes.

TARGET = "pair"
    What a loss is the mean over, in words, in place of the task's.

UNIT = "z-scores"
    What its losses are in, where that is not nats: held-out losses, which stand beside them, are in nats all the same.

MEASURED = ("accuracy", "margin")
    The numbers that a `Judge` tells beside the loss.

LIBRARY = True
    It learns from the adapters of `adapter.library`; rows of the n-th source stand for the n-th of them.

RATE = 10.0
    Its usual learning rates as a multiple of those of `sft`.

OPTIONS, CONFLICTS
    Keys of the recipe's `train` section that come with it, and settings that it does not go with (config/options.py,
    config/conflicts.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dynlora_cli import plugins
from dynlora_cli.data.examples import Judge

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example


class Objective(ABC):
    """What training lowers.

    Args:
        options: the recipe's `train` section, with the objective's own keys.
    """

    tally: Any = None  # what `take` will tell of so far; to be put back where steps are taken back

    def __init__(self, options: Train) -> None:
        self.options = options

    def begin(self, trained: Any) -> None:  # noqa: B027 - most have no use for it
        """Called once before the first step, with what trains (lora/whole.py)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the targets of a batch, a scalar in fp32: training divides it by the targets of the step."""

    def take(self, total: Callable[..., list[float]]) -> dict[str, float]:  # noqa: ARG002
        """What was found beside the loss on the rows that were learned from, by name, since this was asked before.

        Args:
            total: sums numbers over processes; called by all together, or by none.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that goes on has to know; tensors for a checkpoint, under names that begin with the file's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have nothing to load
        """Go on from a checkpoint, in which there are tensors of others as well."""


def hang(objective: Objective, examples: Iterable[Example]) -> None:
    """Let rows be judged by an objective that says itself how good a model is on them; others leave them alone."""
    if isinstance(objective, Judge):
        for example in examples:
            example.judge = objective  # type: ignore[misc]  # a slot of whichever class it is


def of(options: Train) -> Objective:
    """The objective that a recipe's `train` section names."""
    name = getattr(options, "objective", plugins.OBJECTIVE)
    objective: Objective = plugins.load("objectives", name).Objective(options)
    return objective


def begun(options: Train, trained: Any) -> Objective:
    """The same, which has been told what trains (lora/whole.py)."""
    objective = of(options)
    objective.begin(trained)
    return objective
