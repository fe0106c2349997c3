"""How long until something happens? Against Python importing typer, in rounds; appended to startup.jsonl.

python scripts/bench/speed/startup.py              # 7 rounds, table to stdout
python scripts/bench/speed/startup.py --table      # only the table of what is there

typer         python -c "import typer", the floor of any command line made with it
--help        dynlora --help
wrong recipe  dynlora train with an unknown key, to the message
libraries     python importing torch and transformers' Llama, the floor of any trainer
first step    the built-in recipe, in a process that has those imported: until the first optimizer step is done
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).with_suffix(".jsonl")
# Prints seconds from here, with the libraries imported, to the first step's end.
FIRST_STEP = """
import sys, time
from pathlib import Path
import torch, transformers
from transformers import AutoTokenizer, LlamaForCausalLM
started = time.perf_counter()
from dynlora_cli import train
from dynlora_cli.config.load import load_recipe
def listen(event):
    if event["event"] == "tick":
        print(time.perf_counter() - started)
        raise SystemExit
train.run(load_recipe(Path(sys.argv[1]), ["output_dir=" + sys.argv[2]]), listener=listen)
"""
ROOT = Path(__file__).parents[3]


def seconds_of(*command: str, exit_code: int = 0) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, check=False)
    if done.returncode != exit_code:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return time.perf_counter() - started


def round_of(work: Path) -> dict[str, float]:
    wrong = work / "wrong.yaml"
    wrong.write_text("model: builtin:tiny\ndataset: none.jsonl\nlora_rank: 8\n")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    first = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, str(recipe), str(work / f"out-{time.time_ns()}")],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    return {
        "typer": seconds_of("-c", "import typer"),
        "--help": seconds_of("-m", "dynlora_cli", "--help"),
        "wrong recipe": seconds_of("-m", "dynlora_cli", "train", str(wrong), exit_code=2),
        "libraries": seconds_of("-c", "import torch; from transformers import LlamaForCausalLM, AutoTokenizer"),
        "first step": float(first.stdout.split()[-1]),
    }


def table() -> str:
    rounds = [json.loads(line)["seconds"] for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = ["| what | seconds, median (min to max) | over typer |", "|---|---|---|"]
    for name in rounds[-1]:
        times = [found[name] for found in rounds]
        over = median(found[name] - found["typer"] for found in rounds)
        lines.append(f"| {name} | {median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {over:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            round_of(Path(folder))  # the first one reads files that later ones find in memory
            for _ in range(args.rounds):
                line = {"date": time.strftime("%Y-%m-%d"), "seconds": round_of(Path(folder))}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(table())


if __name__ == "__main__":
    main()
