"""What does rank control cost? Observing, events and their measured losses as a share of a run of 1,000 steps.

    python scripts/bench/control.py              # 3 rounds of each budget, appended to control.jsonl, table to stdout
    python scripts/bench/control.py --table      # only the table of what is there

A real run of `dynlora train` in this process, on the Llama of hidden size 512 of shrink.py, 512 tokens a step, from
twice the budget, with a clock around `RankControl.observe`; events tell their own seconds (with the turn into the SVD
basis, the optimizer's moments, and the loss on a few rows before and after). A short run has all the events; its medians are
scaled to the recipe's defaults over 1,000 steps: 250 observed steps and 20 events. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cost import RECIPE
from shrink import make_model

from dynlora_cli.commands import train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.pruning.control import RankControl

RESULTS = Path(__file__).with_suffix(".jsonl")
BUDGETS = (4, 16)
STEPS, OBSERVED, EVENTS = 1000, 250, 20


class Clock:
    """Seconds of every call of a method, which it takes the place of."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name, self.inner = owner, name, getattr(owner, name)
        self.seconds: list[float] = []

    def __enter__(self) -> Clock:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = self.inner(*args, **options)
            self.seconds.append(time.perf_counter() - started)
            return found

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.inner)


def measure(work: Path, budget: int) -> dict[str, Any]:
    """Medians of one short run: a step, an observation, an event."""
    text, path = RECIPE, work / "recipe.yaml"
    for key, value in {"MODEL": work / "model", "BUDGET": budget, "STEPS": 60, "OUT": work / "out"}.items():
        text = text.replace(key, str(value))
    path.write_text(text)
    events: list[dict[str, Any]] = []
    recipe = load_recipe(path, ["train.log_steps=1", "pruning.events=10"])
    with Clock(RankControl, "observe") as observing:
        train.run(recipe, overwrite=True, listener=events.append)
    pruned = [event["seconds"] for event in events if event["event"] == "prune"]
    observed = sorted(observing.seconds)[-15:]  # steps outside of the window cost nothing
    step = [event["step_seconds"] for event in events if event["event"] == "train"]
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"step": median(step), "observe": median(observed), "event": median(pruned)}
    return {"budget": budget, **facts, **found}


def share(found: dict[str, Any]) -> float:
    control = OBSERVED * found["observe"] + EVENTS * found["event"]
    return control / (STEPS * found["step"])


def table() -> str:
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [
        "| budget | step, ms | observe, ms | event with its losses, ms | share of 1,000 steps |",
        "|---|---|---|---|---|",
    ]
    for budget in sorted({record["budget"] for record in records}):
        here = [record for record in records if record["budget"] == budget]
        times = [1000 * median(record[key] for record in here) for key in ("step", "observe", "event")]
        shares = [share(record) for record in here]
        cells = [*(f"{t:.1f}" for t in times), f"{median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})"]
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder) / "model")
            for _ in range(args.rounds):
                for budget in BUDGETS:
                    record = measure(Path(folder), budget)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    print(table())


if __name__ == "__main__":
    main()
