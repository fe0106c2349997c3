"""The events of a run: what each of them holds, and how they reach whoever listens.

Events are plain dicts, since most of them become a line of metrics.jsonl or rank_events.jsonl. They are made here,
except those of rank control (`gauge`, `prune` and `refused`, see pruning/control.py), whose keys come one after the
other:

    gauge      step, components, parameters, ranks, seconds
    prune      the same, and target_parameters, components_before, parameters_before, threshold, removed,
               predicted_loss_change, measured_loss_change; of early stopping also ended and held_out_loss
    refused    a `prune` that early stopping did not allow; nothing was removed
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Emit = Callable[[Event], None]


def note(text: str) -> Event:
    """A sentence for the person who runs the command."""
    return {"event": "note", "text": text}


def start(run: dict[str, Any], layers: Sequence[dict[str, Any]], notes: list[str], example: Any) -> Event:
    """A run begins: its facts, the layers with their components, notes on the data, and a row as the model sees it."""
    return {"event": "start", "run": run, "layers": layers, "notes": notes, "example": example}


def tick(seen: Mapping[str, float], alive: Mapping[str, int], tokens_per_second: float) -> Event:
    """An optimizer step is done; for the live view alone.

    Args:
        seen: loss and learning_rate.
        alive: step, and where there are components how many, and how many numbers.
        tokens_per_second: of this step.
    """
    return {"event": "tick", **seen, **alive, "tokens_per_second": tokens_per_second}


def train(alive: Mapping[str, int], metrics: Mapping[str, Any]) -> Event:
    """A line of metrics, over the steps since the last one; `alive` as in `tick`, metrics as in training/metrics.py."""
    return {"event": "train", **alive, **metrics}


def evaluation(step: int, result: Mapping[str, float], *, best: bool, seconds: float) -> Event:
    """A look at the held-out rows.

    Args:
        step: optimizer steps done.
        result: loss and tokens, and perplexity or accuracy.
        best: no look before had a lower loss.
        seconds: spent in steps so far.
    """
    return {"event": "eval", "step": step, **result, "best": best, "seconds": seconds}


def also(step: int, losses: Mapping[str, float]) -> Event:
    """A look at the rows of other kinds (`eval.also`), before training and at the end: loss by name of the set."""
    return {"event": "also", "step": step, "losses": dict(losses)}


def samples(step: int, answers: Sequence[Mapping[str, Any]]) -> Event:
    """What the model answers to a few held-out prompts.

    Args:
        step: optimizer steps done.
        answers: of each its prompt (its end, where it is long), what was expected, the answer, and whether it is right;
            where the answer is a picture, `picture` is its file, from the run's folder.
    """
    return {"event": "samples", "step": step, "samples": [dict(answer) for answer in answers]}


def checkpoint(step: int, path: Path) -> Event:
    """A checkpoint was written; the lines before it are on the disk."""
    return {"event": "checkpoint", "step": step, "path": str(path)}


def point(found: Mapping[str, Any]) -> Event:
    """A size that `dynlora prune` has measured: parameters, components, energy, loss."""
    return {"event": "point", **found}


def end(summary: dict[str, Any]) -> Event:
    """The run is done."""
    return {"event": "end", "summary": summary}


def send(listener: Emit | None, event: Event) -> None:
    """Hand an event to whoever listens, if anybody does; a terminal that has gone does not end the run."""
    if listener:
        try:
            listener(event)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
