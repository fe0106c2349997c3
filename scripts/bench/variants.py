"""What are the variants worth? All of them on one budget in parameters, each at its best learning rate.

    python scripts/bench/variants.py             # loss on two tasks, 3 seeds, then time and memory; about 2 CPU hours
    python scripts/bench/variants.py --table     # only write variants.md again

Loss: the cells of quality.py (its design tasks e2e and svamp on a 3 M Llama, 200 steps, rate chosen on seed 0), in
variants.jsonl; `lora` is the default, which prunes from twice the budget, and the others do too where they can hold that
many. Time and memory: `dynlora train` as in cost.py, hidden size 512, the variants in turn, in variants_cost.jsonl.
A variant that is a new file in its folder is a new line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, median

from cost import train
from quality import read_results, run_cells
from quality_tables import choose, interval, paired, table
from shrink import make_model

from dynlora_cli import plugins

TASKS = ["e2e", "svamp"]
PARAMETERS = "40.4k"  # LoRA of rank 2 on the 3 M Llama
SEEDS, ROUNDS, STEPS = 3, 3, 60
RESULTS = Path(__file__).with_suffix(".jsonl")
COSTS = RESULTS.with_name("variants_cost.jsonl")
NAMES = [name for name in plugins.names("variants") if plugins.declared("variants", name, "has_components")]
FIRST = "lora"  # what the others are compared with
POLICY = {"adalora": " pruning.policy=sensitivity"}  # as its paper does


def method(name: str) -> str:
    """The variant as quality.py names a method."""
    return f"dynlora adapter.variant={name} rank.budget={PARAMETERS}{POLICY.get(name, '')}"


def measure_costs() -> None:
    """Append seconds and peak memory of every variant, `ROUNDS` times in turn."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        train(work, 4, 2)  # the first command of a machine reads files that later ones find in memory
        for number in range(ROUNDS):
            for name in NAMES[:: -1 if number % 2 else 1]:
                found = train(work, 4, STEPS, f"adapter.variant={name}")
                with COSTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"variant": name, "round": number, **found}) + "\n")


def results() -> str:
    """variants.md"""
    cells, costs = choose(read_results(RESULTS)), read_results(COSTS)
    by_round = {(line["variant"], line["round"]): line for line in costs}
    rows = []
    for name in [FIRST, *(name for name in NAMES if name != FIRST)]:
        here = [cells.get((task, method(name), 2)) for task in TASKS]
        row = [f"`{name}`"]
        row += [f"{cell.mean('loss'):.4f} ({cell.rate:.0e}, {len(cell.runs)})" if cell else "" for cell in here]
        found = paired(cells, TASKS, (method(name), 2), (method(FIRST), 2), "loss")
        row.append("{:+.1f} % ({:+.1f} to {:+.1f})".format(*interval(found)) if found and name != FIRST else "")
        row.append(f"{mean(cell.mean('parameters') for cell in here if cell):,.0f}" if any(here) else "")
        for key in ("training", "peak"):
            ratios = [
                line[key] / by_round[FIRST, number][key]
                for (variant, number), line in by_round.items()
                if variant == name and (FIRST, number) in by_round
            ]
            row.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
        rows.append(row)
    head = ["variant", *(f"{task}: loss (rate, seeds)" for task in TASKS), "against `lora`, 95 %", "parameters"]
    return (
        "# Variants on one budget\n\nMade by `scripts/bench/variants.py`; what is measured and how is said there. Held-out loss in nats per "
        "target, lower is better; time of the training loop and peak memory of the process relative to `lora`, median "
        "(min to max) of rounds.\n\n" + table([*head, "time", "memory"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured before")
    parser.add_argument("--no-cost", action="store_true", help="leave time and memory for a quieter hour")
    options = parser.parse_args()
    if not options.table:
        cells = [(task, method(name), 2) for task in TASKS for name in NAMES]
        run_cells(cells, SEEDS, RESULTS, options.work.resolve(), options.workers)
        if not options.no_cost:
            measure_costs()
    RESULTS.with_suffix(".md").write_text(results(), encoding="utf-8")


if __name__ == "__main__":
    main()
