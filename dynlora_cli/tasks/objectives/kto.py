"""Kahneman-Tversky optimization: answers that are good or bad, each alone; no pairs are needed.

What it does
    An answer's reward is `beta` times the log of how much more probable it has become than it was at the start of the
    run. A good answer is to have more than the model gives on average, a bad one less. That average, the KL divergence
    from the start, is estimated in every micro-batch on prompts with answers of other rows, without a gradient.

When to use it
    With thumbs up and down. Where one of the two is rare, give it a higher weight: the authors want `desirable_weight`
    times good rows to be 1 to 1.33 times `undesirable_weight` times bad rows.

Reference
    Ethayarajh et al. 2024, KTO (arXiv 2402.01306), equations 7 and 8; as in TRL's KTOTrainer, with whose losses it is
    equal.

Dimensions: B rows, L lines: those of the rows, then the same prompts with other answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.tasks.loss import evaluating
from dynlora_cli.tasks.preference import PreferenceObjective, above, sequence_logps, summed_over_processes

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

FORMS = ("Judged", "Preference")
TEACHES = "from answers that are good or bad"
TARGET = "row"
MEASURED = ("accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "kl")
OPTIONS = {
    "beta": {
        "type": "float",
        "default": 0.1,
        "above": 0,
        "help": "How dear it is to leave the model that training starts from.",
    },
    "loss_type": {
        "type": "choice",
        "choices": ["kto", "apo_zero_unpaired"],
        "default": "kto",
        "help": "apo_zero_unpaired compares with the start itself instead of the KL divergence from it.",
    },
    "desirable_weight": {"type": "float", "default": 1.0, "above": 0, "help": "Weight of good answers."},
    "undesirable_weight": {"type": "float", "default": 1.0, "above": 0, "help": "Weight of bad answers."},
}
CONFLICTS = [
    {
        "with": "train.micro_batch_size",
        "is": 1,
        "while": {"train.loss_type": "kto"},
        "why": "the KL divergence is estimated within a micro-batch, which takes more than one row",
        "hint": "set it to 2 or more, or write `loss_type: apo_zero_unpaired`",
    },
    {"with": "model.task", "is_not": "causal-lm", "why": "an answer's probability is that of a text that goes on"},
    {"with": "dataset.packing", "why": "every answer stands in a line of its own", "hint": "set it to false"},
    {"with": "train.cuda_graphs", "why": "batches of judged answers are not captured", "hint": "set it to false"},
    {
        "with": "dataset.retrieve",
        "why": "passages are put into prompts whose answers are right",
        "hint": "leave it out",
    },
    {"with": "pruning.policy", "is": "retrieval", "why": "it weighs rows by confidences that these rows do not have"},
    {"with": "adapter.library", "why": "a router learns from answers that are right", "hint": "leave it out"},
    {
        "with": "dataset.train_on",
        "is": ["assistant", "all"],
        "why": "the answer is judged, and nothing else",
        "hint": "leave it at auto",
    },
]


class Objective(PreferenceObjective):
    """The loss of judged answers; see the head of this file."""

    options: Any
    measured = MEASURED

    def rows(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        own, others = _halves(batch)
        # Before the pass with a gradient: compiled blocks keep what the last pass left for the backward pass.
        kl = self._kl(model, others)
        logps_B, _ = sequence_logps(model, own)
        ratios_B = logps_B - self.reference_logps(model, own, logps_B)
        good_B, beta = batch.extra["desirable_B"], self.options.beta
        above_B = torch.where(good_B, ratios_B - kl, kl - ratios_B)
        weight_B = torch.where(good_B, self.options.desirable_weight, self.options.undesirable_weight)
        logps_B, rewards_B = logps_B.detach(), beta * ratios_B.detach()
        none = torch.full_like(logps_B, torch.nan)
        return {
            "loss": weight_B * (1 - torch.sigmoid(beta * above_B)),
            "accuracy": above(above_B.detach(), 0.0),
            "reward_chosen": torch.where(good_B, rewards_B, none),
            "reward_rejected": torch.where(good_B, none, rewards_B),
            "logp_chosen": torch.where(good_B, logps_B, none),
            "logp_rejected": torch.where(good_B, none, logps_B),
            "kl": torch.full_like(logps_B, float(kl)) if not torch.is_tensor(kl) else kl.expand_as(logps_B),
        }

    def _kl(self, model: nn.Module, others: Batch) -> Tensor | float:
        """The KL divergence from the reference, nats, at least 0: the mean over all processes' rows."""
        if self.options.loss_type != "kto":
            return 0.0
        with evaluating(model):
            logps_B, _ = sequence_logps(model, others)
            gained_B = logps_B - self.reference_logps(model, others, logps_B)
        found = torch.stack([gained_B.sum(), gained_B.new_tensor(float(len(others.rows)))])
        summed, count = summed_over_processes(found)
        return (summed / count.clamp(min=1)).clamp(min=0)


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """The lines of the rows, and those with answers of other rows."""
    rows = len(batch.labels) // 2
    parts = []
    for lines in (slice(None, rows), slice(rows, None)):
        inputs, labels = {name: tensor[lines] for name, tensor in batch.inputs.items()}, batch.labels[lines]
        keys = batch.line_keys[lines]
        parts.append(replace(batch, inputs=inputs, labels=labels, places=None, columns=(), line_keys=keys))
    return parts[0], parts[1]
