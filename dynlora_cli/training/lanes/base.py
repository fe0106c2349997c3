"""One frozen base for several runs, each of which has a model of its own that is made of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

from transformers import PreTrainedModel

from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.execution.blocks import draws
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import Base, load_base

LONGEST_DECIDES = ("dynamic", "longrope")  # kinds of rotary positions that depend on the longest row of a batch


class SharedBase:
    """Loads a base once, for whoever asks first.

    Args:
        load: reads the weights.
    """

    def __init__(self, load: Callable[..., Base] = load_base) -> None:
        self._load = load
        self._first: Base | None = None

    def load(self, options: Model, files: BaseFiles, tokenizer: Any, **how: Any) -> Base:
        """As `load_base`, with the arguments of every call alike: a model of the asker's own, on the shared weights.

        Raises:
            UsageError: a row gets something else from this model where other rows stand beside it.
        """
        if self._first is None:
            first = self._load(options, files, tokenizer, **how)
            refuse_dependent_rows(first.model)
            self._first = first
        return replace(self._first, model=self.model(), tokenizer=tokenizer, files=files, rows={})

    def model(self) -> PreTrainedModel:
        """Another model on the weights: with modules, config and hooks of its own, and the same tensors."""
        assert self._first is not None
        return on_same_weights(self._first.model)


def on_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose parameters and buffers are those of the original, not copies of them."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def refuse_dependent_rows(model: PreTrainedModel) -> None:
    """Check that a row gets the same from the model whatever rows stand beside it.

    Raises:
        UsageError: it does not.
    """
    settings = model.config.get_text_config()
    rotary = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    why = None
    if draws(model):
        why = "it draws random numbers in training (dropout), which runs side by side would share"
    elif rotary.get("rope_type", rotary.get("type")) in LONGEST_DECIDES:
        why = "its rotary positions depend on the longest row of a batch"
    if why:
        raise UsageError(f"runs do not share passes through {model.name_or_path}: {why}", "train one after the other")
