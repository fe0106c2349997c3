"""A query and a passage get a score: how well the one answers the other.

What it does
    The model reads both texts at once and gives one number. It learns the score of the rows, from 0 to 1, by binary
    cross-entropy. The run's folder is one that sentence-transformers loads as a CrossEncoder.

When to use it
    To put the first passages that a model of vectors has found in a better order.

Reference
    Nogueira and Cho, Passage Re-ranking with BERT (arXiv 1901.04085); sentence-transformers' BinaryCrossEntropyLoss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Example
from dynlora_cli.tasks import task
from dynlora_cli.tasks.embedding.files import own_length, write_cross_encoder
from dynlora_cli.tasks.embedding.reranking import ScoredEncoder
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_MODEL = "AutoModelForSequenceClassification"
TASK_TYPE = "SEQ_CLS"
FORMS = ("Graded",)
OUTPUTS = ("LABEL_0",)
TARGET = "row"
LOADS_WITH = "CrossEncoder"
SILENT = "it scores pairs of texts"
CONFLICTS = [
    {"with": "adapter.init_weights", "is": "eva", "why": "no token carries loss"},
]


class Task(task.Task):
    """Each row is one target: its score."""

    measured = frozenset({"loss", "spearman"})
    why_measured = "the rows are pairs of texts with a score"

    def encoder(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> Encoder:
        return ScoredEncoder(tokenizer, train_on, max_length)

    def beside(self, folder: Path, model: PreTrainedModel, longest: int | None) -> None:  # noqa: ARG002
        write_cross_encoder(folder, longest)

    def carry(self, sources: Sequence[Path], folder: Path) -> None:
        write_cross_encoder(folder, own_length(sources[0]))

    def held_out(self, loss: float, accuracy: float) -> dict[str, float]:  # noqa: ARG002
        return {}

    def metrics(self, sums: RowSums, examples: Sequence[Example], classes: int) -> dict[str, Any]:  # noqa: ARG002
        return dict(sums.beside)
