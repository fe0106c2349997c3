"""Pairs of texts that a model reads at once, and the score that it gives them.

Dimensions: B rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.data import examples
from dynlora_cli.data.batches import Batch
from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Draft, Lines, Located, Targets
from dynlora_cli.data.forms import Graded
from dynlora_cli.tasks.embedding.ranking import correlation

Judged = tuple[Tensor, Tensor, Tensor, Tensor]


class ScoreJudge(examples.Judge):
    """Binary cross-entropy of one logit for each row, in nats; the score is the chance that it stands for."""

    def judged(self, model: nn.Module, batch: Batch) -> Judged:
        return self.of_logits(self.logits(model, batch), batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """One for every row, fp32 [B]."""
        logits_B1: Tensor = model(**batch.inputs).logits
        return logits_B1.float().squeeze(1)

    def of_logits(self, logit_B: Tensor, batch: Batch) -> Judged:
        """`judged`, of the logits of a batch."""
        if not batch.supervised:  # of a process that no row is left for: it takes part all the same
            none = torch.zeros(0, dtype=torch.long, device=logit_B.device)
            return logit_B[:0], none, none, none
        score_B, rows_B = batch.extra["score_B"], torch.arange(len(logit_B), device=logit_B.device)
        loss_B = F.binary_cross_entropy_with_logits(logit_B, score_B, reduction="none")
        return loss_B, (logit_B > 0).long(), (score_B > 0.5).long(), rows_B

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logit_B = self.logits(model, batch)
        return self.of_logits(logit_B, batch)[0].sum() if batch.supervised else logit_B.sum() * 0

    def tally(self) -> examples.Tally:
        return _Ordered(self)


class _Ordered(examples.Tally):
    """In which order the logits of all rows are, against their scores."""

    def __init__(self, judge: ScoreJudge) -> None:
        super().__init__(judge)
        self.score_judge = judge
        self._found: list[tuple[list[float], list[float]]] = []

    def judged(self, model: nn.Module, batch: Batch) -> Judged:
        logit_B = self.score_judge.logits(model, batch)
        if batch.supervised:
            self._found.append((logit_B.tolist(), batch.extra["score_B"].tolist()))
        return self.score_judge.of_logits(logit_B, batch)

    def numbers(self) -> dict[str, float]:
        found = gather_object(self._found)  # of all processes
        if not found:
            return {}
        logits, scores = (np.concatenate(part) for part in zip(*found, strict=True))
        return {"spearman": correlation(logits, scores)}


JUDGE = ScoreJudge()


@dataclass(slots=True)
class Scored(examples.Example):
    """A pair of texts and its score.

    Args:
        input_ids: tokens of both.
        score: from 0 to 1.
        row, confidence: as of `Example`.
        token_types: which of the two each token is of, where the tokenizer says it.
        judge: as of `Example`.
    """

    one_target: ClassVar[bool] = True

    input_ids: Sequence[int]
    score: float
    row: int
    token_types: Sequence[int] | None = None
    confidence: float = 1.0
    judge: examples.Judge | None = JUDGE

    @property
    def label_ids(self) -> Sequence[int]:
        """In millionths."""
        return [round(self.score * 1e6)]

    def supervised(self) -> int:
        """One."""
        return 1

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """[B], all 0: the scores are beside it."""
        return np.zeros(len(lines), dtype=np.int64)

    @staticmethod
    def extra(examples: Sequence[Scored]) -> dict[str, Tensor]:
        """score_B: of every row."""
        return {"score_B": torch.tensor([each.score for each in examples], dtype=torch.float32)}

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        return [(decode(self.input_ids), False), ("  score: ", False), (f"{self.score:g}", True)]


class ScoredEncoder(Encoder):
    """Both texts in one line, as the tokenizer joins pairs; where they are too long, the longer one is cut."""

    def encode(self, rows: list[Located]) -> list[Draft]:
        forms = [row.form for row in rows if isinstance(row.form, Graded)]
        first, second = [form.first for form in forms], [form.second for form in forms]
        whole = self.tokenizer(first, second, verbose=False)["input_ids"]
        cut = self.tokenizer(first, second, truncation="longest_first", max_length=self.max_length)
        types = cut.get("token_type_ids")
        drafts = []
        for number, form in enumerate(forms):
            draft = Draft(cut["input_ids"][number], [], json.dumps(form.first), score=form.score)
            draft.cut = len(whole[number]) > self.max_length
            draft.types = types[number] if types else None
            drafts.append(draft)
        return drafts

    def example(self, draft: Draft, row: int) -> Scored:
        types = array("i", draft.types) if draft.types else None
        assert draft.score is not None
        return Scored(array("i", draft.ids), draft.score, row, types, draft.confidence)
