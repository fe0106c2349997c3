"""`dynlora library calibrate`: which update helps on what, learned. `calibrate` is the table of contents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.builtin import rows as stdlib_docs
from dynlora_cli.data.examples import Example
from dynlora_cli.data.sources import BUILTIN
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation.requests import RequestTexts
from dynlora_cli.evaluation.rows import held_out_rows
from dynlora_cli.files.whole import remove, write_text
from dynlora_cli.library.calibration import require
from dynlora_cli.library.features import Floats
from dynlora_cli.library.find import Finder
from dynlora_cli.library.keys import Keys
from dynlora_cli.library.learn import UNRELATED, Calibration, Measured, learn, to_measure
from dynlora_cli.library.library import REPORT, Entry, library_for_writing
from dynlora_cli.library.loaded import Loaded, load, names_of
from dynlora_cli.library.losses import RowLosses
from dynlora_cli.library.report import page
from dynlora_cli.text import counted, percent

Tell = Callable[[str], None]
T = TypeVar("T")
QUIET = 0.5  # share of the updates' own requests that are answered by one; a person is told where it is less


@dataclass(frozen=True)
class Wanted:
    """What a person says of a calibration.

    Attributes:
        unrelated: a file of requests that no update is about: rows, or a .txt file with a request on each line.
        rate: of false activations that may be.
        at_most: updates active for one request.
        rows: held-out rows of each update, and unrelated ones, at most.
        base: the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run.
    """

    unrelated: Path | None = None
    rate: float = 0.01
    at_most: int = 1
    rows: int = 200
    base: str | None = None
    trust_remote_code: bool = False


@dataclass
class Requests:
    """Requests of known origin.

    Attributes:
        texts: of the requests.
        origins: the update that each belongs to, by number; -1: none.
        examples: whole rows of the updates, which come first.
        notes: for the person.
    """

    texts: list[str] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def groups(self) -> NDArray[np.int64]:
        """[Q]: the same number for requests with the same text."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        return np.array([numbers[text] for text in self.texts])


def calibrate(root: Path, wanted: Wanted, tell: Tell) -> tuple[Calibration, list[str]]:
    """Measure, learn, and write what was learned into library.json and report.html.

    Args:
        root: the library's folder.
        wanted: what the person says.
        tell: takes a line for each part that begins.

    Returns:
        What was learned, and notes for the person.

    Raises:
        DynloraError: with the exit code that fits.
    """
    require()
    loaded = load(root, wanted.base, wanted.trust_remote_code)
    entries = [entry for entry in loaded.library.entries if entry.held_out]
    silent = [entry for entry in loaded.library.entries if not entry.held_out]
    if not entries:
        raise UsageError(f"no update of {root} has held-out rows, so nothing can be learned", "add updates with rows")
    requests = _requests(loaded, entries, wanted)
    if silent:
        requests.notes.append(f"without held-out rows, and so never active: {names_of(silent)}")
    finder = Finder(entries, loaded.encoder)
    found = finder.find(requests.texts)
    origin_Q = np.array(requests.origins)
    tell(f"{counted(len(origin_Q), 'request')}, {int((origin_Q == UNRELATED).sum()):,} of them unrelated")
    gain_QE = _gains(loaded, entries, requests, to_measure(found.scores_QE, origin_Q), tell)
    names = tuple(entry.name for entry in entries)
    measured = Measured(names, origin_Q, requests.groups(), found.scores_QE, found.overlap_QE, gain_QE)
    learned = learn(measured, rate=wanted.rate, at_most=wanted.at_most, others_count=wanted.unrelated is None)
    requests.notes += _said_of(learned, wanted)
    _keep(root, loaded, learned, requests.notes)
    return learned, requests.notes


def _requests(loaded: Loaded, entries: Sequence[Entry], wanted: Wanted) -> Requests:
    """Held-out rows of all updates, and requests that are about none of them."""
    requests = Requests()
    for number, entry in enumerate(entries):
        rows = loaded.held_out(entry)
        for row in rows[: wanted.rows]:
            requests.texts.append(row.text)
            requests.origins.append(number)
            requests.examples.append(row.example)
        if len(rows) > wanted.rows:
            requests.notes.append(f"{entry.name}: {wanted.rows} of its {len(rows)} held-out rows were used")
    own = {*requests.texts, *(text for entry in entries for text in Keys.of(entry).texts)}
    strangers = _unrelated(loaded, entries, wanted, requests.notes)
    kept = [text for text in strangers if text.strip() and text not in own]
    if len(kept) < len(strangers):
        requests.notes.append(
            f"{counted(len(strangers) - len(kept), 'unrelated request')} left out: empty or an update's"
        )
    if not kept and (wanted.unrelated or len(entries) < 2):
        where = f" in {wanted.unrelated}" if wanted.unrelated else ""
        why = f": all {len(strangers)} are empty or an update's own" if strangers else ""
        raise UsageError(
            f"there is no unrelated request to learn from{where}{why}", "name a file of some with --unrelated FILE"
        )
    requests.texts += kept
    requests.origins += [UNRELATED] * len(kept)
    return requests


def _unrelated(loaded: Loaded, entries: Sequence[Entry], wanted: Wanted, notes: list[str]) -> list[str]:
    """Requests that no update is about; their answers are of no use here."""
    path = wanted.unrelated
    if path is None:
        trained_on = any(origin.path == BUILTIN for entry in entries for origin in entry.sources)
        others = ["requests of other updates"] if len(entries) > 1 else []
        sets = [*others, *([] if trained_on else [f"rows of {BUILTIN}"])]
        notes.append(
            f"unrelated requests are {' and '.join(sets)}: the rate of false activations is a promise for such "
            "requests; --unrelated FILE makes it one for yours"
        )
        return [] if trained_on else _drawn([row["prompt"] for row in stdlib_docs("train")], wanted.rows)
    if path.suffix.lower() == ".txt":
        return _drawn(_lines(path), wanted.rows)
    rows = held_out_rows(loaded.first, loaded.place, loaded.tokenizer, path, passages=False, plain=True)
    notes += rows.notes
    texts = RequestTexts(loaded.tokenizer)
    return [texts.of(example) for example in _drawn(rows.examples, wanted.rows)]


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"--unrelated {path} cannot be read: {error}", "save it as UTF-8 text") from None
    return [line.strip() for line in lines if line.strip()]


def _drawn(items: Sequence[T], most: int) -> list[T]:
    """At most so many, drawn by lot, the same ones each time."""
    return list(items) if len(items) <= most else random.Random(0).sample(list(items), most)


def _gains(
    loaded: Loaded, entries: Sequence[Entry], requests: Requests, wanted_QE: NDArray[np.bool_], tell: Tell
) -> Floats:
    """[Q, E]: by how much each wanted update lowers the loss of each request, nats; NaN where it was not measured."""
    measured = len(requests.examples)
    losses = RowLosses(loaded.base, requests.examples)
    gain_QE = np.full(wanted_QE.shape, np.nan)
    tell("measuring the base")
    base_R = losses.of(None, "the base")
    for column, entry in enumerate(entries):
        tell(f"measuring {entry.name} ({column + 1} of {len(entries)})")
        own_R = losses.of(loaded.adapter(entry.name), entry.name, wanted_QE[:measured, column])
        gain_QE[:measured, column] = base_R - own_R
    return gain_QE


def _said_of(learned: Calibration, wanted: Wanted) -> list[str]:
    """What a person should know about the result."""
    limit, quality, notes = learned.threshold, learned.quality, []
    if not limit.promised:
        needed = int(np.ceil(1 / wanted.rate)) - 1 if wanted.rate > 0 else None
        more = f"{needed:,} would do" if needed else "no number would do"
        notes.append(
            f"a rate of {percent(wanted.rate)} cannot be promised by {counted(limit.requests, 'unrelated request')} "
            f"({more}): the strictest threshold is taken"
        )
    active = quality["at_threshold"]["active"]
    if active < QUIET:
        notes.append(
            f"quiet: {percent(active)} of the updates' own held-out requests would be answered by an update, the rest "
            f"by the base; {_louder(quality, wanted)}"
        )
    if quality["helped"] in (0.0, 1.0):
        always = "always" if quality["helped"] else "never"
        notes.append(f"updates {always} lowered the loss, so confidence is the same for all; the score alone decides")
    return notes


def _louder(quality: dict[str, Any], wanted: Wanted) -> str:
    """What makes updates speak more often, at what price."""
    rate = f"a higher --false-activation than {percent(wanted.rate)} lets more of them pass"
    if wanted.unrelated or len(quality["requests"]) < 2:
        return rate
    return (
        f"{rate}, and so does --unrelated FILE: then requests of one update no longer count as unrelated to the others"
    )


def _keep(root: Path, loaded: Loaded, learned: Calibration, notes: Sequence[str]) -> None:
    """Write library.json and report.html, unless the library has changed in the meantime.

    Raises:
        UsageError: it has.
    """
    with library_for_writing(root) as library:
        if library.entries != loaded.library.entries:
            raise UsageError(f"{root} was changed while it was calibrated", "calibrate again")
        report = page(root.resolve().name, learned, notes)
        remove(root / REPORT)  # that of an earlier calibration is never beside this one
        library.put_calibration(learned.as_dict())
        write_text(root / REPORT, report)
