"""Predictions of models on disk for the probe text, read tensor by tensor, so that any model can be checked."""

from __future__ import annotations

import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynlora_cli.adapter import Adapter
from dynlora_cli.adapter_base import Place
from dynlora_cli.attach import attached
from dynlora_cli.held_out import read_tokenizer
from dynlora_cli.probe import predictions, probe_rows, random_rows
from dynlora_cli.stream import Read, reader, streamed, through_ties
from dynlora_cli.weights import Weights

CPU = torch.device("cpu")
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")


def rows_to_compare(adapter: Adapter, place: Place) -> list[Tensor]:
    """The probe text as the adapter's tokenizer reads it; random tokens where there is no tokenizer."""
    if any((folder / name).is_file() for folder in (adapter.folder, place.folder) for name in TOKENIZER_MARKS):
        return probe_rows(read_tokenizer(adapter, place))
    return random_rows(json.loads((place.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def predictions_of(
    place: Place, rows: list[Tensor], read: Read | None = None, *, tied_weights: bool = True
) -> list[Tensor]:
    """What the model of a folder predicts.

    Args:
        place: how to read the folder's config.
        rows: token ids, each [1, T].
        read: gives the parameters, where they are not in the folder's own files.
        tied_weights: of `read`: where the model shares one weight between table and head, only the table's is there.
    """

    def source(model: PreTrainedModel) -> Read:
        if read is None:
            return reader(Weights(place.folder), model)
        return through_ties(read, model) if tied_weights else read

    return predictions(streamed(place, source), rows)


def adapted_predictions(adapter: Adapter, place: Place, rows: list[Tensor]) -> list[Tensor]:
    """What base and adapter predict together."""
    sources: list[Read] = []

    def source(model: PreTrainedModel) -> Read:
        sources.append(reader(Weights(place.folder), model, adapter.whole))
        return sources[0]

    model = streamed(place, source)
    with attached(model, adapter, device=CPU, read=sources[0], whole=False):
        return predictions(model, rows)
