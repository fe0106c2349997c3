"""What does it give to train many adapters on one base at once?

    python scripts/bench/lanes.py --model FOLDER --out scripts/bench/lanes.jsonl

Times a step of one run alone, and a step of k runs side by side, in which every run takes one. Both are taken in the
same process, in turn, `--repeats` times; a ratio is of the same round. One line of JSON for each round. On a CPU the
times are processor time, of one thread as a rule (OMP_NUM_THREADS=1), so that other programs do not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dynlora_cli.commands import train, train_side_by_side
from dynlora_cli.config.load import check_recipe

WARM = 2  # steps that are not timed
LANES = (2, 4, 8)


def recipe(args: argparse.Namespace, folder: Path, tokens: int, rows: int, number: int) -> Any:
    """Of a run on rows of exactly so many tokens; nothing is pruned, measured or saved while it is timed."""
    path = folder / "rows.jsonl"
    if not path.exists():
        words = ("the", "house", "runs", "over", "red", "water", "and", "time", "of", "light")
        texts = [" ".join(words[(i * 7 + j * 3 + i * j) % len(words)] for j in range(600)) for i in range(200)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return check_recipe(
        {
            "model": {"name_or_path": args.model, "dtype": args.dtype, "load_in_4bit": args.bits == 4},
            "dataset": {"train": [{"path": str(path)}], "val_size": 0, "max_length": tokens},
            "rank": {"init": args.rank, "budget": args.rank},
            "train": {"max_steps": args.steps, "micro_batch_size": rows, "learning_rate": 1e-4},
            "eval": {"samples": 0},
            "seed": number,
            "output_dir": str(folder / f"run-{number}"),
        }
    )


class Clock:
    """Listens to runs; how long a step took, from the moment when all had done `WARM` steps.

    To the moment when all had done all but one: after its last step a run saves, while the others wait.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done: dict[int, float] = {}  # when the last run had done so many steps

    def hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "tick":
            self.done[event["step"]] = time.perf_counter() if torch.cuda.is_available() else time.process_time()

    def seconds_per_step(self) -> float:
        return (self.done[self.steps - 1] - self.done[WARM]) / (self.steps - 1 - WARM)


def alone(args: argparse.Namespace, make: Callable[[int], Any]) -> float:
    clock = Clock(args.steps)
    train.run(make(0), listener=clock.hear, overwrite=True)
    return clock.seconds_per_step()


def together(args: argparse.Namespace, make: Callable[[int], Any], lanes: int) -> float:
    clock = Clock(args.steps)
    runs = [train_side_by_side.Planned(str(number), make(number), "anew") for number in range(lanes)]

    def one(planned: Any, *, overwrite: bool, resume: bool, lane: Any) -> dict[str, Any]:
        return train.run(planned.recipe, listener=clock.hear, overwrite=overwrite, resume=resume, lane=lane)

    result = train_side_by_side.run(runs, one, lambda *_: None)
    assert result["ok"], result
    return clock.seconds_per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=int, choices=(4, 32), default=32, help="4: a quantized base")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["1x8", "1x32", "2x64", "4x128"], help="rows x tokens of a run")
    parser.add_argument("--lanes", nargs="+", type=int, default=LANES)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    about = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "bits": args.bits,
        "rank": args.rank,
        "machine": platform.processor(),
    }
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "gpu": torch.cuda.is_available()}
    about["clock"] = "wall" if torch.cuda.is_available() else "processor"
    for shape in args.shapes:
        rows, tokens = map(int, shape.split("x"))
        ratios: dict[int, list[float]] = {lanes: [] for lanes in args.lanes}
        for repeat in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                make = lambda number: recipe(args, Path(folder), tokens, rows, number)  # noqa: B023, E731
                one = alone(args, make)
                for lanes in args.lanes:
                    seconds = together(args, make, lanes)
                    ratios[lanes].append(seconds / one)
                    line = {**about, "rows": rows, "tokens": tokens, "repeat": repeat, "lanes": lanes}
                    line |= {"alone_seconds": one, "together_seconds": seconds}
                    with args.out.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(line) + "\n")
        for lanes, found in ratios.items():
            spread = f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
            print(
                f"{rows} x {tokens} tokens, {lanes} runs: {spread} of one run, {lanes / median(found):.2f} times as fast"
            )


if __name__ == "__main__":
    main()
