"""Healing under the adapter before the cut: what it says of the rows counts beside what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from dynlora_cli import plugins
from dynlora_cli.tasks.distillation import Told

if TYPE_CHECKING:
    from torch import nn

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.data.batches import Batch


class Teacher(NamedTuple):
    """The adapter before the cut, and its share of the loss (tasks/distillation.py)."""

    adapter: Adapter
    share: float


NOT_BY_TOKEN = "--teacher: these rows are not learned token by token"


def learns_tokens(task: str, objective: str = plugins.OBJECTIVE) -> bool:
    """Whether a task of this name has tokens for targets, and their cross-entropy for loss."""
    return objective == plugins.OBJECTIVE and plugins.target(task, objective) == "token"


def ask(model: nn.Module, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager[None]]) -> Told:
    """What the model says of rows; the batches are not packed."""
    told = Told()
    for batch in batches:
        with autocast():
            told.learn(model, batch)
    return told
