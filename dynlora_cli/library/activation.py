"""Which update speaks on a request: an update whose evidence passes the threshold, else the base alone.

    1. The best few updates by score are candidates.
    2. Those whose evidence (log-odds of the confidence) is above the calibrated threshold pass.
    3. Two that pass are in conflict where their nearest keys are nearly the same: both speak of one thing, and the
       newer one is taken. Of equally old ones, the one with more evidence.
    4. At most k are active, those with the most evidence; their sum is what the model computes with.

Gates are 0 or 1: an update is on as it was trained, or it is off. A decision depends on the text of the request, the
keys and the calibration, and on nothing else. An update that the calibration has not seen is never active.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import fits
from dynlora_cli.library.features import Floats
from dynlora_cli.library.find import Finder, Found
from dynlora_cli.library.learn import Calibration, CalibrationForm
from dynlora_cli.library.library import LIBRARY, Library
from dynlora_cli.retrieval.encoders import Encoder

SAME_KEY = 0.9  # cosine from which two keys are taken to speak of one thing
AGAIN = "dynlora library calibrate"


@dataclass(frozen=True)
class Decision:
    """What is active on one request, and why.

    Attributes:
        chosen: names of the active updates, the newest first; none: the base.
        confidence: by candidate, the best first: the calibrated probability that it helps, and of a router that knows
            no such thing what it goes by (routing/).
        reason: one sentence.
        key: text of the nearest key of the first candidate, and where it comes from; None where it has none.
        weights: of each chosen one; by default 1.
        by_token: the chosen ones may speak, and how much each does is decided on every token, in every layer.
    """

    chosen: tuple[str, ...]
    confidence: dict[str, float]
    reason: str
    key: tuple[str, str] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    by_token: bool = False

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", dict.fromkeys(self.chosen, 1.0))

    @property
    def mix(self) -> dict[str, float]:
        """Weights by name; {} is the base.

        Raises:
            ValueError: it is decided by token, so there is no one mix.
        """
        if self.by_token:
            raise ValueError("this is decided on every token: there is no one mix for the request")
        return dict(self.weights)


class Activator:
    """Decides on requests.

    Args:
        library: that was calibrated.
        encoder: of its keys.

    Attributes:
        notes: what a person should know, such as updates that are never active.

    Raises:
        UsageError: it was not calibrated, or an update that the calibration has seen is gone.
    """

    def __init__(self, library: Library, encoder: Encoder) -> None:
        self.calibration = calibration_of(library)
        known = [library.entry(name) for name in self.calibration.entries]
        self.finder = Finder(known, encoder)
        unseen = [entry.name for entry in library.entries if entry.name not in self.calibration.entries]
        self.notes = [
            f"{name} came after the calibration and is never active: {AGAIN} {library.root}" for name in unseen
        ]

    def decide(self, texts: Sequence[str]) -> list[Decision]:
        """A decision for each request."""
        if not texts:
            return []
        found = self.finder.find(texts)
        evidence_QE = self.calibration.judge.evidence(found.scores_QE, found.overlap_QE)
        evidence_QE[found.nearest_QE < 0] = -math.inf
        silent = Decision((), {}, "base: there is no request to go by")
        return [
            self._decide(found, row, evidence_E) if texts[row].strip() else silent
            for row, evidence_E in enumerate(evidence_QE)
        ]

    def _decide(self, found: Found, row: int, evidence_E: Floats) -> Decision:
        order = [int(update) for update in (-evidence_E).argsort(kind="stable") if evidence_E[update] > -math.inf]
        names = self.calibration.entries
        chances = self.calibration.judge.confidence.probability(evidence_E[order])
        confidence = {names[update]: float(chance) for update, chance in zip(order, chances, strict=True)}
        if not order:
            return Decision((), confidence, "base: no update has a key that this could be compared with")
        passing = [update for update in order if evidence_E[update] > self.calibration.threshold.evidence]
        kept, older = self._newest(passing, found, row)
        kept = kept[: self.calibration.at_most]
        about = kept[0] if kept else order[0]
        key = self.finder.key(about, int(found.nearest_QE[row, about]))
        chosen = sorted(kept, key=self._date, reverse=True)
        reason = self._reason(kept, order, older, confidence, evidence_E)
        return Decision(tuple(names[update] for update in chosen), confidence, reason, key)

    def _date(self, update: int) -> str:
        return self.finder.entries[update].date

    def _newest(self, passing: list[int], found: Found, row: int) -> tuple[list[int], dict[int, int]]:
        """Updates that pass without the older ones in conflict with them, and by whom each of those was replaced."""
        newest: list[int] = []
        older: dict[int, int] = {}
        for update in sorted(passing, key=self._date, reverse=True):  # stable: of equal dates, more evidence first
            rival = next((other for other in newest if self._same(found, row, other, update)), None)
            if rival is None:
                newest.append(update)
            else:
                older[update] = rival
        return [update for update in passing if update not in older], older

    def _same(self, found: Found, row: int, one: int, other: int) -> bool:
        keys = [(update, int(found.nearest_QE[row, update])) for update in (one, other)]
        return self.finder.likeness(keys[0], keys[1]) >= SAME_KEY

    def _reason(
        self, kept: list[int], order: list[int], older: dict[int, int], confidence: dict[str, float], evidence_E: Floats
    ) -> str:
        """One sentence."""
        names, limit = self.calibration.entries, self.calibration.threshold.evidence
        needed = "nothing is enough" if math.isinf(limit) else f"needed: more than {limit:.2f}"

        def said(update: int) -> str:
            return f"{names[update]}: confidence {confidence[names[update]]:.2f}, evidence {evidence_E[update]:.2f}"

        if not kept:
            return f"base: the most likely is {said(order[0])} ({needed})"
        parts = [f"{said(update)} ({needed})" for update in kept]
        parts += [f"newer than {names[old]} on the same key" for old, new in older.items() if new in kept]
        return "; ".join(parts)


def calibration_of(library: Library) -> Calibration:
    """What library.json says of the calibration.

    Raises:
        UsageError: nothing, or it is damaged or does not fit the library.
    """
    stored = library.calibration
    if stored is None:
        raise UsageError(
            f"{library.root} is not calibrated, so nobody knows which update helps when", f"{AGAIN} {library.root}"
        )
    calibration = fits(CalibrationForm, stored, library.root / LIBRARY).calibration()
    gone = set(calibration.entries) - {entry.name for entry in library.entries}
    if gone or not calibration.entries:
        what = f"has seen {', '.join(sorted(gone))}, which is not there" if gone else "has seen no update"
        raise UsageError(f"the calibration of {library.root} {what}", f"{AGAIN} {library.root}")
    return calibration
