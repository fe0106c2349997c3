"""Where a base model is, and its structure without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from dynlora_cli.config.sections import Model
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import load_structure


@dataclass(frozen=True)
class Place:
    """A base model on disk.

    Attributes:
        options: as in a recipe's `model` section.
        folder: its files.
        labels: class names, where the adapter is a classifier.
        chosen: the person named it, in place of the one on record.
    """

    options: Model
    folder: Path
    labels: list[str] | None
    chosen: bool

    @cached_property
    def files(self) -> BaseFiles:
        """What is in the folder."""
        return BaseFiles(self.options, self.folder, str(self.folder))


def structure(place: Place) -> PreTrainedModel:
    """The base model's modules without any weights."""
    return load_structure(place.options, place.folder, place.labels)


def input_table(model: PreTrainedModel) -> nn.Module | None:
    """The module that gives every token its row; None of a model that has none, such as one that hashes characters."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises then
        return None


def tied(model: PreTrainedModel) -> tuple[str, str] | None:
    """The names of the input table and of the output head where the two share one weight."""
    config = model.config.get_text_config()
    inner, outer = input_table(model), model.get_output_embeddings()
    if not getattr(config, "tie_word_embeddings", False) or inner is None or outer is None:
        return None
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    return names[id(inner)], names[id(outer)]
