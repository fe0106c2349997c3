"""The output layer of a classifier: whose classes it answers with, and new values where those are others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def class_names(config: PretrainedConfig) -> list[str]:
    """The names that a model's config gives its classes, in the order of its outputs."""
    named = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return [named.get(number, f"LABEL_{number}") for number in range(config.num_labels or 0)]


def same_classes(labels: Sequence[str], own: Sequence[str]) -> bool:
    """Whether labels are a model's own classes in its own order, by their names or numbered from 0."""
    return list(labels) in (list(own), [str(number) for number in range(len(own))])


@torch.no_grad()
def renew(model: PreTrainedModel, head: str) -> None:
    """Draw the weights of a head's outputs anew, as those of a checkpoint without a head are."""
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for module in model.get_submodule(head).modules():
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels:
            module.weight.normal_(0, spread)
            if module.bias is not None:
                module.bias.zero_()
