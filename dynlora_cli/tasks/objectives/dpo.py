"""Direct preference optimization: of two answers, the chosen one is to gain on the reference more than the rejected.

What it does
    An answer's reward is `beta` times the log of how much more probable it has become than it was at the start of the
    run. The loss is small where the chosen answer's reward is above that of the rejected one; `loss_type` says how
    exactly. `beta` holds the model near the start: the higher, the nearer.

When to use it
    With pairs of answers to the same prompt, after supervised fine-tuning. Where the chosen answers lose probability
    as well (`logp_chosen` falls), raise `sft_weight`, or take `orpo`.

Reference
    Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), equation 7. The losses have the names that
    they have in TRL's DPOTrainer, and equal its. `label_smoothing` with sigmoid: Mitchell 2023, A note on DPO with
    noisy preferences, equation 3.

Dimensions: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.tasks.preference import PreferenceObjective, above, sequence_logps

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

FORMS = ("Preference",)
TEACHES = "which of two answers is better"
TARGET = "pair"
MEASURED = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
OPTIONS = {
    "beta": {
        "type": "float",
        "default": 0.1,
        "above": 0,
        "help": "How dear it is to leave the model that training starts from; with loss_type ipo it is called tau.",
    },
    "loss_type": {
        "type": "choice",
        "choices": [
            "sigmoid",
            "hinge",
            "ipo",
            "robust",
            "exo_pair",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
        ],
        "default": "sigmoid",
        "help": "What is made of the two rewards; names as in TRL.",
    },
    "label_smoothing": {
        "type": "float",
        "default": 0.0,
        "at_least": 0,
        "below": 0.5,
        "help": "Share of pairs that are taken to be the wrong way round; for sigmoid, robust and exo_pair.",
    },
    "sft_weight": {
        "type": "float",
        "default": 0.0,
        "at_least": 0,
        "help": "Weight of the chosen answers' cross-entropy beside it, a mean over the tokens of a micro-batch.",
    },
}
CONFLICTS = [
    {
        "with": "train.label_smoothing",
        "while": {
            "train.loss_type": [
                "hinge",
                "ipo",
                "nca_pair",
                "bco_pair",
                "sppo_hard",
                "apo_zero",
                "apo_down",
                "discopop",
                "sigmoid_norm",
            ]
        },
        "why": "sigmoid, robust and exo_pair alone have a use for it",
        "hint": "leave it at 0",
    },
    {
        "with": "train.label_smoothing",
        "is": 0,
        "while": {"train.loss_type": "exo_pair"},
        "why": "exo_pair takes the logarithm of it",
        "hint": "set it to 0.001, say",
    },
    {"with": "model.task", "is_not": "causal-lm", "why": "an answer's probability is that of a text that goes on"},
    {
        "with": "dataset.packing",
        "why": "the two answers of a pair stand in lines of their own",
        "hint": "set it to false",
    },
    {"with": "train.cuda_graphs", "why": "batches of pairs are not captured", "hint": "set it to false"},
    {"with": "dataset.retrieve", "why": "passages are put into prompts with one answer", "hint": "leave it out"},
    {"with": "pruning.policy", "is": "retrieval", "why": "it weighs rows by confidences that pairs do not have"},
    {"with": "adapter.library", "why": "a router learns from answers that are right", "hint": "leave it out"},
    {
        "with": "dataset.train_on",
        "is": ["assistant", "all"],
        "why": "of a preference the two answers are compared, and nothing else",
        "hint": "leave it at auto",
    },
]
DISCOPOP_TAU = 0.05


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a loss is made of.

    Attributes:
        chosen, rejected: log of how much more probable the answer has become than it was under the reference. [P]
        chosen_tokens, rejected_tokens: number of tokens of each. [P]
        beta, smoothing: of the recipe.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float
    smoothing: float

    @property
    def margin(self) -> Tensor:
        """The difference of the rewards. [P]"""
        return self.beta * (self.chosen - self.rejected)

    @property
    def per_token(self) -> Tensor:
        """The difference of what a token has gained on average. [P]"""
        return self.chosen / self.chosen_tokens.clamp(min=1) - self.rejected / self.rejected_tokens.clamp(min=1)


def _smoothed(pairs: Pairs) -> Tensor:
    right, wrong = F.logsigmoid(pairs.margin), F.logsigmoid(-pairs.margin)
    return -(1 - pairs.smoothing) * right - pairs.smoothing * wrong


def _robust(pairs: Pairs) -> Tensor:
    """Chowdhury et al. 2024 (arXiv 2403.00409)."""
    right, wrong = F.logsigmoid(pairs.margin), F.logsigmoid(-pairs.margin)
    return (-(1 - pairs.smoothing) * right + pairs.smoothing * wrong) / (1 - 2 * pairs.smoothing)


def _exo(pairs: Pairs) -> Tensor:
    """Ji et al. 2024 (arXiv 2402.00856), equation 16."""
    right, wrong = F.logsigmoid(pairs.margin), F.logsigmoid(-pairs.margin)
    gain = right.exp() * (right - math.log1p(-pairs.smoothing))
    return gain + wrong.exp() * (wrong - math.log(pairs.smoothing))


def _nca(pairs: Pairs) -> Tensor:
    """Chen et al. 2024 (arXiv 2402.05369)."""
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _discopop(pairs: Pairs) -> Tensor:
    """Lu et al. 2024 (arXiv 2406.08414), equation 5."""
    share = torch.sigmoid(pairs.margin / DISCOPOP_TAU)
    return -F.logsigmoid(pairs.margin) * (1 - share) + (-pairs.margin).exp() * share


# By `loss_type`, nats or what takes their place. [P]
LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _smoothed,
    "hinge": lambda pairs: torch.relu(1 - pairs.margin),  # Zhao et al. 2023 (arXiv 2305.10425)
    "ipo": lambda pairs: (pairs.per_token - 1 / (2 * pairs.beta)) ** 2,  # Azar et al. 2023 (arXiv 2310.12036), eq. 17
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": lambda pairs: (  # Jung et al. 2024 (arXiv 2404.04656)
        -F.logsigmoid(pairs.beta * pairs.chosen) - F.logsigmoid(-pairs.beta * pairs.rejected)
    ),
    "sppo_hard": lambda pairs: (  # Wu et al. 2024 (arXiv 2405.00675), equation 4.7
        (pairs.chosen - 0.5 / pairs.beta) ** 2 + (pairs.rejected + 0.5 / pairs.beta) ** 2
    ),
    "apo_zero": lambda pairs: (  # D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7
        1 - torch.sigmoid(pairs.beta * pairs.chosen) + torch.sigmoid(pairs.beta * pairs.rejected)
    ),
    "apo_down": lambda pairs: torch.sigmoid(pairs.beta * pairs.chosen) + 1 - torch.sigmoid(pairs.margin),  # equation 8
    "discopop": _discopop,
    "sigmoid_norm": lambda pairs: -F.logsigmoid(pairs.beta * pairs.per_token),
}


class Objective(PreferenceObjective):
    """The loss of pairs; see the head of this file."""

    options: Any
    measured = MEASURED

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps_L, tokens_L = sequence_logps(model, batch)
        ratios_L = logps_L - self.reference_logps(model, batch, logps_L)
        (chosen_P, rejected_P), (logp_P, other_P) = ratios_L.chunk(2), logps_L.chunk(2)
        size_P, other_size_P = tokens_L.chunk(2)
        beta, smoothing = self.options.beta, self.options.label_smoothing
        pairs = Pairs(chosen_P, rejected_P, size_P, other_size_P, beta, smoothing)
        loss_P = LOSSES[self.options.loss_type](pairs)
        if self.options.sft_weight:
            loss_P = loss_P - self.options.sft_weight * len(logp_P) * logp_P / size_P.sum().clamp(min=1)
        rewards = beta * ratios_L.detach()
        reward_P, other_reward_P = rewards.chunk(2)
        return {
            "loss": loss_P,
            "accuracy": above(reward_P, other_reward_P),
            "margin": reward_P - other_reward_P,
            "reward_chosen": reward_P,
            "reward_rejected": other_reward_P,
            "logp_chosen": logp_P.detach(),
            "logp_rejected": other_P.detach(),
        }
