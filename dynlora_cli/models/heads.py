"""The output layer: whose classes a classifier answers with, new values where those are others, a weight of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def part_head(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """Give the output layer of a model without weights its own weight, where its config.json says that it has one.

    transformers 5 shares it in every T5, and parts the two when it sees that the files hold both.
    """
    outer = model.get_output_embeddings()
    if config.get("tie_word_embeddings") is False and outer is not None:
        own = getattr(outer, "weight", None)
        shared = getattr(model.get_input_embeddings(), "weight", None)
        if isinstance(own, nn.Parameter) and id(own) == id(shared):
            outer.weight = nn.Parameter(torch.empty_like(own), requires_grad=False)
