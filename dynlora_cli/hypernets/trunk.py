"""The trunk of Text-to-LoRA: from a description's vector and a layer's place to features, from which heads write.

    vector -> Linear, LayerNorm ─┐
    depth  -> embedding, LayerNorm ├─ mixer ── block 1 ── block 2 ── out      one row for each condition and place
    module -> embedding, LayerNorm ┘

Dimensions, as suffixes of names:
    B  conditions      P  places      D  numbers of a condition's vector
    Z  the latent: half of it of the vector, a quarter of the depth, a quarter of the module
    H  features that heads write from

Dropout is where the authors' code has it: before, inside and behind the mixer, inside and behind each block, and inside
the last part.

Source: Charakorn et al. 2025, Text-to-LoRA (arXiv 2506.06105), and its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynlora_cli.hypernets.hypernet import Place, by_module


class Trunk(nn.Module):
    """Features of every condition in every place.

    Args:
        places: in the order of P.
        width: D.
        latent: Z.
        hidden: H, and the width inside of its parts.
        dropout: its probability while training.

    Attributes:
        names: what places are called inside their blocks, in the order of their embeddings.
        module_P, depth_P: which of them, and which block, each place is.
    """

    module_P: Tensor
    depth_P: Tensor

    def __init__(
        self, places: Sequence[Place], width: int, latent: int = 128, hidden: int = 512, dropout: float = 0.05
    ) -> None:
        super().__init__()
        self.names = list(by_module(places))
        modules = {name: number for number, name in enumerate(self.names)}
        depths = {depth: number for number, depth in enumerate(sorted({place.depth for place in places}))}
        module_P, depth_P = ([modules[p.module] for p in places], [depths[p.depth] for p in places])
        self.register_buffer("module_P", torch.tensor(module_P), persistent=False)
        self.register_buffer("depth_P", torch.tensor(depth_P), persistent=False)
        quarter = latent // 4
        half = latent - 2 * quarter
        self.text = nn.Sequential(nn.Linear(width, half), nn.LayerNorm(half))
        self.depth = nn.Sequential(nn.Embedding(len(depths), quarter), nn.LayerNorm(quarter))
        self.module = nn.Sequential(nn.Embedding(len(self.names), quarter), nn.LayerNorm(quarter))
        drop = nn.Dropout(dropout)
        self.mixer = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), drop, nn.Linear(hidden, latent), nn.SiLU(), drop
        )
        self.block1, self.block2 = Block(latent, hidden, drop), Block(latent, hidden, drop)
        self.out = nn.Sequential(
            nn.LayerNorm(latent), nn.Linear(latent, hidden), _silu_drop(drop), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.drop = drop

    def forward(self, condition_BD: Tensor) -> Tensor:
        """[B, P, H]"""
        return self.second(self.first(condition_BD))

    def first(self, condition_BD: Tensor) -> Tensor:
        """The latent behind the first block, to which a head may add what it tells apart. [B, P, Z]"""
        text_BZ, place_PZ = (
            self.text(condition_BD),
            torch.cat([self.depth(self.depth_P), self.module(self.module_P)], 1),
        )
        shape = (len(text_BZ), len(place_PZ), -1)
        mixed = torch.cat([text_BZ[:, None].expand(shape), place_PZ[None].expand(shape)], -1)
        return self.block1(self.mixer(self.drop(mixed)))

    def second(self, latent_BPZ: Tensor) -> Tensor:
        """From there to the features. [B, P, H]"""
        return self.out(self.block2(latent_BPZ))

    def of_module(self, name: str) -> Tensor:
        """The places of a module, as indices of P."""
        return (self.module_P == self.names.index(name)).nonzero()[:, 0]


def _silu_drop(drop: nn.Dropout) -> nn.Module:
    """Both in one place of a sequence, so that networks of files keep the names of what comes behind."""
    return nn.Sequential(nn.SiLU(), drop)


class Block(nn.Module):
    """A residual block: LayerNorm and two linear layers."""

    def __init__(self, latent: int, hidden: int, drop: nn.Dropout) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(latent),
            nn.Linear(latent, hidden),
            _silu_drop(drop),
            nn.Linear(hidden, latent),
            nn.SiLU(),
            drop,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., Z] to [..., Z]"""
        return x + self.inner(x)
