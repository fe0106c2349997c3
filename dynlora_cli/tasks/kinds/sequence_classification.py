"""A text, or a pair of texts, gets one of several classes.

What it does
    The model's output layer is one number for each class. A model that has such a layer for the classes of the rows
    keeps it; others get a new one, which trains whole and is saved with the adapter.

When to use it
    For sentiment, topics, intents, or whether one text follows from another.

Reference
    transformers' AutoModelForSequenceClassification; PEFT's task type SEQ_CLS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynlora_cli.data.encode import ClassEncoder
from dynlora_cli.data.examples import Example
from dynlora_cli.tasks import task
from dynlora_cli.tasks.scores import RowSums, classification, confusion

AUTO_MODEL = "AutoModelForSequenceClassification"
TASK_TYPE = "SEQ_CLS"
OWNS_TASK_TYPE = True
NEW_TOKENS = True
FORMS = ("Labelled",)
HAS_CLASSES = True
TARGET = "row"
SILENT = "it names classes"


class Task(task.Task):
    """Each row is one target: its class."""

    encodes_with = ClassEncoder
    needs_choices = True
    measured = frozenset({"loss", "accuracy", "f1", "matthews"})
    why_measured = "the rows are texts with a class"

    def held_out(self, loss: float, accuracy: float) -> dict[str, float]:  # noqa: ARG002
        return {"accuracy": accuracy}

    def metrics(self, sums: RowSums, examples: Sequence[Example], classes: int) -> dict[str, Any]:
        assert sums.predicted_R is not None
        truth_R = np.array([example.label_ids[0] for example in examples])
        return classification(confusion(truth_R, sums.predicted_R, classes))
