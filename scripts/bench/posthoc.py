"""Is `dynlora prune` better than PEFT's own way of making a trained adapter smaller, at equal parameters?

    python scripts/bench/posthoc.py --work FOLDER            # measures what is missing in posthoc.jsonl, writes posthoc.md
    python scripts/bench/posthoc.py --work FOLDER --table    # only writes posthoc.md again

Stock PEFT trains a LoRA of rank 16 on the validation part of E2E NLG, for each of three seeds. `convert_to_lora` of PEFT
cuts it by a share of each layer's squared singular values; `dynlora prune` gets the number of parameters that this left.
Stock PEFT then loads both and judges them by their loss on rows of the test part and on rows like those that were
trained on; nothing was tuned on any of them. Data and models are those of the folder in DYNLORA_SHARED (../shared). Adapters are kept
in FOLDER: a run that was cut off goes on where it was; delete FOLDER and posthoc.jsonl to start over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

RESULTS, TABLE = Path(__file__).with_suffix(".jsonl"), Path(__file__).with_suffix(".md")
SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
MODEL, DATA = SHARED / "models" / "stories3M", SHARED / "data" / "e2e_nlg"

SEEDS = (0, 1, 2)
THRESHOLDS = (0.95, 0.9, 0.8, 0.6)
POLICIES = {"magnitude": False, "activation": True, "random": False, "fisher": True, "gradient": True}  # looks at data
RANK, STEPS, BATCH, RATE, WARMUP, CALIBRATION_ROWS = 16, 300, 16, 1e-3, 10, 100
TITLES = {
    "first": "The first 1000 rows of the test part (213 prompts, of 5.2 attributes on average)",
    "spread": "Every ninth row of the test part (6.3 attributes on average)",
    "own": "193 rows of the validation part, like those that were trained on, with other prompts",
}

base = partial(AutoModelForCausalLM.from_pretrained, MODEL)
Row = tuple[list[int], int]  # tokens, and how many of them are the prompt's
Result = dict[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tenth(prompt: str) -> int:
    """Rows with the same prompt are in the same part: 0 to 6 are trained on, 7 and 8 calibrate, 9 is held out."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def encode(tokenizer: Any, rows: Iterable[dict[str, str]]) -> list[Row]:
    """Prompt and completion as one text, as they are, and the end-of-text token."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        assert tokens[: len(prompt)] == prompt
        encoded.append((tokens, len(prompt)))
    return encoded


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, T], where there is one, and where one is a completion's."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    at, length = torch.arange(width), torch.tensor([[len(tokens), prompt] for tokens, prompt in rows])
    real = at < length[:, :1]
    return ids, real, real & (at >= length[:, 1:])


def summed_loss(model: Any, rows: list[Row]) -> tuple[torch.Tensor, int]:
    """Cross-entropy over the completions' tokens, in nats, and how many they are."""
    ids, real, supervised = padded(rows)
    logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1][supervised[:, 1:]]
    return F.cross_entropy(logits.float(), ids[supervised], reduction="sum"), int(supervised.sum())


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Row]) -> float:
    """Mean over all tokens of all completions, in nats."""
    model.eval()
    sums = [summed_loss(model, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


def train(rows: list[Row], seed: int, out: Path) -> None:
    """A plain LoRA by stock PEFT: AdamW, linear decay, gradients clipped at 1."""
    torch.manual_seed(seed)
    drawn = random.Random(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / STEPS)
        loss, targets = summed_loss(model, drawn.sample(rows, BATCH))
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(out))


def convert(adapter: Path, threshold: float, out: Path) -> None:
    """PEFT's own: so many components of each layer that they hold this share of its squared singular values."""
    peft.save_as_lora(out, PeftModel.from_pretrained(base(), adapter), rank=threshold)


def prune(adapter: Path, policy: str, parameters: int, calibration: Path | None, seed: int, out: Path) -> Result:
    """Ours, through the command line; its summary."""
    command = [sys.executable, "-m", "dynlora_cli", "prune", "--adapter", adapter, "--out", out, "--overwrite"]
    budget = f"{(parameters + 0.5) / 1000:.4f}k"  # the half is rounded off again, and nothing else
    command += ["--budget", budget, "--policy", policy, "--seed", str(seed), "--no-measure", "--json"]
    if calibration:
        command += ["--data", calibration, "--max-samples", str(CALIBRATION_ROWS)]
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def count(adapter: Path) -> int:
    """Numbers in an adapter's file."""
    return sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())


class Bench:
    """Measures one thing at a time, and nothing twice: results are in posthoc.jsonl, adapters in the work folder."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.calibration, self.results = work, work / "calibration.jsonl", read_lines(RESULTS)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        rows, test = read_lines(DATA / "valid_clean.jsonl"), read_lines(DATA / "test_clean.jsonl")
        self.training = encode(tokenizer, (row for row in rows if tenth(row["prompt"]) < 7))
        own = [row for row in rows if tenth(row["prompt"]) == 9][300:]  # the first 300 were tuned on
        parts = {"first": test[:1000], "spread": test[::9], "own": own}
        self.rows = {name: encode(tokenizer, part) for name, part in parts.items()}
        calibration = [row for row in rows if tenth(row["prompt"]) in (7, 8)]
        random.Random(0).shuffle(calibration)  # the data set is sorted by its prompts
        self.calibration.write_text("".join(json.dumps(row) + "\n" for row in calibration), encoding="utf-8")

    def run(self, seed: int, policy: str) -> None:
        """One policy against PEFT."""
        self._measure(seed, "base", None, None)
        adapter = self._measure(seed, "uncut", None, partial(train, self.training, seed))
        data = self.calibration if POLICIES[policy] else None
        for threshold in THRESHOLDS:
            converted = self._measure(seed, "PEFT", threshold, partial(convert, adapter, threshold))
            make = partial(prune, adapter, policy, count(converted), data, seed)
            pruned = self._measure(seed, policy, threshold, make)
            assert count(pruned) <= count(converted), f"{pruned} is larger than {converted}"

    def _measure(self, seed: int, method: str, threshold: float | None, make: Callable[[Path], Any] | None) -> Path:
        """Make an adapter unless it is there, judge it unless that was done; its folder. The base has nothing to make."""
        out = self.work / f"seed-{seed}" / (method if threshold is None else f"{method}-{threshold}")
        made = out / "made.json"
        if make and not made.is_file():
            started = time.monotonic()
            summary = make(out) or {}
            seconds = time.monotonic() - started
            made.write_text(json.dumps({"seconds": seconds, "inside": summary.get("seconds", seconds)}))
        known = {(r["seed"], r["method"], r["threshold"], r["rows"]) for r in self.results}
        missing = [name for name in self.rows if (seed, method, threshold, name) not in known]
        model = PeftModel.from_pretrained(base(), out).merge_and_unload() if make and missing else base()
        for name in missing:
            result: Result = {"seed": seed, "method": method, "threshold": threshold, "rows": name}
            result |= {"loss": held_out_loss(model, self.rows[name]), "parameters": count(out) if make else 0}
            result |= json.loads(made.read_text()) if make else {}
            result |= {"date": time.strftime("%Y-%m-%d"), "peft": peft.__version__, "torch": torch.__version__}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            self.results.append(result)
        return out


def table(results: list[Result]) -> str:
    """Losses, paired differences to PEFT, and times, of the policies that were measured with every seed."""
    found = {(r["method"], r["threshold"], r["rows"], r["seed"]): r for r in results}
    policies = [name for name in POLICIES if all((name, THRESHOLDS[-1], "own", seed) in found for seed in SEEDS)]

    def values(method: str, threshold: float | None, part: str = "own", key: str = "loss") -> list[float]:
        return [found[method, threshold, part, seed][key] for seed in SEEDS]

    def loss(name: str, threshold: float, part: str) -> str:
        return f"{mean(values(name, threshold, part)):.4f}"

    def gap(name: str, threshold: float, part: str) -> str:
        gaps = [o - p for o, p in zip(values(name, threshold, part), values("PEFT", threshold, part), strict=True)]
        return f"{mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"

    def grid(columns: list[str], cell: Callable[[str, float, str], str], part: str) -> str:
        lines = [["threshold", "parameters left", *columns], ["---"] * (2 + len(columns))]
        for threshold in THRESHOLDS:
            share = mean(values("PEFT", threshold, key="parameters")) / full
            lines.append([f"{threshold}", f"{100 * share:.1f} %", *(cell(name, threshold, part) for name in columns)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    full = mean(values("uncut", None, key="parameters"))
    sections = [
        f"""## {title}

Base {mean(values("base", None, part)):.4f}, uncut adapter {mean(values("uncut", None, part)):.4f}. Means over the seeds:

{grid(["PEFT", *policies], loss, part)}

Difference to PEFT at the same seed and threshold, mean (min to max); below 0 is better than PEFT:

{grid(policies, gap, part)}
"""
        for part, title in TITLES.items()
    ]
    inside = {name: [s for t in THRESHOLDS for s in values(name, t, key="inside")] for name in ("PEFT", *policies)}
    return f"""# Cutting a trained adapter: `dynlora prune` against PEFT's `convert_to_lora`

Made by `posthoc.py` from posthoc.jsonl; do not edit. Held-out loss on E2E NLG (cleaned), in nats per token of the
completion, judged by PEFT {results[-1]["peft"]}. LoRA of rank {RANK} on all linear layers of a Llama of 3 M parameters,
{full:,.0f} parameters; seeds {", ".join(map(str, SEEDS))}. `magnitude` and `random` see no data, the others
{CALIBRATION_ROWS} rows that were not trained on. Ours never has more parameters than PEFT's.

{chr(10).join(sections)}
Seconds of one cut, without the start of Python, mean (max): \
{", ".join(f"{name} {mean(seconds):.1f} ({max(seconds):.1f})" for name, seconds in inside.items())}. \
With data, ours also measures the loss of up to 8 sizes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters, outside the repository")
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured before")
    args = parser.parse_args()
    RESULTS.touch()
    if not args.table:
        bench = Bench(args.work)
        for policy in POLICIES:
            for seed in SEEDS:
                bench.run(seed, policy)
    TABLE.write_text(table(read_lines(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
