"""Rows of earlier runs among those of a run, so that what they taught is not forgotten.

With a share of 5 %, one row in twenty of an epoch is one that an earlier run trained on: evenly from each of them, and
other ones in the next epoch. What an earlier run held out stays held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora_cli.data.examples import Classified, Example
from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.data.load import Data
from dynlora_cli.data.mix import Span, mix_notes
from dynlora_cli.data.preferences.examples import Compared, Rated
from dynlora_cli.data.rows.choice import shared
from dynlora_cli.data.rows.kept import PromptsOf
from dynlora_cli.data.rows.sequences import joined, numbers_of, renumbered, tokens_of
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import read_record
from dynlora_cli.text import counted, percent


@dataclass(frozen=True)
class Earlier:
    """An earlier run: its folder and its rows."""

    folder: Path
    data: Data

    @property
    def name(self) -> str:
        """Of the folder, for people."""
        return self.folder.resolve().name


def add_replay(data: Data, earlier: Sequence[Earlier], share: float) -> None:
    """Let rows of earlier runs come up between those of a run.

    Args:
        data: of the run; gets `replayed`, their spans, and what a record keeps of it.
        earlier: runs, oldest first.
        share: of the rows of an epoch, above 0 and below 1.

    Raises:
        UsageError: a run has other classes.
    """
    own = sum(span.draws for span in data.spans)
    draws = _dealt(max(len(earlier), round(own * share / (1 - share))), len(earlier))
    free = 1 + int(numbers_of(joined(data.train, data.val, data.sizing)).max())
    before, own_tokens = mix_notes(data.spans), _tokens(data)
    runs, replayed = [], []
    for run, count in zip(earlier, draws, strict=True):
        examples = renumbered(_learned(run, data), free)
        free += len(examples)
        data.replayed = joined(data.replayed, examples)
        replayed.append(run.data.prompts.get("train", PromptsOf()))
        data.spans.append(Span(f"{run.name}, replayed", len(examples), count, replayed=True))
        runs.append(_on_record(run, count))
    tokens = sum(run["tokens"] for run in runs)
    data.replay = {"share": share, "runs": runs}
    data.notes = [note for note in data.notes if note not in before]
    data.prompts["replayed"], held_out = sum(replayed, PromptsOf()), data.prompts.get("val", PromptsOf()).column()
    if count := shared(held_out, data.prompts["replayed"].column()):
        data.notes.append(f"{count} of {len(held_out)} validation rows have a prompt that is also in the replayed rows")
    data.notes += [_note(runs, sum(draws) / (own + sum(draws)), tokens / (own_tokens + tokens)), *mix_notes(data.spans)]


def _dealt(rows: int, runs: int) -> list[int]:
    """Rows for each run: all alike, and what is left over for the newest ones."""
    each, more = divmod(rows, runs)
    return [each + (at >= runs - more) for at in range(runs)]


def _kinds(data: Data) -> str:
    kinds: dict[type[Example], str] = {
        Compared: "compared answers",
        Rated: "judged answers",
        GroundedText: "questions about contexts",
    }
    return kinds.get(data.kind, "single answers or texts")


def _learned(run: Earlier, own: Data) -> Sequence[Example]:
    """The rows that a run trained on, with the numbers that their classes have now."""
    if run.data.stream:
        raise UsageError(
            f"the run in {run.folder} read its rows while it trained (dataset.streaming), and replayed rows are drawn "
            "among all of a run",
            "name some of its rows under dataset.train instead, with `rows`, and leave dataset.replay out",
        )
    if run.data.kind is not own.kind:
        raise UsageError(
            f"the run in {run.folder} learned from other rows: {_kinds(run.data)}, and these are {_kinds(own)}",
            "replay runs of the same train.objective, or leave dataset.replay out",
        )
    old, labels = run.data.labels, own.labels
    if sorted(old or ()) != sorted(labels or ()):
        raise UsageError(
            f"the run in {run.folder} was trained on the classes {', '.join(old or ())}, and these rows have "
            f"{', '.join(labels or ())}",
            "name a run with the same classes, or leave dataset.replay out",
        )
    if old and labels and old != labels:
        for example in run.data.train:
            assert isinstance(example, Classified)
            example.label = labels.index(old[example.label])
    return run.data.train


def _tokens(data: Data) -> float:
    """Tokens of an epoch of a run's own rows, on average."""
    total, start = 0.0, 0
    for span in data.spans:
        examples = data.train[start : start + span.rows]
        total += span.draws * tokens_of(examples) / span.rows
        start += span.rows
    return total


def _on_record(run: Earlier, draws: int) -> dict[str, Any]:
    examples = run.data.train
    return {
        "run": read_record(run.folder).get("run_id"),
        "name": run.name,
        "folder": str(run.folder.resolve()),
        "rows": len(examples),
        "draws": draws,
        "tokens": round(draws * tokens_of(examples) / len(examples)),
        "sha256": run.data.sha256,
    }


def _note(runs: Sequence[dict[str, Any]], rows: float, tokens: float) -> str:
    """`replay: 5.0 % of the rows of an epoch, 4.1 % of its tokens: 3 of the 200 rows of v1, 3 of the 80 of v2`."""
    parts = ", ".join(f"{run['draws']} of the {counted(run['rows'], 'row')} of {run['name']}" for run in runs)
    return f"replay: {percent(rows)} of the rows of an epoch, {percent(tokens)} of its tokens: {parts}"
