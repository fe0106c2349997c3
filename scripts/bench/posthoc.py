"""Is `dynlora prune` better than PEFT's own way of making a trained adapter smaller, at equal parameters?

    python scripts/bench/posthoc.py --work FOLDER            # measures what is missing in posthoc.jsonl, writes posthoc.md
    python scripts/bench/posthoc.py --work FOLDER --table    # only writes posthoc.md again

Stock PEFT trains a LoRA of rank 16 on the validation part of E2E NLG, for each of three seeds. `convert_to_lora` of PEFT
cuts it by a share of each layer's squared singular values; `dynlora prune` gets the number of parameters that this left.
Stock PEFT then loads both results and judges them by their loss on rows of the test part, which nothing was tuned on.
Data and models are those of the folder in DYNLORA_SHARED (../shared). Adapters are kept in FOLDER: a run that was cut
off goes on where it was; delete FOLDER and posthoc.jsonl to start over.
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
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "posthoc.jsonl", HERE / "posthoc.md"
SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
MODEL, DATA = SHARED / "models" / "stories3M", SHARED / "data" / "e2e_nlg"

SEEDS = (0, 1, 2)
THRESHOLDS = (0.95, 0.9, 0.8, 0.6)
POLICIES = {"magnitude": False, "random": False, "activation": True, "fisher": True, "gradient": True}  # looks at data
RANK, STEPS, BATCH, RATE, WARMUP = 16, 300, 16, 1e-3, 10
TEST_ROWS, CALIBRATION_ROWS = 1000, 200

Row = tuple[list[int], int]  # tokens, and how many of them are the prompt's
Result = dict[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tenth(prompt: str) -> int:
    """Rows with the same prompt are in the same part: 0 to 6 are trained on, 7 and 8 calibrate, 9 is for tuning."""
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


def summed_loss(model: Any, rows: list[Row]) -> tuple[torch.Tensor, int]:
    """Cross-entropy over the completions' tokens, in nats, and how many they are."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    at, length = torch.arange(width), torch.tensor([[len(tokens), prompt] for tokens, prompt in rows])
    real, supervised = at < length[:, :1], (at >= length[:, 1:]) & (at < length[:, :1])
    logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1][supervised[:, 1:]]
    return F.cross_entropy(logits.float(), ids[supervised], reduction="sum"), int(supervised.sum())


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Row]) -> float:
    """Mean over all tokens of all completions, in nats."""
    model.eval()
    sums = [summed_loss(model, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL)


def train(out: Path, rows: list[Row], seed: int) -> None:
    """A plain LoRA by stock PEFT: AdamW, linear decay, gradients clipped at 1."""
    torch.manual_seed(seed)
    drawn = random.Random(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / STEPS)
        loss, targets = summed_loss(model, drawn.sample(rows, BATCH))
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def convert(adapter: Path, out: Path, threshold: float) -> None:
    """PEFT's own: so many components of each layer that they hold this share of its squared singular values."""
    peft.save_as_lora(out, PeftModel.from_pretrained(base(), adapter), rank=threshold)


def prune(adapter: Path, out: Path, policy: str, parameters: int, calibration: Path | None, seed: int) -> Result:
    """Ours, through the command line; its summary."""
    command = [sys.executable, "-m", "dynlora_cli", "prune", "--adapter", adapter, "--out", out, "--overwrite"]
    budget = f"{(parameters + 0.5) / 1000:.4f}k"  # the half is rounded off again, and nothing else
    command += ["--budget", budget, "--policy", policy, "--seed", str(seed), "--json"]
    if calibration:
        command += ["--data", calibration, "--max-samples", str(CALIBRATION_ROWS)]
    else:
        command += ["--no-measure"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def count(adapter: Path) -> int:
    """Numbers in an adapter's file."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


class Bench:
    """Measures one thing at a time, and nothing twice: results are in posthoc.jsonl, adapters in the work folder."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.calibration = work, work / "calibration.jsonl"
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        rows = read_rows(DATA / "valid_clean.jsonl")
        self.training = encode(tokenizer, (row for row in rows if tenth(row["prompt"]) < 7))
        self.test = encode(tokenizer, read_rows(DATA / "test_clean.jsonl")[:TEST_ROWS])
        calibration = [row for row in rows if tenth(row["prompt"]) in (7, 8)]
        random.Random(0).shuffle(calibration)  # the data set is sorted by its prompts
        self.calibration.write_text("".join(json.dumps(row) + "\n" for row in calibration), encoding="utf-8")
        self.results = read_results()

    def run(self, seed: int) -> None:
        """Everything of one seed."""
        self._measure(seed, "base", None, lambda out: None)  # noqa: ARG005
        adapter = self._measure(seed, "uncut", None, lambda out: train(out, self.training, seed))
        for threshold in THRESHOLDS:
            converted = self._measure(seed, "PEFT", threshold, lambda out, t=threshold: convert(adapter, out, t))
            parameters = count(converted)
            for policy, with_data in POLICIES.items():
                data = self.calibration if with_data else None
                make = lambda out, p=policy, n=parameters, d=data: prune(adapter, out, p, n, d, seed)  # noqa: E731
                pruned = self._measure(seed, policy, threshold, make)
                assert count(pruned) <= parameters, f"{pruned}: {count(pruned)} > {parameters}"

    def _measure(self, seed: int, method: str, threshold: float | None, make: Callable[[Path], Any]) -> Path:
        """Make an adapter unless it is there, judge it unless that was done; its folder."""
        out = self.work / f"seed-{seed}" / (method if threshold is None else f"{method}-{threshold}")
        done = any((r["seed"], r["method"], r["threshold"]) == (seed, method, threshold) for r in self.results)
        made, seconds, summary = out / "made.json", None, None
        if method != "base" and not made.is_file():
            started = time.monotonic()
            summary = make(out)
            seconds = time.monotonic() - started
            made.write_text(json.dumps({"seconds": seconds, "inside": summary["seconds"] if summary else seconds}))
        if done:
            return out
        model = base() if method == "base" else PeftModel.from_pretrained(base(), out)
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "seed": seed,
            "method": method,
            "threshold": threshold,
            "parameters": 0 if method == "base" else count(out),
            "loss": held_out_loss(model, self.test),
            **({} if method == "base" else json.loads(made.read_text())),
            "peft": peft.__version__,
            "torch": torch.__version__,
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.results.append(result)
        print(json.dumps(result), file=sys.stderr)
        return out


def read_results() -> list[Result]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table(results: list[Result]) -> str:
    """Losses, paired differences to PEFT, and times."""
    found = {(r["method"], r["threshold"], r["seed"]): r for r in results}
    seeds = [seed for seed in SEEDS if all((name, THRESHOLDS[-1], seed) in found for name in ("PEFT", *POLICIES))]
    if not seeds:
        return "No seed is complete yet.\n"

    def values(method: str, threshold: float | None, key: str = "loss") -> list[float]:
        return [found[method, threshold, seed][key] for seed in seeds]

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    full, names = mean(values("uncut", None, "parameters")), ["PEFT", *POLICIES]
    losses, differences = [], []
    for threshold in THRESHOLDS:
        head = (f"{threshold}", f"{100 * mean(values('PEFT', threshold, 'parameters')) / full:.1f} %")
        losses.append(row(*head, *(f"{mean(values(name, threshold)):.4f}" for name in names)))
        cells = []
        for name in POLICIES:
            pairs = zip(values(name, threshold), values("PEFT", threshold), strict=True)
            gaps = [ours - theirs for ours, theirs in pairs]
            cells.append(f"{mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})")
        differences.append(row(*head, *cells))
    inside = {name: [s for t in THRESHOLDS for s in values(name, t, "inside")] for name in names}
    return f"""\
# Cutting a trained adapter: `dynlora prune` against PEFT's `convert_to_lora`

Made by `posthoc.py` from posthoc.jsonl; do not edit. Held-out loss (nats per token of the completion) on the first
{TEST_ROWS} rows of E2E NLG's test part, judged by PEFT {results[-1]["peft"]}. LoRA of rank {RANK} on all linear layers of
a Llama of 3 M parameters, {full:,.0f} parameters; seeds {", ".join(map(str, seeds))}. `magnitude` and `random` see no
data, the others {CALIBRATION_ROWS} rows that were not trained on. Ours never has more parameters than PEFT's.

Base {mean(values("base", None)):.4f}, with the uncut adapter {mean(values("uncut", None)):.4f}; means over the seeds:

{row("threshold", "parameters left", *names)}
{row(*["---"] * (2 + len(names)))}
{chr(10).join(losses)}

Difference to PEFT at the same seed and threshold, mean (min to max); below 0 is better than PEFT:

{row("threshold", "parameters left", *POLICIES)}
{row(*["---"] * (2 + len(POLICIES)))}
{chr(10).join(differences)}

Seconds of one cut, without the start of Python, mean (max): \
{", ".join(f"{name} {mean(seconds):.1f} ({max(seconds):.1f})" for name, seconds in inside.items())}. \
With data, ours also measures the loss of up to 8 sizes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters, outside the repository")
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured before")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not args.table:
        bench = Bench(args.work)
        for seed in SEEDS:
            bench.run(seed)
    text = table(read_results())
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
