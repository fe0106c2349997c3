"""Texts become vectors, so that what belongs together lies close together.

What it does
    A query and the passage that answers it are drawn together, and all other passages of the batch are pushed away. The
    vector of a text is the mean, the first or the last of its hidden states, as the base's own sentence-transformers
    files say. The run's folder is one that sentence-transformers loads.

When to use it
    For search, retrieval and clustering in your own domain, with an encoder such as MiniLM, BGE or E5, or a decoder.

Reference
    Reimers and Gurevych, Sentence-BERT (arXiv 1908.10084); the losses are those of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.config.options import options
from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Example
from dynlora_cli.tasks import task
from dynlora_cli.tasks.embedding.encoder import RelatedEncoder
from dynlora_cli.tasks.embedding.files import own_dimension, own_reading, write_reading
from dynlora_cli.tasks.embedding.judge import OF_SCORES, VectorJudge
from dynlora_cli.tasks.embedding.pooling import Reading
from dynlora_cli.tasks.embedding.reading import reading_of
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_MODEL = "AutoModel"
TASK_TYPE = "FEATURE_EXTRACTION"
OWNS_TASK_TYPE = True
FORMS = ("Related", "Graded")
TARGET = "row"
LOADS_WITH = "SentenceTransformer"
SILENT = "it makes vectors of texts"
WITHOUT = ("pooler",)  # vectors are made of hidden states, so nothing would ever reach it
OPTIONS = {
    "loss": {
        "type": "choice",
        "choices": ["auto", "mnrl", "triplet", "cosent", "cosine"],
        "default": "auto",
        "help": "What is lowered; auto: mnrl (in-batch negatives) for pairs and triplets, cosent for scored pairs.",
    },
    "scale": {"type": "float", "default": 20.0, "above": 0, "help": "Of mnrl and cosent: 1 / temperature."},
    "margin": {"type": "float", "default": 5.0, "above": 0, "help": "Of triplet: how much nearer the right one is."},
    "pooling": {
        "type": "choice",
        "choices": ["auto", "mean", "cls", "last", "max"],
        "default": "auto",
        "help": "Which hidden states make a vector; auto: as the base's files say, else mean, last for a decoder.",
    },
    "normalize": {
        "type": "bool",
        "default": None,
        "help": "Vectors have length 1; null: as the base's files say, else true.",
    },
    "query_prompt": {"type": "str", "default": None, "help": "Put before every query; null: as the base's files say."},
    "passage_prompt": {
        "type": "str",
        "default": None,
        "help": "Put before every passage; null: as the base's files say.",
    },
    "mini_batch_size": {
        "type": "int",
        "default": None,
        "at_least": 1,
        "help": "Texts encoded at a time, so that a large micro_batch_size fits into memory (GradCache); null: all.",
    },
}
CONFLICTS = [
    {
        "with": "pruning.policy",
        "is": "retrieval",
        "why": "it weighs rows one by one, and rows of a batch are each other's negatives here",
    },
]


class Task(task.Task):
    """Each row is one target: its passage among those of the batch."""

    measured = frozenset({"loss", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "spearman"})
    why_measured = "the rows are texts that belong together"

    def encoder(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> Encoder:
        reading, says = reading_of(self.options, max_length)
        longest = min(max_length, reading.longest or max_length)
        return RelatedEncoder(tokenizer, train_on, longest, reading, partial(self._judge, reading), says)

    def _judge(self, reading: Reading, scored: bool) -> VectorJudge:
        """What judges rows with or without scores; ValueError: the loss of the recipe is for the others."""
        name = self._option("loss")
        if name == "auto":
            name = "cosent" if scored else "mnrl"
        if (name in OF_SCORES) != scored:
            raise ValueError(f"model.loss {name} is for pairs {'without' if scored else 'with'} a score")
        return VectorJudge(reading, name, *map(self._option, ("scale", "margin", "mini_batch_size")))

    def _option(self, key: str) -> Any:
        """A key of the recipe's section; its default for an adapter of another tool, which has no recipe."""
        return getattr(self.options, key, options("tasks", self.name)[key].default)

    def beside(self, folder: Path, model: PreTrainedModel, longest: int | None) -> None:
        reading, _ = reading_of(self.options, longest)
        write_reading(folder, reading, int(model.config.get_text_config().hidden_size))

    def carry(self, sources: Sequence[Path], folder: Path) -> None:
        for source in sources:
            if (found := own_reading(source)) is not None:
                write_reading(folder, found, own_dimension(source))
                return

    def held_out(self, loss: float, accuracy: float) -> dict[str, float]:  # noqa: ARG002
        return {}

    def metrics(self, sums: RowSums, examples: Sequence[Example], classes: int) -> dict[str, Any]:  # noqa: ARG002
        return dict(sums.beside)
