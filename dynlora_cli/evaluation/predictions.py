"""Predictions of models on disk for the probe text, read tensor by tensor, so that any model can be checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import read_tokenizer
from dynlora_cli.adapters.replaced import lengthen, replacements
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.agreement import predictions, probe_rows, random_rows
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.load import load_base
from dynlora_cli.models.place import Place, input_table, structure
from dynlora_cli.models.streamed import Read, read_by, reader, streamed, through_ties, unreadable
from dynlora_cli.models.weights import Weights

CPU = torch.device("cpu")
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")


def rows_to_compare(adapter: Adapter, place: Place) -> list[Tensor]:
    """The probe text as the adapter's tokenizer reads it; random tokens where there is no tokenizer."""
    if any((folder / name).is_file() for folder in (adapter.folder, place.folder) for name in TOKENIZER_MARKS):
        return probe_rows(read_tokenizer(adapter, place))
    model = structure(place)
    table: Any = input_table(model)
    if table is None:
        raise UsageError(f"{place.folder} has no tokenizer to read a text with", "put the model's own beside it")
    before = len(table.weight)
    lengthen(model, replacements(model, adapter))
    return random_rows(min(before, len(table.weight)))


def predictions_of(
    place: Place,
    rows: list[Tensor],
    read: Read | None = None,
    *,
    tied_weights: bool = True,
    adapter: Adapter | None = None,
) -> list[Tensor]:
    """What the model of a folder predicts.

    Args:
        place: how to read the folder's config.
        rows: token ids, each [1, T].
        read: gives the parameters, where they are not in the folder's own files.
        tied_weights: of `read`: where the model shares one weight between table and head, only the table's is there.
        adapter: is in the parameters that `read` gives: they have the shapes that it gives them, and its biases.
    """
    if read is None:
        return predictions(_open(place)[0], rows)
    model = streamed(place)
    ties = through_ties(read, model)
    if adapter is not None:
        lengthen(model, replacements(model, adapter))
    read_by(model, ties if tied_weights else read)
    return predictions(model, rows)


def adapted_predictions(adapter: Adapter, place: Place, rows: list[Tensor]) -> list[Tensor]:
    """What base and adapter predict together."""
    model, read = _open(place, adapter)
    with attached(model, adapter, device=CPU, read=read, whole=read is None):
        return predictions(model, rows)


def _open(place: Place, adapter: Adapter | None = None) -> tuple[PreTrainedModel, Read | None]:
    """The model of a folder with what an adapter replaces in it, streamed, and what reads it.

    All of it in memory without the adapter, and None, where that cannot be.
    """
    model = streamed(place)
    layout = Layout(Weights(place.folder), model)
    found = replacements(model, adapter) if adapter else {}
    if not place.files.quantization and not unreadable(layout, found):
        lengthen(model, found)
        plain = reader(layout)

        def read(name: str) -> Tensor:
            return found[name].made(plain).float() if name in found else plain(name)

        read_by(model, read)
        return model, read
    as_stored = {"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False, "name_or_path": str(place.folder)}
    options = place.options.model_copy(update=as_stored)
    tokenizer: Any = place.files.tokenizer if place.labels else None
    base = load_base(options, place.files, tokenizer, device=CPU, labels=place.labels, seed=0)
    return base.model.eval(), None
