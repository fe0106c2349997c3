"""Predictions of models on disk for the probe text, read tensor by tensor, so that any model can be checked."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynlora_cli.adapter import Adapter
from dynlora_cli.adapter_base import Place
from dynlora_cli.attach import attached
from dynlora_cli.probe import predictions
from dynlora_cli.stream import Read, reader, streamed, through_ties
from dynlora_cli.weights import Weights

CPU = torch.device("cpu")


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
