"""The choice of the next token, each row by its own wishes and from its own random numbers.

What shapes the distribution are transformers' own processors, in its order. A row's number is drawn from its own
generator, so its text depends on its seed and not on the rows beside it.

Dimensions: B rows, T tokens so far, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dynlora_cli.decoding.sampling import Sampling


class Draw(LogitsProcessor):
    """Leaves a greedy row as it is, and of a drawn one the chosen token alone: the most likely one is taken in the end.

    Attributes:
        failed: rows whose logits have become NaN.

    Args:
        samplings: one for each row.
        starts_B: where each row's own tokens begin, behind its padding.
        chances: give the random number for each row's next token, fp64 from 0 to 1.
    """

    def __init__(
        self, samplings: Sequence[Sampling], starts_B: Sequence[int], chances: Sequence[Callable[[], Tensor]]
    ) -> None:
        self.chances = chances
        self.failed: set[int] = set()
        self.penalized = [
            (row, starts_B[row], RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
            for row, sampling in enumerate(samplings)
            if sampling.repetition_penalty != 1
        ]
        alike: dict[tuple[float | None, ...], list[int]] = {}
        for row, sampling in enumerate(samplings):
            if sampling.do_sample:
                shape = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
                alike.setdefault(shape, []).append(row)
        self.drawn = [(torch.tensor(rows), _warpers(samplings[rows[0]])) for rows in alike.values()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores for the next token. input_ids [B, T], scores [B, V], fp32"""
        largest_B = scores.amax(-1)
        if largest_B.sum().isnan():  # also where one is inf and another -inf, which the next line tells apart
            lost = largest_B.isnan()
            self.failed |= set(lost.nonzero()[:, 0].tolist())
            scores[lost] = 0.0
        for row, start, penalty in self.penalized:
            scores[row : row + 1] = penalty(input_ids[row : row + 1, start:], scores[row : row + 1])
        for rows, warpers in self.drawn:
            rows_B = rows.to(scores.device)
            scores_BV = scores[rows_B]
            for warper in warpers:
                scores_BV = warper(input_ids, scores_BV)
            # Divided by a temperature next to nothing: what is likeliest then, is all that can be drawn.
            lost_B = ~scores_BV.amax(-1).isfinite()
            tokens_B = self._choose(rows.tolist(), scores_BV).where(~lost_B, scores[rows_B].argmax(-1))
            scores[rows_B] = -torch.inf
            scores[rows_B, tokens_B] = 0.0
        return scores

    def _choose(self, rows: Sequence[int], scores_BV: Tensor) -> Tensor:
        """A token for each of some rows: where its random number falls among the summed probabilities. [B]"""
        chances_B = torch.stack([self.chances[row]() for row in rows]).to(scores_BV.device)
        summed_BV = scores_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn_B1 = chances_B[:, None] * summed_BV[:, -1:]
        # The first whose sum is above the number: one without any probability never is.
        return torch.searchsorted(summed_BV, drawn_B1, right=True)[:, 0]


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """What transformers would apply, in its order."""
    found: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        found.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(top_p=float(sampling.top_p)))
    if sampling.min_p is not None:
        found.append(MinPLogitsWarper(min_p=float(sampling.min_p)))
    return found
