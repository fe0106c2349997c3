"""What the files of a model would hold, for a plan that is made before anybody has fetched them: its config says it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig

from dynlora_cli.models import pickles
from dynlora_cli.models.alone import making_a_model
from dynlora_cli.models.weights import INDEX, SINGLE, Entry, Weights


class SupposedWeights(Weights):
    """The tensors that a model folder without weights would hold: names and shapes, nothing to read.

    Args:
        folder: with config.json.
        config: its content; the class named in its `architectures` is what the files would be of.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self.folder, self.entries = folder, {}
        name = next(iter(config.architectures or ()), "")
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return  # nobody knows: then everything that is asked for is new
        with making_a_model(), torch.device("meta"):
            model = kind(config)
        for key, tensor in model.state_dict().items():
            self.entries[key] = Entry(folder / SINGLE, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds weights, or an index that names them."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX, pickles.SINGLE, pickles.INDEX))
