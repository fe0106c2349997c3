"""Tables of images.jsonl: arms by steps, and costs at equal fidelity.

    python scripts/bench/images/image_tables.py [images.jsonl] > scripts/bench/images/images.md

The frontier: the mean curves of an arm over concepts and seeds, from the base (no steps) to its last checkpoint; on each
the cost at the same fidelity, by straight lines between checkpoints. LoRA's row is LoRA stopped early, at that fidelity.
Intervals hold 95 % of 2,000 draws of concepts, in which every arm is drawn alike, so differences are paired.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DRAWS, LEVELS, CLAIMED = 2000, (0.5, 0.7, 0.85, 0.95), 0.7
Line = dict[str, Any]
Key = tuple[str, int]  # concept and seed
Number = Callable[[Line, Line], float]  # of a line and the base's line of its concept


def low(values: Sequence[float]) -> float:
    """Mean over the half of the bands with less noise."""
    return float(np.mean(values[: len(values) // 2]))


def high(values: Sequence[float]) -> float:
    return float(np.mean(values[len(values) // 2 :]))


# Name, number of a line and of the base's line of that concept; all of them costs: less is better.
COSTS: dict[str, Number] = {
    "drift, %": lambda line, base: 100 * (np.mean(line["drift"]) / np.mean(base["drift"]) - 1),
    "drift low noise, %": lambda line, base: 100 * (low(line["drift"]) / low(base["drift"]) - 1),
    "drift high noise, %": lambda line, base: 100 * (high(line["drift"]) / high(base["drift"]) - 1),
    "moved, %": lambda line, base: 100 * np.mean(line["moved"]) / np.mean(base["drift"]),
    "contexts not followed": lambda line, _: 1 - line["context"],
    "memorised": lambda line, _: line["memorised"],
    "leaked": lambda line, base: line["leaked"] - base["leaked"],
    "diversity lost": lambda line, base: base["diversity"] - line["diversity"],
    "others lost": lambda line, base: base["others"] - line["others"],
    "wrong high noise": lambda line, base: 1 - high(line["wrong"]) / high(base["wrong"]),
}
GAINS = {"fidelity": "fidelity", "in context": "fidelity_context"}


def complete(lines: list[Line]) -> tuple[dict[str, list[Line]], list[Key], dict[str, Line]]:
    """Lines by arm, of concepts and seeds that all arms have; these; the base's line of a concept."""
    bases = {line["concept"]: line for line in lines if line["arm"] == "base"}
    by_arm: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["arm"] != "base":
            by_arm[line["arm"]].append(line)
    keys = set.intersection(*({(line["concept"], line["seed"]) for line in found} for found in by_arm.values()))
    kept = {arm: [line for line in found if (line["concept"], line["seed"]) in keys] for arm, found in by_arm.items()}
    return kept, sorted(keys), bases


def curves(
    by_arm: dict[str, list[Line]], keys: list[Key], bases: dict[str, Line], number: Number
) -> dict[str, np.ndarray]:
    """By arm, [concepts and seeds, checkpoints], the base first."""
    found = {}
    for arm, lines in by_arm.items():
        steps = sorted({line["step"] for line in lines})
        at = {(line["concept"], line["seed"], line["step"]): line for line in lines}
        along = [(bases[concept], [bases[concept], *[at[concept, seed, s] for s in steps]]) for concept, seed in keys]
        found[arm] = np.array([[number(line, base) for line in line_of] for base, line_of in along])
    return found


def at_level(fidelity: np.ndarray, cost: np.ndarray, level: float) -> float:
    """The cost where a mean curve first reaches a fidelity; nan where it does not."""
    above = np.nonzero(fidelity >= level)[0]
    if not len(above) or above[0] == 0:
        return float("nan")
    place = above[0]
    share = (level - fidelity[place - 1]) / (fidelity[place] - fidelity[place - 1])
    return float(cost[place - 1] + share * (cost[place] - cost[place - 1]))


def frontier(
    gain: dict[str, np.ndarray], cost: dict[str, np.ndarray], keys: list[Key], level: float, against: str = "lora"
) -> dict[str, tuple[float, ...]]:
    """By arm the cost at a fidelity, the difference to another arm (LoRA stopped early), and its interval."""
    concepts = sorted({concept for concept, _ in keys})
    rows = {concept: [i for i, key in enumerate(keys) if key[0] == concept] for concept in concepts}
    rng = np.random.default_rng(0)
    draws = [
        np.concatenate([rows[concepts[i]] for i in rng.integers(len(concepts), size=len(concepts))])
        for _ in range(DRAWS)
    ]
    everything = np.arange(len(keys))

    def costs(arm: str, chosen: np.ndarray) -> float:
        return at_level(gain[arm][chosen].mean(0), cost[arm][chosen].mean(0), level)

    plain = np.array([costs(against, draw) for draw in draws])
    found = {}
    for arm in gain:
        own = costs(arm, everything)
        differences = np.array([costs(arm, draw) for draw in draws]) - plain
        bounds = np.nanquantile(differences, [0.025, 0.975]) if not np.isnan(own) else (np.nan, np.nan)
        found[arm] = (own, own - costs(against, everything), *map(float, bounds))
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def by_steps(by_arm: dict[str, list[Line]], bases: dict[str, Line]) -> str:
    """Means and standard deviations over concepts and seeds."""
    shown = ["drift, %", "moved, %", "contexts not followed", "memorised", "leaked", "diversity lost", "others lost"]
    rows = []
    for arm, lines in by_arm.items():
        for step in sorted({line["step"] for line in lines}):
            here = [line for line in lines if line["step"] == step]
            numbers = [[line[key] for line in here] for key in GAINS.values()]
            numbers += [[COSTS[name](line, bases[line["concept"]]) for line in here] for name in shown]
            rows.append([arm, str(step), *(f"{np.mean(n):.3f} ± {np.std(n):.3f}" for n in numbers)])
    return table(["arm", "steps", *GAINS, *shown], rows)


def at_fidelity(by_arm: dict[str, list[Line]], keys: list[Key], bases: dict[str, Line], title: str) -> str:
    """The frontier at each of LEVELS."""
    key, parts = GAINS[title], []
    gain = curves(by_arm, keys, bases, lambda line, _: line[key])
    costs = {name: curves(by_arm, keys, bases, number) for name, number in COSTS.items()}
    start, best = gain["lora"][:, 0].mean(), gain["lora"].mean(0).max()
    for share in LEVELS:
        level = float(start + share * (best - start))
        found = {name: frontier(gain, cost, keys, level) for name, cost in costs.items()}
        rows = [[arm, *(shown_cell(found[name][arm], arm) for name in COSTS)] for arm in gain]
        parts.append(f"## At {title} {level:.3f}: {share:.0%} of the way from the base to LoRA's best\n")
        parts.append(table(["arm", *COSTS], rows))
    return "\n".join(parts)


def claim(by_arm: dict[str, list[Line]], keys: list[Key], bases: dict[str, Line]) -> str:
    """T-LoRA against both controls that it has to beat, and the reversed schedule, where it is 70 % of the way."""
    gain = curves(by_arm, keys, bases, lambda line, _: line["fidelity"])
    start, best = gain["lora"][:, 0].mean(), gain["lora"].mean(0).max()
    level, rows = float(start + CLAIMED * (best - start)), []
    for arm in ("t-lora", "t-lora, orthogonal"):
        for against in ("lora", "random ranks", "random ranks, then all", "reversed ranks"):
            cells = []
            for number in COSTS.values():
                cost = curves(by_arm, keys, bases, number)
                _, difference, low_bound, high_bound = frontier(gain, cost, keys, level, against)[arm]
                mark = " *" if low_bound > 0 or high_bound < 0 else ""
                cells.append(f"{difference:+.3f} ({low_bound:+.3f} to {high_bound:+.3f}){mark}")
            rows.append([arm, against, *cells])
    head = (
        f"## T-LoRA less its controls, at fidelity {level:.3f}: {CLAIMED:.0%} of the way from the base to LoRA's best\n"
    )
    return f"{head}\nBelow 0 T-LoRA is better; * where the interval leaves out 0.\n\n{table(['arm', 'less', *COSTS], rows)}"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images.jsonl"
    by_arm, keys, bases = complete([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    print(
        "# One-shot concepts: T-LoRA and its controls\n\nMade by image_tables.py of images.jsonl; measures: measures.py.\n"
    )
    print(f"{len({c for c, _ in keys})} concepts, {len(keys)} runs of each arm.\n\n{claim(by_arm, keys, bases)}")
    print(f"## By steps, mean and standard deviation\n\n{by_steps(by_arm, bases)}")
    for title in GAINS:
        print(at_fidelity(by_arm, keys, bases, title))


def shown_cell(cell: tuple[float, ...], arm: str) -> str:
    own, difference, low_bound, high_bound = cell
    if np.isnan(own):
        return "not reached"
    if arm == "lora":
        return f"{own:.3f}"
    mark = " *" if low_bound > 0 or high_bound < 0 else ""
    return f"{own:.3f} ({difference:+.3f}: {low_bound:+.3f} to {high_bound:+.3f}){mark}"


if __name__ == "__main__":
    main()
