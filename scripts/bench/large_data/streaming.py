"""Does the memory of a run grow with the data where it reads while it trains (`dataset.streaming`)?

    python scripts/bench/large_data/streaming.py               # 1 GB in 20 files against 20 MB; streaming.jsonl
    python scripts/bench/large_data/streaming.py --gigabytes 5
    python scripts/bench/large_data/streaming.py --table       # only the table of what is there

`dynlora train` in a process of its own, for as many steps as make one pass over the data; its resident memory is looked
at twice a second. The model is a Llama of two layers, 32 wide, with the tokenizer of builtin:tiny. Rows are of a kilobyte,
cut to 16 tokens, so that most of the time goes into reading; a real run waits less for its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynlora_cli.models.find import BUILTIN

RESULTS = Path(__file__).with_suffix(".jsonl")
FILES, ROW, ROWS_OF_A_STEP = 20, 1000, 64
WORDS = ["count", "sort", "reverse", "print", "join", "split", "copy", "words", "lines", "numbers", "names", "every"]
RECIPE = """
model: {model}
dataset: {{train: "{data}", streaming: true, max_length: 16}}
rank: {{init: 2, budget: 2}}
train: {{max_steps: {steps}, micro_batch_size: {rows}, learning_rate: 1e-4, log_steps: 50}}
eval: {{max_samples: 64, samples: 0}}
output_dir: {out}
"""


def make(folder: Path, megabytes: float) -> int:
    """Write rows of about a kilobyte into files; returns how many."""
    chance, each = random.Random(0), int(megabytes * 1e6 / FILES / ROW)
    texts = [" ".join(chance.choices(WORDS, k=ROW // 5)) for _ in range(1000)]
    folder.mkdir(parents=True)
    for number in range(FILES):
        with (folder / f"part-{number:02}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(each):
                prompt, answer = f"{number} {row}: ", chance.choice(texts)
                file.write(json.dumps({"prompt": prompt, "completion": answer[: ROW - 60]}) + "\n")
    return each * FILES


def make_model(folder: Path) -> Path:
    """A model whose steps take next to no time."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **small))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(work: Path, megabytes: float) -> dict[str, Any]:
    """One run over such data: the curve of its memory, and its clock."""
    data, out = work / f"data-{megabytes:g}", work / f"out-{megabytes:g}"
    rows = make(data, megabytes)
    steps = rows // ROWS_OF_A_STEP
    (work / "recipe.yaml").write_text(
        RECIPE.format(model=make_model(work / "model"), data=data, steps=steps, rows=ROWS_OF_A_STEP, out=out)
    )
    command = [sys.executable, "-m", "dynlora_cli", "train", str(work / "recipe.yaml"), "--json", "--overwrite"]
    started = time.monotonic()
    with (work / "stdout").open("w") as stdout, (work / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        curve = watched(process, started)
    if process.returncode:
        raise SystemExit((work / "stderr").read_text())
    summary = json.loads((work / "stdout").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps_of = [line for line in metrics if line.get("event") == "train"]
    seconds = time.monotonic() - started
    return {
        "megabytes": megabytes,
        "rows": rows,
        "steps": steps,
        "seconds": round(seconds, 1),
        "seconds_to_first_line": round(seconds - steps_of[-1]["seconds"] + steps_of[0]["seconds"], 1),
        "seconds_of_steps": round(steps_of[-1]["seconds"], 1),
        "median_step": sorted(line["step_seconds"] for line in steps_of)[len(steps_of) // 2],
        "stream": summary["stream"],
        "peak_mb": round(max(mb for _, mb in curve)),
        "curve": curve[:: max(1, len(curve) // 60)],
    }


def watched(process: subprocess.Popen[Any], started: float) -> list[tuple[float, float]]:
    """Seconds and resident megabytes, twice a second, until a process ends."""
    curve, seen = [], psutil.Process(process.pid)
    while process.poll() is None:
        try:
            curve.append((round(time.monotonic() - started, 1), round(seen.memory_info().rss / 1e6)))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    process.wait()
    return curve


def table() -> str:
    """What was measured, the newest last."""
    lines = [
        "| data | rows | steps | seconds | rows/s | peak | at a quarter, half, end |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in RESULTS.read_text().splitlines():
        found = json.loads(line)
        curve = [mb for _, mb in found["curve"]]
        at = ", ".join(f"{curve[int(share * (len(curve) - 1))]:.0f}" for share in (0.25, 0.5, 1))
        speed = found["rows"] / found["seconds"]
        lines.append(
            f"| {found['megabytes']:g} MB | {found['rows']:,} | {found['steps']:,} | {found['seconds']:.0f} "
            f"| {speed:,.0f} | {found['peak_mb']} MB | {at} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure a small and a large set, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    for megabytes in () if given.table else (20.0, 1000 * given.gigabytes):
        with tempfile.TemporaryDirectory() as work, RESULTS.open("a") as results:
            results.write(json.dumps(measure(Path(work), megabytes)) + "\n")
    print(table())


if __name__ == "__main__":
    main()
