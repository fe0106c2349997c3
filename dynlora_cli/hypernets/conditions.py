"""What a hypernetwork writes from, of rows and of texts: the network gets it as one condition for each.

    Conditions      what every kind of them can do
    Descriptions    vectors of texts about a task

Dimensions: B texts, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dynlora_cli.data.grounded import GroundedText

if TYPE_CHECKING:
    from dynlora_cli.data.examples import Example
    from dynlora_cli.retrieval.encoders import Encoder

SMALLEST = 1e-6  # of the spread of vectors; where all texts are the same, nothing is divided by 0


def texts_of(example: Example) -> Hashable:
    """What an adapter for a row may be written from: equal prompts that differ in it are different questions."""
    return example.description, tuple(example.context_ids) if isinstance(example, GroundedText) else ()


class Conditions(Protocol):
    """What rows come with, as conditions of a network.

    Attributes:
        width: numbers of a vector (D).
    """

    width: int

    def key(self, example: Example) -> Hashable:
        """What the adapter of a row is written from; rows with the same key have the same adapter."""
        ...

    def of(self, keys: Sequence[Any]) -> Any:
        """The condition of these keys, as `Hypernet.forward` takes it, on the device of the model."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What must be saved beside the network, by name."""
        ...


class Descriptions:
    """Vectors of descriptions, less the mean of those that were trained on, with numbers of about 1.

    The vectors of a language model's own states point much the same way; what tells them apart is what is left.

    Args:
        encoder: makes a vector of a text.
        mean_D, size: of the texts that were trained on.
        device: where vectors are wanted.
    """

    def __init__(self, encoder: Encoder, mean_D: Tensor, size: Tensor, device: torch.device) -> None:
        self.encoder, self.mean_D, self.size, self.device = encoder, mean_D, size, device
        self.width = len(mean_D)
        self._known: dict[str, Tensor] = {}

    @classmethod
    def to_train(
        cls, encoder: Encoder, texts: Iterable[str], others: Iterable[str], device: torch.device
    ) -> Descriptions:
        """Learn mean and size from the texts to train on.

        Args:
            encoder: makes a vector of a text.
            texts: to train on.
            others: to measure on, whose vectors are made now as well: later the base has layers in it.
            device: where vectors are wanted.
        """
        texts = sorted(set(texts))  # in an order that no row has a part in
        vectors_ND = torch.from_numpy(encoder.encode(texts)).float()
        mean_D = vectors_ND.mean(0) if len(texts) > 1 else torch.zeros(vectors_ND.shape[1])
        found = cls(encoder, mean_D, (vectors_ND - mean_D).square().mean().sqrt().clamp_min(SMALLEST), device)
        found.learn([*texts, *others])
        return found

    def key(self, example: Example) -> str:
        return example.description

    def of(self, keys: Sequence[str]) -> Tensor:
        self.learn(keys)
        return torch.stack([self._known[text] for text in keys])

    def learn(self, texts: Iterable[str]) -> None:
        """Make the vectors of texts that are not known yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors_BD = (torch.from_numpy(self.encoder.encode(new)).float() - self.mean_D) / self.size
            self._known |= dict(zip(new, vectors_BD.to(self.device), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        return {"mean_D": self.mean_D, "size": self.size}

    @classmethod
    def from_tensors(cls, encoder: Encoder, tensors: Mapping[str, Tensor], device: torch.device) -> Descriptions:
        """What `tensors` gave, of a file."""
        return cls(encoder, tensors["mean_D"], tensors["size"], device)
