"""The real model of cut.py, its rows, its losses, and stock PEFT's training of the adapters that are cut.

Rows are turns of user and assistant in the model's own chat template, as people train an Instruct model and as `dynlora`
reads rows of prompt and completion on it. A task has parts that quality_tasks.py made: adapters are trained on the first
rows of `train`, cuts look at `val`, tables read `test`. General text is wikitext2's validation part, which nothing was
trained or calibrated on.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from posthoc import Row, padded
from quality_tasks import SHARED, prepare

MODELS = Path(os.environ.get("DYNLORA_REAL_MODELS", "~/.cache/dynlora-models")).expanduser()
MODEL = MODELS / "SmolLM2-135M-Instruct"
ROWS, BATCH, WINDOW, WARMUP = {"e2e": 480, "gsm8k": 240}, 8, 64, 0.05
TEST_ROWS = {"e2e": 56, "gsm8k": 32}
CHUNK, CHUNKS = 256, 12  # tokens of general text, 3,072 in all


def rows_of(work: Path, task: str, part: str) -> list[dict[str, str]]:
    lines = (prepare(task, work) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def encode(tokenizer: Any, rows: list[dict[str, str]]) -> list[Row]:
    """Both turns in the chat template, and where the answer begins."""
    encoded = []
    for row in rows:
        user, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template([user, answer], tokenize=False)
        prompt_ids, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
        assert ids[: len(prompt_ids)] == prompt_ids
        encoded.append((ids, len(prompt_ids)))
    return encoded


def general_rows(tokenizer: Any) -> list[Row]:
    """Chunks of text that is none of the tasks', every token but the first to be told."""
    ids = tokenizer((SHARED / "data" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:60000])["input_ids"]
    return [(ids[start : start + CHUNK], 1) for start in range(0, CHUNK * CHUNKS, CHUNK)]


def load_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)


def summed_loss(model: Any, rows: list[Row]) -> tuple[torch.Tensor, int]:
    """Cross-entropy over the answers' tokens, in nats, and how many they are; logits only where there is a target."""
    ids, real, supervised = padded(rows)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal.model(input_ids=ids, attention_mask=real.long()).last_hidden_state[:, :-1][supervised[:, 1:]]
    return F.cross_entropy(causal.lm_head(hidden).float(), ids[supervised], reduction="sum"), int(supervised.sum())


@torch.no_grad()
def loss_on(model: Any, rows: list[Row]) -> float:
    """Mean over all tokens of all answers, in nats."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]))  # little padding
    sums = [summed_loss(model, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


def _batches(rows: list[Row], seed: int) -> list[list[Row]]:
    """All rows once, in batches of similar length, as people's trainers group them."""
    drawn = random.Random(seed)
    rows = drawn.sample(rows, len(rows))
    windows = [sorted(rows[i : i + WINDOW], key=lambda row: len(row[0])) for i in range(0, len(rows), WINDOW)]
    batches = [window[i : i + BATCH] for window in windows for i in range(0, len(window), BATCH)]
    return drawn.sample(batches, len(batches))


def train(work: Path, task: str, rank: int, rate: float, seed: int, out: Path) -> dict[str, Any]:
    """A LoRA as people have them, by stock PEFT: alpha 2r, all linear layers, AdamW, one epoch, linear decay."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = encode(tokenizer, rows_of(work, task, "train")[: ROWS[task]])
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batches, started, losses = _batches(rows, seed), time.process_time(), []
    warmup = max(1, round(WARMUP * len(batches)))
    model.train()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warmup) * (1 - step / len(batches))
        loss, targets = summed_loss(model, batch)
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / targets)
        if step % 10 == 9:
            print(
                f"{out.name} step {step + 1} loss {sum(losses[-10:]) / 10:.4f} {time.process_time() - started:.0f} s",
                flush=True,
            )
    model.save_pretrained(str(out))
    return {"cpu": round(time.process_time() - started, 1), "steps": len(batches), "peft": peft.__version__}
