"""What a hypernetwork is: a file in hypernets/kinds/ with these names, beside a variant of the same name.

READS = "description"
    What it writes adapters from. "description": a text about the task, of which an encoder makes one vector.
    "document": a text that the frozen base itself reads; the network gets what goes on in the base's layers then.

Net
    A class under `Hypernet`.

The variant (a file of lora/variants/ of the same name) says `has_components = False` and `hypernet = True`, and has the
recipe's keys (OPTIONS) and what does not go with them (CONFLICTS): both are read before torch is loaded. Without
`rank.init` a network writes twice the components of `rank.budget`, and the smallest are left out of an adapter;
`writes_budget = True` if it is to write just as many.

A hypernetwork writes, for each condition and each layer, components:

    y = W x + Σ_c  g_c b_c (a_c · x)

The scale s of a LoRA is a part of what is written: nothing is multiplied with it afterwards.

Dimensions, as suffixes of names:
    B  conditions: texts, or documents      D  numbers of a condition's vector
    C  components of a layer                I  inputs of the layer (d_in)      O  outputs of the layer (d_out)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """A layer that components are written for.

    Attributes:
        name: of the layer in the model.
        d_in, d_out: its inputs and outputs.
        rank: components that it gets (C).
        depth: number of its block, from 0.
        module: its name inside its block, such as mlp.down_proj. Places of one module have the same shape.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    depth: int
    module: str


class Written(NamedTuple):
    """Components of one layer; the scale is in them.

    Attributes:
        a: [C, I], shared by all conditions, or [B, C, I].
        b: [O, C], shared, or [B, O, C].
        gate: [B, C], a factor for each component; None: no factor. At least one of the three is by condition.
    """

    a: Tensor
    b: Tensor
    gate: Tensor | None = None


class Hypernet(nn.Module):
    """A network that writes adapters.

    Everything that trains is a parameter; what else belongs to it, such as means over known adapters, is a buffer. Both
    are saved. First values are drawn from torch's generator, which is seeded whenever one is made for a run.

    Args:
        places: the layers that it writes for.
        options: the section `adapter` of the recipe with the variant's own keys, as attributes.
        width: numbers of a condition's vector (D); where documents are read, the width of the base's hidden states.
        scale: s of the update, to be put into what is written.
    """

    regular = False  # True: `penalty` has something to say

    def __init__(self, places: Sequence[Place], options: Any, width: int, scale: float) -> None:
        super().__init__()
        self.places, self.options, self.width, self.scale = tuple(places), options, width, scale

    def forward(self, condition: Any) -> dict[str, Written]:
        """Write the components of every place, by its name.

        Args:
            condition: [B, D], vectors of descriptions in fp32; or the activations of documents, see
                hypernets/documents.py.
        """
        raise NotImplementedError

    def penalty(self, written: dict[str, Written]) -> Tensor | None:  # noqa: ARG002
        """A scalar to add to the loss of an optimizer step, of what was written for the step's conditions, or None."""
        return None

    def make_room(self, names: Collection[str]) -> None:
        """Before it is read from a file: have those of its tensors that not all networks of its kind have.

        Args:
            names: of the tensors in the file.
        """

    @property
    def parameter_count(self) -> int:
        """Numbers that train."""
        return sum(parameter.numel() for parameter in self.parameters())


def places_of(layers: Iterable[tuple[str, int, int, int]]) -> list[Place]:
    """The places of a model's layers.

    Args:
        layers: name, inputs, outputs and components of each, in the model's order.
    """
    found, shapes = list[Place](), dict[str, set[tuple[int, int]]]()
    for name, d_in, d_out, rank in layers:
        depth, module = _placed(name)
        found.append(Place(name, d_in, d_out, rank, depth, module))
        shapes.setdefault(module, set()).add((d_in, d_out))
    return [p if len(shapes[p.module]) == 1 else p._replace(module=f"{p.module} {p.d_in}x{p.d_out}") for p in found]


def by_module(places: Iterable[Place]) -> dict[str, list[Place]]:
    """The places of each module, in the order in which modules come first."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.module, []).append(place)
    return found


def _placed(name: str) -> tuple[int, str]:
    """Of a layer's name the number of its block and the rest: `model.layers.3.mlp.up_proj` is 3, `mlp.up_proj`."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return (0, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))
