"""The lines of text.jsonl, and under which texts a method is measured: see text.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import text_tasks
from text_runs import Record, score
from text_tables import page
from text_tasks import KEPT_BACK, NONSENSE, described, read, seen, tasks, write

from dynlora_cli.errors import MeasureError

RESULTS = Path(__file__).with_name("text.jsonl")
STEPS, PILOT = 1500, 200  # of what learns all tasks at once; and to find a learning rate
RATES = (1e-3, 3e-3)
KEY = ("method", "condition", "seed", "rate", "part")
TEXTS: dict[str, Callable[[str], Sequence[str]]] = {
    "seen": lambda task: tasks()[task].seen[:KEPT_BACK],
    "kept back": lambda task: tasks()[task].kept_back,
    "shuffled": text_tasks.shuffled,
    "random": lambda task: [*text_tasks.random_words(task, 1), NONSENSE[len(task) % len(NONSENSE)]],
}


def found_rate(
    run: Callable[[int, float], Path], loss: Callable[[Path], float], rates: Sequence[float] = RATES
) -> float:
    """The rate with the lowest loss on validation rows of seen tasks, of runs of PILOT steps.

    Args:
        run: trains so many steps at a rate, and returns the run's folder.
        loss: of such a folder.
        rates: to choose from.
    """
    if len(rates) == 1:
        return rates[0]
    losses = dict.fromkeys(rates, math.inf)
    for rate in rates:
        with suppress(MeasureError):  # diverged: a rate too far
            losses[rate] = loss(run(PILOT, rate))
    print(losses, flush=True)
    return min(losses, key=losses.__getitem__)


class Bench:
    """Runs what is not in text.jsonl yet, and appends it."""

    def __init__(self, work: Path, results: Path = RESULTS) -> None:
        self.work, self.results = work, results

    def lines(self) -> list[Record]:
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]

    def has(self, line: Record) -> bool:
        return any(all(line[key] == other[key] for key in KEY) for other in self.lines())

    def add(self, line: Record) -> None:
        line |= {"date": time.strftime("%Y-%m-%d")}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line)[:300], flush=True)

    def rate_of(self, method: str) -> float | None:
        """The rate that a method has been measured with; other seeds take it."""
        return next((line["rate"] for line in self.lines() if line["method"] == method), None)

    def rows(self, task: str, part: str) -> Path:
        return self.work / "tasks" / task / f"{part}.jsonl"

    def measured(
        self,
        line: Record,
        adapter: Callable[[str, int], Any],
        asked: Callable[[str, int], Path] | None = None,
    ) -> None:
        """Measure a method on all tasks, with seen descriptions on those that have any, and write its line, unless it is there.

        Args:
            line: the keys of KEY, and what else is to be told.
            adapter: the adapter for a task and a half of its test rows; None: the base alone.
            asked: the file of rows of a task and half; None: the test rows as they are.
        """
        line = {"rate": 0.0, "part": "test", "seed": 0, **line}
        if self.has(line):
            return
        found: dict[str, list[float]] = {}
        for task in seen() if line["condition"] == "seen" else tasks():
            sums = [
                score(asked(task, half) if asked else self.rows(task, f"test-{half}"), self.work, adapter(task, half))
                for half in range(KEPT_BACK)
            ]
            total = sums[0] + sums[1]
            found[task] = [round(total.loss, 3), *total[1:]]
        self.add(line | {"tasks": found})

    def asked(self, condition: str, task: str, half: int) -> Path:
        """Test rows with a description in the prompt."""
        path = self.work / "described" / condition.replace(" ", "-") / task / f"test-{half}.jsonl"
        text = [TEXTS[condition](task)[half]]
        return path if path.exists() else write(path, described(read(self.rows(task, f"test-{half}")), text, 0))

    def write_page(self) -> None:
        self.results.with_suffix(".md").write_text(page(self.lines()), encoding="utf-8")
