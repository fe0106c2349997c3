"""What a task is: a file in tasks/kinds, whose name is the one in recipes (`model.task`), with these names.

AUTO_MODEL = "AutoModelForCausalLM"
    The class of transformers that loads the model.

TASK_TYPE = "CAUSAL_LM"
    What PEFT calls the task. Adapters of other tools with it are read as this task where OWNS_TASK_TYPE = True.

FORMS = ("Turns", "Pair", "Plain")
    The neutral forms (data/forms.py) that it learns from. Every format that gives one of them serves the task.

HAS_CLASSES, PACKS
    True where the model has a head for classes; where several examples can share a line of a batch.

TARGET = "row"
    What a loss is the mean over, in words; by default token.

LOSS_IN = "squared error"
    What a loss is in, where that is not nats.

DRAWS = True
    A model of the task draws: `Task.draw` shows what it has learned while it trains.

SILENT = "it names classes"
    Of a model that writes no text: what it does in place of that.

OUTPUTS = ("LABEL_0",)
    Names of the outputs of a head that is not for classes.

LOADS_WITH = "SentenceTransformer"
    The class of sentence-transformers that loads what a run writes.

WITHOUT = ("pooler",)
    Modules of the model that the task has no use for; they are not loaded.

OPTIONS, CONFLICTS
    Optional: keys of the recipe's `model` section that come with the task, and settings that it does not go with
    (config/options.py, config/conflicts.py).

Task
    A class under the one below: how rows become tokens, and which numbers say how good a model is.

The literals are read without importing the file, which may import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dynlora_cli import plugins
from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.forms import PREFERRING, Grounded, Judged
from dynlora_cli.data.grounded import LAYOUT, GroundedEncoder
from dynlora_cli.data.preferences.encoder import PreferenceEncoder
from dynlora_cli.tasks.scores import RowSums, means_of, perplexity

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Model, Train
    from dynlora_cli.data.encode import Encoder
    from dynlora_cli.data.examples import Example


@dataclass(frozen=True)
class Beginning:
    """What `Task.prepare` is given.

    Attributes:
        model: as it is without what trains.
        tokenizer: of it.
        examples: rows to train on.
        folder: of the run.
        seed: of the run.
        rows: of a micro-batch.
        part: the number of this process, and how many there are.
        goes_on: steps of the run were done before.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Any]
    folder: Path
    seed: int
    rows: int
    part: tuple[int, int]
    goes_on: bool


class Task:
    """What a model is trained to do; by default to continue texts.

    Args:
        options: the recipe's `model` section, with the task's own keys.
        train: the recipe's `train` section; None: the objective is the one that every task has.

    Attributes:
        name: in recipes.
        objective: what is learned from the rows, as in recipes.
        layout: how a context stands before a question, where rows have one.
        forms: names of the neutral forms that it learns from: the objective's, where that has forms of its own.
        has_classes: the model has a head for classes, which are numbered before training.
        outputs: names of what a head gives that is not for classes; None: there is no such head.
        measured: the numbers that `metrics` gives, and the loss.
        why_measured: why it is those and no others.
        needs_choices: `metrics` looks at what the model chose for each target.
    """

    encodes_with: ClassVar[type[Encoder]] = TextEncoder
    needs_choices: ClassVar[bool] = False
    measured: ClassVar[frozenset[str]] = frozenset({"loss", "token_accuracy"})
    why_measured: ClassVar[str] = "no answers are generated"

    def __init__(self, options: Model, train: Train | None = None) -> None:
        self.options = options
        self.name = options.task
        self.objective: str = getattr(train, "objective", plugins.OBJECTIVE)
        self.layout: str = getattr(train, "context_layout", LAYOUT)
        own = plugins.declared("tasks", self.name, "FORMS")
        self.forms: tuple[str, ...] = plugins.declared("objectives", self.objective, "FORMS", own)
        outputs = plugins.declared("tasks", self.name, "OUTPUTS")
        self.outputs: list[str] | None = list(outputs) if outputs else None
        self.has_classes = bool(plugins.declared("tasks", self.name, "HAS_CLASSES"))

    @property
    def tells(self) -> frozenset[str]:
        """The numbers that `metrics` gives, and the loss: those of the objective, where that has forms of its own."""
        of_objective = plugins.declared("objectives", self.objective, "MEASURED")
        return frozenset({"loss", *of_objective}) if of_objective else self.measured

    def like(self, train: Train | None) -> Task:
        """The same task, for the objective of another run; None: for that which every task has."""
        return of(self.options, train)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> Encoder:
        """Makes examples of rows in their neutral forms.

        Args:
            tokenizer: of the model.
            train_on: the recipe's `dataset.train_on`.
            max_length: tokens of the longest example.
        """
        if Grounded.__name__ in self.forms:
            return GroundedEncoder(tokenizer, train_on, max_length, layout=self.layout)
        if PREFERRING & set(self.forms):
            pairs = Judged.__name__ not in self.forms
            return PreferenceEncoder(tokenizer, train_on, max_length, pairs=pairs)
        return self.encodes_with(tokenizer, train_on, max_length)

    def beside(self, folder: Path, model: PreTrainedModel, longest: int | None) -> None:
        """Write what others need beside an adapter, or a merged model, to use it for this task; by default nothing.

        Args:
            folder: of the adapter.
            model: with or without it; its structure is enough.
            longest: tokens of the longest example; None: nobody knows.
        """

    def carry(self, sources: Sequence[Path], folder: Path) -> None:
        """Write the same beside a merged model: as it is in the first of some folders where it is; by default nothing.

        Args:
            sources: folders of the adapter and of its base.
            folder: of the merged model.
        """

    def prior(self, rows: int) -> tuple[dict[str, Any] | None, list[str]]:  # noqa: ARG002
        """What is to be learned beside the rows so that the model keeps it: for the record, and notes for people.

        Args:
            rows: of an optimizer step.

        Returns:
            By default None, and no notes.
        """
        return None, []

    def prepare(self, given: Beginning) -> Iterator[tuple[str, int, int]]:  # noqa: ARG002
        """Make what is needed of the model before the first step, and put it to the examples; by default nothing.

        Yields:
            What is made, how much of it is there, and of how many: now and then, so that somebody can tell of it and
            stop it; in all processes as often.
        """
        yield from ()

    def draw(
        self, model: PreTrainedModel, examples: Sequence[Any], step: int, folder: Path, seed: int
    ) -> list[dict[str, Any]]:
        """What the model draws for a few rows while it trains; asked of tasks that set DRAWS.

        Args:
            model: as it is now.
            examples: rows of the run.
            step: optimizer steps done.
            folder: of the run, where pictures go.
            seed: of the run.

        Returns:
            Of each row what the event `samples` has (runs/events.py).
        """
        raise NotImplementedError

    def held_out(self, loss: float, accuracy: float) -> dict[str, float]:  # noqa: ARG002
        """What is told beside the held-out loss while a model trains.

        Args:
            loss: nats per target.
            accuracy: share of the targets that are the model's first choice.
        """
        return {"perplexity": perplexity(loss)}

    def metrics(self, sums: RowSums, examples: Sequence[Example], classes: int) -> dict[str, Any]:  # noqa: ARG002
        """What `dynlora eval` tells beside the loss and what is generated.

        Args:
            sums: of a model on every row.
            examples: the rows, in the same order.
            classes: of the model's head; 0 where it has none.
        """
        if sums.numbers:
            return means_of(sums.numbers)
        return {"perplexity": perplexity(sums.loss), "token_accuracy": sums.accuracy}


def of(options: Model, train: Train | None = None) -> Task:
    """The task that a recipe's `model` section names, for the objective of its `train` section."""
    task: Task = plugins.load("tasks", options.task).Task(options, train)
    return task
