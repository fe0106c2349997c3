"""Do passages in the prompt help a small model, does RAFT, and does policy `retrieval`? At equal tokens.

    python scripts/bench/retrieval/retrieval.py --work FOLDER            # measures what is missing, writes retrieval.md
    python scripts/bench/retrieval/retrieval.py --work FOLDER --table    # only writes retrieval.md again

Questions of XQuAD (English) and of Natural Questions (QED) with short answers, a Llama of 3 M parameters. Every run sees
about the same number of tokens, so the arm without passages makes many more steps. Held-out rows get what a user would
get: the question alone, or the first passages that BM25 finds. Data and models are those of the folder in DYNLORA_SHARED
(../shared). Each run is a line in retrieval.jsonl as soon as it is done; delete a line to measure it again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from dynlora_cli.commands import train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.setup import read_data

RESULTS, TABLE = Path(__file__).with_suffix(".jsonl"), Path(__file__).with_suffix(".md")
SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
SETS, SEEDS = ("xquad_en", "qed_nq"), (0, 1, 2)
TOKENS, LENGTH, ROWS, RATE, TOP_K = 40_000, 256, 60, 3e-3, 2
ARMS: dict[str, dict[str, Any]] = {
    "question only": {"retrieve": None},
    "plain passages": {"retrieve": {"oracle_share": 1.0}, "told": False},
    "RAFT, 0.8": {"retrieve": {"oracle_share": 0.8}},
    "RAFT, 1.0": {"retrieve": {"oracle_share": 1.0}},
    "RAFT, 0.8; policy retrieval": {"retrieve": {"oracle_share": 0.8}, "policy": {"policy": "retrieval"}},
    "RAFT, 0.8; policy retrieval, doubt": {
        "retrieve": {"oracle_share": 0.8},
        "policy": {"policy": "retrieval", "weigh": "doubt"},
    },
}
REFERENCE = "RAFT, 0.8"


def recipe_of(arm: str, name: str, seed: int, work: Path) -> Recipe:
    """The recipe of an arm, as long as its tokens allow."""
    how, folder = ARMS[arm], SHARED / "data" / name
    source = {"path": str(folder / "queries.jsonl"), "columns": {"prompt": "question", "completion": "answers"}}
    if not how.get("told", True):
        source["ignore"] = ["passage_id"]
    retrieve = how["retrieve"] and {"corpus": str(folder / "corpus.jsonl"), "top_k": TOP_K, **how["retrieve"]}
    recipe: dict[str, Any] = {
        "model": str(SHARED / "models" / "stories3M"),
        "dataset": {
            "train": [source],
            "val_size": 0.1,
            "max_length": LENGTH,
            "separator": "\n",
            "retrieve": retrieve,
        },
        "rank": {"init": 8, "budget": 4},
        "pruning": how.get("policy", {"policy": "fisher"}),
        "train": {"max_steps": 1, "micro_batch_size": 4, "learning_rate": RATE},
        "eval": {"max_samples": ROWS, "steps": 100_000},
        "output_dir": str(work / f"{name}-{seed}"),
        "seed": seed,
    }
    path = work / "recipe.json.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    plan = load_recipe(path)
    data = read_data(plan, BaseFiles.find(plan.model))
    per_row = data.counts["train"]["tokens"] / data.counts["train"]["rows"]
    return load_recipe(path, [f"train.max_steps={round(TOKENS / per_row / 4)}"])


def measure(arm: str, name: str, seed: int, work: Path) -> dict[str, Any]:
    """One run."""
    started = time.monotonic()
    recipe = recipe_of(arm, name, seed, work)
    summary = train.run(recipe, overwrite=True)
    record = json.loads((Path(recipe.output_dir) / "dynlora.json").read_text(encoding="utf-8"))
    found = record["data"]["retrieval"] or {}
    return {
        "arm": arm,
        "set": name,
        "seed": seed,
        "before": summary["loss_before"],
        "loss": summary["loss_after"],
        "parameters": summary["parameters"],
        "steps": recipe.train.max_steps,
        "tokens": summary["tokens"],
        "first_is_right": found.get("first_is_right"),
        "seconds": time.monotonic() - started,
        "date": time.strftime("%Y-%m-%d"),
    }


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """The results for people."""
    yield "# Retrieval in training: passages, RAFT and policy `retrieval`"
    yield ""
    yield "Made by `retrieval.py` from retrieval.jsonl; do not edit. Held-out loss in nats per token of the answer, on rows"
    yield f"that were not trained on ({ROWS} of them), after about {TOKENS:,} tokens of training; a Llama of 3 M parameters,"
    yield f"average rank 4 of 8, learning rate {RATE:g} for all, {TOP_K} passages, rows of at most {LENGTH} tokens. Mean over the"
    yield "seeds (lowest to highest). The difference is to `RAFT, 0.8` of the same seed; below 0 is better."
    for name in SETS:
        yield from ["", f"## {name}", "", "| arm | seeds | steps | before | after | difference to RAFT, 0.8 |"]
        yield "|---|---|---|---|---|---|"
        for arm in ARMS:
            runs = {line["seed"]: line for line in found if (line["arm"], line["set"]) == (arm, name)}
            if not runs:
                continue
            reference = {line["seed"]: line for line in found if (line["arm"], line["set"]) == (REFERENCE, name)}
            lost = [runs[seed]["loss"] - reference[seed]["loss"] for seed in runs.keys() & reference.keys()]
            steps, before = (mean(line[key] for line in runs.values()) for key in ("steps", "before"))
            after = spread([line["loss"] for line in runs.values()])
            yield f"| {arm} | {len(runs)} | {steps:.0f} | {before:.3f} | {after} | {spread(lost, '+')} |"
        rates = [line["first_is_right"] for line in found if line["set"] == name and line["first_is_right"]]
        if rates:
            yield from ["", f"BM25 finds the right passage first for {100 * mean(rates):.1f} % of all questions."]


def spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    return f"{mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    done = {(line["arm"], line["set"], line["seed"]) for line in lines()}
    wanted = [(arm, name, seed) for seed in SEEDS for name in SETS for arm in ARMS]
    for arm, name, seed in () if options.table else wanted:
        if (arm, name, seed) not in done:
            line = measure(arm, name, seed, options.work)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name} {seed} {arm}: {line['loss']:.3f}, {line['seconds']:.0f} s", flush=True)
    TABLE.write_text("\n".join(table(lines())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
