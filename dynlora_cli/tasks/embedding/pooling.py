"""From the hidden states of tokens to one vector for each text.

Dimensions: L lines, T tokens of the longest, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import nn


def _mean(hidden_LTD: Tensor, mask_LT: Tensor) -> Tensor:
    weights_LT1 = mask_LT.unsqueeze(-1).to(hidden_LTD.dtype)
    return (hidden_LTD * weights_LT1).sum(1) / weights_LT1.sum(1).clamp(min=1e-9)


def _cls(hidden_LTD: Tensor, mask_LT: Tensor) -> Tensor:  # noqa: ARG001 - one signature for all
    return hidden_LTD[:, 0]


def _last(hidden_LTD: Tensor, mask_LT: Tensor) -> Tensor:
    lines = torch.arange(len(hidden_LTD), device=hidden_LTD.device)
    return hidden_LTD[lines, mask_LT.sum(1) - 1]  # padding is on the right


def _max(hidden_LTD: Tensor, mask_LT: Tensor) -> Tensor:
    return hidden_LTD.masked_fill(mask_LT.unsqueeze(-1) == 0, -torch.inf).amax(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": _cls, "last": _last, "max": _max}


@dataclass(frozen=True)
class Reading:
    """How a text becomes a vector.

    Attributes:
        pooling: mean | cls | last | max, over the tokens of the text and its prompt.
        normalize: vectors have length 1.
        query_prompt, passage_prompt: what is put before a query, and before a passage.
        longest: tokens that are read of a text; None: as many as the model knows.
        lower_case: texts are written small before they are read.
    """

    pooling: str
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    longest: int | None = None
    lower_case: bool = False

    def vectors(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Of lines of tokens: fp32, [L, D].

        Args:
            model: gives `last_hidden_state` [L, T, D].
            inputs: input_ids and attention_mask, [L, T], padded on the right.
        """
        hidden_LTD = model(**inputs).last_hidden_state
        with torch.autocast(hidden_LTD.device.type, enabled=False):
            vector_LD = POOLINGS[self.pooling](hidden_LTD.float(), inputs["attention_mask"])
            return F.normalize(vector_LD, dim=1) if self.normalize else vector_LD
