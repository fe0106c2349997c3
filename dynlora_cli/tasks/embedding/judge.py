"""The loss of a batch of texts that become vectors, and how well those rank.

Negatives of a query are all passages of its micro-batch that do not answer it: those of its own row, and those of
others. Its own passage in another row, and every passage that another row gives for the same query, is no negative.

Dimensions: B rows, L lines, M passages of all rows, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dynlora_cli.data import examples
from dynlora_cli.data.batches import Batch
from dynlora_cli.tasks.embedding import losses
from dynlora_cli.tasks.embedding.pooling import Reading
from dynlora_cli.tasks.embedding.ranking import correlation, ranking

Judged = tuple[Tensor, Tensor, Tensor, Tensor]
OF_SCORES = ("cosent", "cosine")  # losses of pairs with a score; the others are of pairs that belong together


@dataclass(frozen=True)
class VectorJudge(examples.Judge):
    """Judges batches of `Related` examples.

    Attributes:
        reading: how a text becomes a vector.
        loss_name: mnrl | triplet | cosent | cosine.
        scale: of mnrl and cosent.
        margin: of triplet.
        mini_batch: lines that are encoded with their graph in memory at a time; None: all of a column.
    """

    reading: Reading
    loss_name: str
    scale: float
    margin: float
    mini_batch: int | None = None

    @property
    def needs_negatives(self) -> bool:
        return self.loss_name == "triplet"

    @property
    def needs_differing_scores(self) -> bool:
        return self.loss_name == "cosent"

    def judged(self, model: nn.Module, batch: Batch) -> Judged:
        return self.of_vectors(self.vectors(model, batch), batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.mini_batch is None or batch.at_once or not torch.is_grad_enabled():
            return self._summed(self.vectors(model, batch), batch)
        return self._by_parts(model, batch)

    def tally(self) -> examples.Tally:
        return Ranked(self)

    def vectors(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Of every column of a batch, [lines, D]."""
        if batch.at_once:  # whoever looks at what layers are given knows the batch as one
            return list(self.reading.vectors(model, batch.inputs).split(list(batch.columns)))
        return [torch.cat([self.reading.vectors(model, part) for part in column]) for column in self._parts(batch)]

    def of_vectors(self, columns: list[Tensor], batch: Batch) -> Judged:
        """`judged`, of the vectors of a batch."""
        first_BD, second_BD, extra = columns[0], columns[1], batch.extra
        rows_B = torch.arange(len(first_BD), device=first_BD.device)
        if not batch.supervised:  # of a process that no row is left for: it takes part all the same
            none = rows_B[:0]
            return torch.cat(columns).sum(1)[:0], none, none, none
        with torch.autocast(first_BD.device.type, enabled=False):
            if self.loss_name == "mnrl":
                loss_B, choice_B = losses.ranked(first_BD, torch.cat(columns[1:]), _also_right(extra), self.scale)
                return loss_B, choice_B, rows_B, rows_B
            if self.loss_name == "triplet":
                row_N, wrong = extra["row_M"][len(second_BD) :], torch.cat(columns[2:])
                loss_B, missed_B = losses.triplet(first_BD, second_BD, wrong, row_N, self.margin)
                return loss_B, missed_B, torch.zeros_like(missed_B), rows_B
            if self.loss_name == "cosent":
                loss_B = losses.cosent(first_BD, second_BD, extra["score_B"], self.scale)
            else:
                loss_B = losses.cosine(first_BD, second_BD, extra["score_B"])
            return loss_B, rows_B, rows_B, rows_B

    def _summed(self, columns: list[Tensor], batch: Batch) -> Tensor:
        if not batch.supervised:
            return sum(vectors.sum() for vectors in columns) * torch.zeros((), device=columns[0].device)
        return self.of_vectors(columns, batch)[0].sum()

    def _parts(self, batch: Batch) -> list[list[dict[str, Tensor]]]:
        """The lines of every column, no wider than its longest, in parts of `mini_batch`."""
        found, start = [], 0
        for count, width in zip(batch.columns, batch.widths, strict=True):
            step, end = self.mini_batch or count, start + count
            cuts = [slice(at, min(at + step, end)) for at in range(start, end, step)]
            found.append([{name: of_L[cut, :width] for name, of_L in batch.inputs.items()} for cut in cuts])
            start = end
        return found

    def _by_parts(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of all rows together, with the graph of no more than `mini_batch` lines in memory.

        The vectors are made without a graph, the loss and its gradient by them; in the backward pass, each part is made
        again and passed its share back. Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory
        Limited Setup (arXiv 2101.06983), section 3.
        """
        passes = [[_Pass(self.reading, model, part) for part in column] for column in self._parts(batch)]
        with torch.no_grad():
            columns = [torch.cat([each.first() for each in column]) for column in passes]
        leaves = [vectors.requires_grad_() for vectors in columns]
        with torch.enable_grad():
            loss = self._summed(leaves, batch)
        gradients = torch.autograd.grad(loss, leaves)
        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        return _Again.apply(anchor, loss.detach(), passes, gradients)


class _Pass:
    """One part of a batch, to be encoded twice with the same dropout and in the same precision.

    Args:
        reading: makes the vectors.
        model: the model.
        inputs: of the part.
    """

    def __init__(self, reading: Reading, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.reading, self.model, self.inputs = reading, model, inputs
        self.device = inputs["input_ids"].device
        kind = self.device.type
        self.dtype, self.enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def first(self) -> Tensor:
        """The vectors; notes the random numbers that they begin with."""
        self.states = torch.get_rng_state(), _cuda_state(self.device)
        return self.reading.vectors(self.model, self.inputs)

    def again(self) -> Tensor:
        """The same vectors."""
        with _random(self.device, *self.states), torch.autocast(self.device.type, self.dtype, self.enabled):
            return self.reading.vectors(self.model, self.inputs)


class _Again(torch.autograd.Function):
    """A loss that is known, whose gradient comes from passes that are made again."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, passes: list[list[_Pass]], gradients: Any) -> Tensor:  # noqa: ARG004
        ctx.passes, ctx.gradients = passes, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        for column, gradient in zip(ctx.passes, ctx.gradients, strict=True):
            for each, share in zip(column, gradient.split([len(p.inputs["input_ids"]) for p in column]), strict=True):
                with torch.enable_grad():
                    vectors = each.again()
                torch.autograd.backward(vectors, share * grad)
        return None, None, None, None


def _cuda_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random(device: torch.device, state: Tensor, cuda: Tensor | None) -> Iterator[None]:
    """The random numbers of a moment; those of now are put back."""
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _also_right(extra: dict[str, Tensor]) -> Tensor:
    """Which passages some row of the batch gives for the query of each row. [B, M]"""
    query_B, passage_M = extra["query_key_B"], extra["passage_key_M"]
    same_query_BB = query_B[:, None] == query_B[None, :]
    same_passage_BM = passage_M[: len(query_B), None] == passage_M[None, :]
    return (same_query_BB.float() @ same_passage_BM.float()) > 0


class Ranked(examples.Tally):
    """How all queries that were judged rank all their passages; of pairs with scores, in which order they are."""

    def __init__(self, judge: VectorJudge) -> None:
        super().__init__(judge)
        self.vector_judge = judge
        self._batches: list[dict[str, np.ndarray]] = []

    def judged(self, model: nn.Module, batch: Batch) -> Judged:
        columns = self.vector_judge.vectors(model, batch)
        if batch.supervised:
            found = {"query": columns[0], "passage": torch.cat(columns[1:]), **batch.extra}
            self._batches.append({name: value.cpu().numpy() for name, value in found.items()})
        return self.vector_judge.of_vectors(columns, batch)

    def numbers(self) -> dict[str, float]:
        batches: list[dict[str, Any]] = gather_object(self._batches)  # of all processes
        if not batches:
            return {}
        found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0] if name != "row_M"}
        query, passage = (_unit(found[name]) for name in ("query", "passage"))
        if "score_B" in found:
            return {"spearman": correlation((query * passage).sum(1), found["score_B"])}
        right: dict[int, set[int]] = {}
        places: dict[int, int] = {}
        first: list[int] = []
        for at, key in enumerate(found["passage_key_M"].tolist()):
            if places.setdefault(key, len(places)) == len(first):
                first.append(at)
        for batch in batches:
            keys = batch["query_key_B"].tolist()
            for key, own in zip(keys, batch["passage_key_M"][: len(keys)].tolist(), strict=True):
                right.setdefault(key, set()).add(places[own])
        wanted = [right[key] for key in found["query_key_B"].tolist()]
        return {"passages": float(len(first)), **ranking(query, passage[first], wanted)}


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
