"""Time and memory of data larger than memory: `dataset.cache` on files of 10 MB to 5 GB.

    python scripts/bench/large_data/large_data.py --folder /tmp/large          # all cases: 5 GB take 10 minutes on two free cores
    python scripts/bench/large_data/large_data.py --folder /tmp/large --cases 100

A file of rows is made of the texts that come with Python, always the same ones. `dynlora train` makes a few steps on
a tiny model: first without anything kept, then once more. Every case adds its lines to large_data.jsonl: how long it
was until the first step, and the memory of all its processes, second by second:

    rss     resident pages of each, so files that are mapped, and what processes share, count for each
    pss     the same, pages that are shared divided by who shares them
    anon    of this what is no file: what the system cannot take back

    python scripts/bench/large_data/tables.py      # large_data.md and large_data.svg, of the fastest line of each case
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
RESULTS = HERE / "large_data.jsonl"
STEPS = 5
WORDS = (150, 350)  # of a row
WORDS_MODEL = "words"
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {  # MB of the file, model, settings
    "small": (10, WORDS_MODEL, {"cache": True}),
    "100 in memory": (100, WORDS_MODEL, {"cache": False}),
    "100 one": (100, WORDS_MODEL, {"workers": 1}),
    "100 two": (100, WORDS_MODEL, {"workers": 2}),
    "500": (500, WORDS_MODEL, {}),
    "5000": (5000, WORDS_MODEL, {}),
    "bpe in memory": (50, "builtin:tiny", {"cache": False}),
    "bpe one": (50, "builtin:tiny", {"workers": 1}),
    "bpe two": (50, "builtin:tiny", {"workers": 2}),
}


def make(path: Path, megabytes: int) -> int:
    """Write rows of text until the file is so large; how many they are."""
    from dynlora_cli.data.builtin import rows

    words = " ".join(row["prompt"] + row["completion"] for row in rows("train")).split()
    chance, left, count = random.Random(30), megabytes * 10**6, 0
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            start = chance.randrange(len(words) - WORDS[1])
            line = json.dumps({"text": " ".join(words[start : start + chance.randint(*WORDS)])}) + "\n"
            file.write(line)
            left, count = left - len(line), count + 1
    return count


def make_model(folder: Path) -> Path:
    """A small Llama whose tokenizer parts texts at spaces: what a BPE takes to think is not what is measured here."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dynlora_cli.data.builtin import rows

    counts = Counter(word for row in rows("train") for word in (row["prompt"] + row["completion"]).split())
    special = ["<unk>", "<s>", "</s>"]
    words = special + [word for word, _ in counts.most_common(4096 - len(special))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="</s>", **named).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **small)).save_pretrained(folder)
    return folder


def memory(process: psutil.Process) -> dict[str, float]:
    """MB of a process and all that it has started."""
    found = dict.fromkeys(("rss", "pss", "anon"), 0)
    for each in (process, *process.children(recursive=True)):
        try:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
        except (OSError, psutil.Error):  # it has just ended
            continue
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        found["rss"] += kilobytes["Rss"]
        found["pss"] += kilobytes["Pss"]
        found["anon"] += kilobytes["Anonymous"]
    return {name: round(value / 1024, 1) for name, value in found.items()}


def train(model: str, data: Path, out: Path, cache: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A run of a few steps, watched from outside."""
    shutil.rmtree(out, ignore_errors=True)
    options = {"max_length": 512, "format": None} | settings
    given = [f"--set=dataset.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    others = ("eval.max_samples=64", "eval.samples=0", "train.learning_rate=0.001", f"train.max_steps={STEPS}")
    given += [f"--set={each}" for each in others]
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"model: {model}\ndataset: {data}\noutput_dir: {out}\n")
    command = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), *given]
    began, curve, first, processor = time.perf_counter(), [], None, 0.0
    with (out.with_suffix(".log")).open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"DYNLORA_CACHE": str(cache)})
        watched, due = psutil.Process(run.pid), 0.0
        while run.poll() is None:
            now = time.perf_counter() - began
            if first is None and (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size:
                first, processor = now, sum(watched.cpu_times()[:4])  # its own and its children's
            if now >= due:
                curve.append({"t": round(now, 1), **memory(watched)})
                due = now + (0.25 if now < 30 else 1.0)
            time.sleep(0.05)
    if run.returncode or first is None:
        raise SystemExit(out.with_suffix(".log").read_text()[-3000:])
    record = json.loads((out / "dynlora.json").read_text())
    return {
        "seconds_to_first_step": round(first, 1),
        "processor_seconds_to_first_step": round(processor, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak": {name: max(point[name] for point in curve) for name in ("rss", "pss", "anon")},
        "data": record["data"]["sha256"],
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def main() -> None:
    """Run the cases that are asked for."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--folder", type=Path, required=True, help="on a disk with five times the largest file")
    asked.add_argument("--cases", nargs="*", default=list(CASES))
    options = asked.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        megabytes, name, settings = CASES[case]
        model = str(make_model(options.folder / name)) if name == WORDS_MODEL else name
        data, cache = options.folder / f"rows{megabytes}.jsonl", options.folder / "cache"
        rows = make(data, megabytes)
        shutil.rmtree(cache, ignore_errors=True)
        for start in ("first", "second"):
            done = train(model, data, options.folder / "run", cache, settings)
            kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.exists() else 0
            about = {"case": case, "start": start, "megabytes": megabytes, "rows": rows, "model": name, **settings}
            about |= {"kept_mb": round(kept / 1e6), "load": os.getloadavg()[0]}
            with RESULTS.open("a") as file:
                file.write(json.dumps(about | done) + "\n")
            print(case, start, done["seconds_to_first_step"], done["peak"], flush=True)
        data.unlink()
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
