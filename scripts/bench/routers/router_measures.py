"""What run.py measures: the loss of every test row under a choice of adapters, and what a router chose.

The token that ends a text is no target here: stories3M has never seen it, every adapter learns it, and it would be most of
the loss of a short answer, so that any adapter would look right for any task.

Dimensions: R rows, E adapters, B rows of a batch, T tokens of a row, N = B x T.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make import Study
from numpy.typing import NDArray
from router_rows import STRANGERS, STRANGERS_ROWS, read
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.sections import Dataset
from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.load import load_data
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.routing.router import Asked
from dynlora_cli.tasks import task as tasks

BASE = "base"
MICRO_BATCH = 16
TIMED = 24  # requests whose decisions are timed, one by one

Floats = NDArray[np.float64]
Context = Callable[[Sequence[int]], AbstractContextManager[Any]]  # of the rows of a batch, by number


@dataclass(frozen=True)
class Rows:
    """Test rows of one task.

    Attributes:
        examples: in the order of their file.
        asked: the request of each.
        order: numbers of rows, by length: rows of like length share a batch.
    """

    examples: list[Any]
    asked: list[Asked]
    order: list[int]


class Ground:
    """A base in memory, adapters on it, and test rows.

    Args:
        study: of which model.
        runs: folders of adapters by name.
        work: where prepared rows lie.
    """

    def __init__(self, study: Study, runs: Mapping[str, Path], work: Path) -> None:
        self.study, self.work = study, work
        self.adapters: dict[str, Adapter] = {name: read_adapter(folder) for name, folder in runs.items()}
        first = next(iter(self.adapters.values()))
        self.place = find_base(first)
        self.tokenizer = read_tokenizer(first, self.place)
        self.base = base_in_memory(first, self.place, self.tokenizer)
        self.base.model.requires_grad_(False).eval()
        self.end = int(self.tokenizer.eos_token_id)
        self._rows: dict[str, Rows] = {}

    def bank(self, names: Sequence[str]) -> Bank:
        """These adapters on the base."""
        return Bank(self.base.model, {name: self.adapters[name] for name in names})

    def rows(self, task: str) -> Rows:
        """Test rows, with the ending token as no target."""
        if task not in self._rows:
            most = min(self.study.rows, STRANGERS_ROWS) if task in STRANGERS else self.study.rows
            self._rows[task] = self._read(task, most)
        return self._rows[task]

    def _read(self, task: str, most: int) -> Rows:
        rows = read(task, "test", self.work, most)
        path = self.work / "data" / f"{task}-{most}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        length = self.study.max_length
        form = {"train": [{"path": str(path)}], "val_size": 0.0, "max_length": length, "chat": False}
        found = load_data(Dataset.model_validate(form), self.tokenizer, task=tasks.of(self.place.options), seed=0).train
        found = sorted(found, key=lambda one: one.row)
        examples = [self._without_end(one) for one in found]  # a prompt that leaves no room for an answer is left out
        asked = [Asked(rows[one.row]["prompt"].strip(), tuple(self._prompt(one))) for one in examples]
        return Rows(examples, asked, sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids)))

    def _without_end(self, example: Any) -> Any:
        labels = example.labels[:]
        for at, label in enumerate(labels):
            if label == self.end:
                labels[at] = -100
        return replace(example, labels=labels)

    @staticmethod
    def _prompt(example: Any) -> list[int]:
        first = next(at for at, label in enumerate(example.labels) if label != -100)
        return list(example.input_ids[:first])

    def batches(self, task: str, wanted: Collection[int] | None = None) -> Iterator[tuple[list[int], Batch]]:
        """Numbers of rows, and the batch of them; of the wanted rows, or of all."""
        rows = self.rows(task)
        order = [number for number in rows.order if wanted is None or number in wanted]
        if not order:
            return
        made = Batches.in_order(
            [rows.examples[number] for number in order],
            micro_batch_size=MICRO_BATCH,
            max_length=self.study.max_length,
            pad_id=int(self.tokenizer.pad_token_id),
        )
        for index in range(made.steps_per_epoch):
            yield order[index * MICRO_BATCH : (index + 1) * MICRO_BATCH], made.step(0, index)[0]

    def targets(self, task: str) -> NDArray[np.int64]:
        """[R] of each row."""
        return np.array([sum(label != -100 for label in one.labels) for one in self.rows(task).examples])

    def losses(self, task: str, within: Context | None = None, wanted: Collection[int] | None = None) -> Floats:
        """Summed loss of each row in nats, each batch inside a context of its rows; NaN where a row is not wanted."""
        loss_R = np.full(len(self.rows(task).examples), np.nan)
        for numbers, batch in self.batches(task, wanted):
            with within(numbers) if within else nullcontext():
                loss_R[numbers] = row_sums(self.base.model, [batch]).loss_R
        return loss_R

    def with_mixes(self, bank: Bank, task: str, mixes: Mapping[int, Mapping[str, float]]) -> Floats:
        """The loss of each row that has a mix, under it."""
        return self.losses(task, lambda numbers: bank.active([mixes[number] for number in numbers]), mixes.keys())

    @cached_property
    def timed_requests(self) -> list[Asked]:
        names = [name for name in self._rows if name not in STRANGERS]
        return [self.rows(names[at % len(names)]).asked[at // len(names)] for at in range(TIMED)]

    def forward(self, ids: Sequence[int]) -> None:
        """One prompt through the model as it is."""
        with torch.inference_mode():
            self.base.model(torch.tensor([ids]))


def timed(do: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds, the best of a few."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        do()
        took.append(time.perf_counter() - started)
    return min(took)


class Watched:
    """A token router whose shares are added up, by row of the batch and adapter, over the tokens of prompts.

    Args:
        inner: the router's `gates`.
        count: adapters of the bank.
    """

    def __init__(self, inner: Any, count: int) -> None:
        self.inner, self.count = inner, count
        self.prompt_BT = torch.zeros(0, 0, dtype=torch.bool)
        self.share_BE = torch.zeros(0, count)

    def start(self, batch: Batch) -> None:
        """Of the next batch."""
        first_B = (batch.labels != -100).int().argmax(1)
        self.prompt_BT = torch.arange(batch.labels.shape[1])[None] < first_B[:, None]
        self.share_BE = torch.zeros(len(batch.labels), self.count)

    def gates(self, layer: Any, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """The router's own."""
        gates: Tensor = self.inner(layer, x_NI, h_NR)
        each = gates.detach().float()
        if gates.shape[-1] == len(layer.a_RI) and gates.shape[-1] != len(layer.adapters):
            each = torch.stack([each[:, part].mean(1) for part in layer.slices], 1)
        each = each.view(*self.prompt_BT.shape, -1) * self.prompt_BT[..., None]
        self.share_BE[:, layer.adapters] += each.sum(1)
        return gates


@dataclass
class Outcome:
    """What a router did on the rows of a task.

    Attributes:
        loss_R: summed, nats.
        first_R: the adapter with the largest weight or share; -1: the base.
    """

    loss_R: Floats
    first_R: NDArray[np.int64]


def by_token(bank: Bank, ground: Ground, task: str, router: Any, base_R: Floats) -> Outcome:
    """A router that weighs at every token; rows that it leaves to the base have the base's loss."""
    decisions = router.decide(ground.rows(task).asked)
    mine_R = np.array([decision.by_token for decision in decisions])
    watched = Watched(router.gates, len(bank.names))
    with bank.routed(watched):
        found = watched_losses(ground, task, watched, set(np.flatnonzero(mine_R).tolist()))
    return Outcome(np.where(mine_R, found.loss_R, base_R), found.first_R)


def watched_losses(ground: Ground, task: str, watched: Watched, wanted: Collection[int] | None = None) -> Outcome:
    """Rows under the router that is on the model."""
    count = len(ground.rows(task).examples)
    loss_R, first_R = np.full(count, np.nan), np.full(count, -1)
    for numbers, batch in ground.batches(task, wanted):
        watched.start(batch)
        loss_R[numbers] = row_sums(ground.base.model, [batch]).loss_R
        first_R[numbers] = watched.share_BE.argmax(1).numpy()
    return Outcome(loss_R, first_R)
