"""Odds ratio preference optimization: learn the chosen answer, and push its odds above those of the rejected one.

What it does
    The loss is the cross-entropy of the prompt and the chosen answer, a mean over the tokens of a micro-batch, plus
    `beta` times the log-sigmoid of the log of an odds ratio: how much more likely than not the chosen answer is, per
    token, beside the same of the rejected one. There is no reference.

When to use it
    With pairs, and without supervised fine-tuning before: it does both at once.

Reference
    Hong et al. 2024, ORPO (arXiv 2403.07691), equations 4 to 7; as in TRL's ORPOTrainer, with whose losses it is equal.
    There the paper's lambda is called beta as well.

Dimensions: P pairs, L lines, N targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.tasks.loss import IGNORE, target_losses
from dynlora_cli.tasks.preference import PreferenceObjective, above

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

FORMS = ("Preference",)
TEACHES = "to answer as the better of two"
TARGET = "pair"
MEASURED = (
    "accuracy",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
    "log_odds",
    "sft_loss",
)
OPTIONS = {
    "beta": {"type": "float", "default": 0.1, "above": 0, "help": "Weight of the odds ratio; lambda in the paper."},
}
CONFLICTS = [
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
        "why": "orpo learns the prompt with the chosen answer, and compares the answers",
        "hint": "leave it at auto",
    },
]


class Objective(PreferenceObjective):
    """The loss of pairs; see the head of this file."""

    options: Any
    needs_reference = False
    measured = MEASURED

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses_N, line_N, answer_N = _with_prompts(model, batch)
        lines = len(batch.labels)
        none_L = losses_N.new_zeros(lines)
        summed_L = none_L.index_add(0, line_N, -losses_N * answer_N)
        mean_L = summed_L / none_L.index_add(0, line_N, answer_N).clamp(min=1)
        chosen_P, rejected_P = mean_L.chunk(2)
        log_odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
        texts_L, sizes_L = none_L.index_add(0, line_N, losses_N), none_L.index_add(0, line_N, torch.ones_like(losses_N))
        text_P, size_P = texts_L.chunk(2)[0], sizes_L.chunk(2)[0]
        sft_P = len(text_P) * text_P / size_P.sum().clamp(min=1)  # its mean over pairs is that over tokens
        reward_P, other_reward_P = (
            self.options.beta * mean_L.detach().chunk(2)[0],
            self.options.beta * rejected_P.detach(),
        )
        return {
            "loss": sft_P - self.options.beta * F.logsigmoid(log_odds_P),
            "accuracy": above(reward_P, other_reward_P),
            "margin": reward_P - other_reward_P,
            "reward_chosen": reward_P,
            "reward_rejected": other_reward_P,
            "logp_chosen": chosen_P.detach(),
            "logp_rejected": rejected_P.detach(),
            "log_odds": log_odds_P.detach(),
            "sft_loss": sft_P.detach(),
        }


def _with_prompts(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all targets [N], those of the chosen lines' prompts among them; their lines; 1 where of an answer."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    whole = torch.full_like(batch.labels, IGNORE)
    whole[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:].long(), IGNORE)
    pairs = len(whole) // 2
    labels = torch.cat([whole[:pairs], batch.labels[pairs:]])
    if not batch.rows:
        labels = torch.full_like(labels, IGNORE)
    places = (labels.flatten() != IGNORE).nonzero()[:, 0]
    losses_N, line_N = target_losses(model, replace(batch, labels=labels, places=places))
    return losses_N, line_N, (batch.labels.flatten()[places] != IGNORE).to(losses_N)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of negative numbers. Source: Mächler 2012, Accurately computing log(1 - exp(-|a|))."""
    # Of numbers so near 0 that nothing is left, the largest that is below it: a sure answer has odds, not infinity.
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    small = x > -0.6931472
    return torch.where(small, (-x.clamp(min=-1.0).expm1()).log(), (-x.clamp(max=-0.5).exp()).log1p())
