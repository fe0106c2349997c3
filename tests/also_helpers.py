"""What the tests of forgetting share: rows of two small worlds, and a loss computed the long way in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_run import make_recipe

from dynlora_cli.config.recipe import Recipe


def sums(path: Path, count: int = 24) -> list[dict[str, str]]:
    """Rows that have nothing in common with the words that `tiny_run` trains on."""
    rows = [{"prompt": f"{n} + {n + 3} = ", "completion": f"{2 * n + 3}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def with_also(folder: Path, *overrides: str, kind: str = "llama", **keys: Any) -> Recipe:
    """The recipe of `tiny_run` at a rate that changes something, with the set `sums`."""
    sums(folder / "sums.jsonl")
    also = [{"name": "sums", "path": str(folder / "sums.jsonl"), **keys}]
    return make_recipe(folder, "train.learning_rate=2e-2", f"eval.also={json.dumps(also)}", *overrides, kind=kind)


@torch.no_grad()
def loss_in_double(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Nats per token of the completions and their end, one row after the other, in fp64."""
    model, total, targets = model.double().eval(), 0.0, 0
    for row in rows:
        prompt, completion = (tokenizer(row[key], add_special_tokens=False).input_ids for key in row)
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        for place in range(len(prompt), ids.shape[1] - 1):
            total, targets = total - float(log_p[place, ids[0, place + 1]]), targets + 1
    return total / targets
