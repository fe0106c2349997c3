"""Is a partly active update better than a whole one? Components get keys of their own, and the nearest are active.

The gate gradient of a row says how much each component mattered for it. A component's key is the mean of the training
requests, each weighted by its squared gate gradient. For a request of the test part, a share of its update's components
is active: those whose keys are nearest to it, those that mattered most over all rows, or some by lot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from activation_data import Embed, Row
from activation_models import RANK, Losses, steps_of, train

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.batches import Batches
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.row_gates import batch_gates
from dynlora_cli.tasks.loss import summed_loss

SHARES = (0.75, 0.5)
TEST_ROWS, TRAIN_ROWS = 24, 80
UPDATES = ("chat0", "chat3", "covidqa", "pubmedqa")


def batches(losses: Losses, examples: list[Any], size: int) -> list[Any]:
    longest = max(len(one.input_ids) for one in examples)
    pad = int(losses.tokenizer.pad_token_id)
    all_of = Batches.in_order(examples, micro_batch_size=size, max_length=longest, pad_id=pad)
    return [batch for index in range(all_of.steps_per_epoch) for batch in all_of.step(0, index)]


def mattered(losses: Losses, pool: Pool, examples: list[Any]) -> np.ndarray:
    """Squared gate gradients of rows, [R, K]."""
    found = []
    for batch in batches(losses, examples, 8):
        with batch_gates(pool, batch) as gates:
            summed_loss(losses.base.model, batch).backward()
        found.append(gates.gradient_RK.numpy() ** 2)
        pool.values.grad = None
    return np.concatenate(found)


def row_losses(losses: Losses, pool: Pool, examples: list[Any], gate_RK: np.ndarray) -> float:
    """Summed loss of rows, each with its own components active."""
    total, whole = 0.0, pool.values.detach().clone()
    for batch, gate_K in zip(batches(losses, examples, 1), gate_RK, strict=True):
        with torch.no_grad():
            pool.values.copy_(whole)
            first = 0
            for count, (_, b_OC) in zip(pool.counts.values(), pool.views(pool.values.detach()), strict=True):
                b_OC.mul_(torch.as_tensor(gate_K[first : first + count], dtype=b_OC.dtype))
                first += count
            total += float(summed_loss(losses.base.model, batch))
    with torch.no_grad():
        pool.values.copy_(whole)
    return total


def kept(order_RK: np.ndarray, share: float) -> np.ndarray:
    """1 for the best share of components of each row, 0 for the others."""
    place_RK = np.argsort(np.argsort(-order_RK, axis=1, kind="stable"), axis=1, kind="stable")
    return (place_RK < round(share * order_RK.shape[1])).astype(np.float64)


def prefixes(
    work: Path, name: str, plain: Path, parts: dict[str, list[Row]], losses: Losses, seed: int
) -> dict[str, float]:
    """Loss per token on test rows of an update, by how many of each layer's first components are active."""
    nested = train(work / f"{name}_elastic", parts["train"], RANK, steps_of(parts["train"]), seed, elastic=True)
    examples = losses.examples(work / name / "test_part.jsonl", parts["test"][:TEST_ROWS])
    targets = sum(one.supervised() for one in examples)
    found = {}
    for how, folder in (("plain", plain), ("elastic", nested)):
        with attached(losses.base.model, read_adapter(folder)) as pool:
            for share in (1.0, *SHARES):
                first = [np.arange(count) < round(share * count) for count in pool.counts.values()]
                gates = np.tile(np.concatenate(first).astype(np.float64), (len(examples), 1))
                found[f"{how}, first {share:.0%}"] = row_losses(losses, pool, examples, gates) / targets
    return found


def measure(
    work: Path, name: str, folder: Path, parts: dict[str, list[Row]], embed: Embed, losses: Losses
) -> dict[str, float]:
    """Loss per token on test rows of an update, by what is active."""
    train, test = parts["train"][:TRAIN_ROWS], parts["test"][:TEST_ROWS]
    of_train, of_test = (
        losses.examples(work / name / f"{p}_part.jsonl", r) for p, r in (("train", train), ("test", test))
    )
    targets = sum(one.supervised() for one in of_test)
    with attached(losses.base.model, read_adapter(folder)) as pool:
        weight_RK = mattered(losses, pool, of_train)
        asked_RD, request_QD = embed([r["question"] for r in train]), embed([r["question"] for r in test])
        key_KD = (weight_RK / weight_RK.sum(0)).T @ asked_RD
        near_QK = request_QD @ (key_KD / np.linalg.norm(key_KD, axis=1, keepdims=True)).T
        much_QK = np.broadcast_to(weight_RK.mean(0), near_QK.shape)
        lot_QK = np.random.default_rng(0).random(near_QK.shape)
        found = {"whole": row_losses(losses, pool, of_test, np.ones_like(near_QK)) / targets}
        for share in SHARES:
            for how, order_QK in (("near", near_QK), ("mattering", much_QK), ("by lot", lot_QK)):
                gates = kept(np.asarray(order_QK), share)
                found[f"{how} {share:.0%}"] = row_losses(losses, pool, of_test, gates) / targets
        found["none"] = row_losses(losses, pool, of_test, np.zeros_like(near_QK)) / targets
    return found
