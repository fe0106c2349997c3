"""Doc-to-LoRA: the frozen base reads a document, and from what its blocks are given an adapter is written.

    inputs of block l ── RMS norm ── Perceiver (the same for all blocks) ── one vector for each module and rank
      ── residual MLPs of the block ── L2 norm ── linear, of block and module ── a and b ── times a scaler of each

A document of n chunks has the components of all of them, side by side, and those that are learned once for all
documents: (n + 1)·r in each layer, whose sum is the update. The scale is in b.

Dimensions, as suffixes of names:
    N  chunks of all documents      L  blocks       T  tokens       D  width of the base's hidden states
    B  documents                    R  rank, or the modules of a block times the rank
    H  latent vector                I, O  inputs and outputs of a layer

Source: Charakorn et al. 2026, Doc-to-LoRA (arXiv 2602.15902), and its code. Ours: the RMS norm in front (blocks differ
in how large their inputs are by orders of magnitude; it has no numbers to learn), and each block's own input, where
theirs takes the last one behind the base's last norm. The number of parameters is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.hypernets.documents import Activations
from dynlora_cli.hypernets.hypernet import Hypernet, Place, Written, by_module
from dynlora_cli.hypernets.perceiver import Heads, Perceiver

READS = "document"


class Net(Hypernet):
    """See above, and hypernets/hypernet.py."""

    def __init__(self, places: Sequence[Place], options: Any, width: int, scale: float) -> None:
        super().__init__(places, options, width, scale)
        self.rank = max(place.rank for place in places)
        self.factor = scale * self.rank**1.5  # of b; 2·r^1.5 for the usual s, as in the source
        self.regular = options.l1 > 0
        modules = by_module(places)
        self.depths = sorted({place.depth for place in places})
        latent, layers = options.latent_size, len(self.depths)
        self.perceiver = Perceiver(
            width,
            len(modules) * self.rank,
            latents=options.latents,
            width=latent,
            blocks=options.blocks,
            heads=Heads(options.heads, options.kv_heads, options.head_size),
        )
        self.mlps = nn.ModuleList([LayerMLP(layers, latent) for _ in range(options.mlps)])
        self.heads = nn.ModuleList([Head(_by_depth(own), self.rank, latent) for own in modules.values()])

    def forward(self, condition: Activations) -> dict[str, Written]:
        """Write for documents.

        Args:
            condition: what the blocks were given, in the order of their depth.
        """
        inputs_LNTD = F.rms_norm(condition.inputs_NLTD, (self.width,)).transpose(0, 1)
        layers, chunks = inputs_LNTD.shape[:2]
        latent = self.perceiver(inputs_LNTD.flatten(0, 1), condition.mask_NT.repeat(layers, 1))
        latent_LNRH = latent.unflatten(0, (layers, chunks))
        for mlp in self.mlps:
            latent_LNRH = mlp(latent_LNRH)
        latent_LNRH = F.normalize(latent_LNRH, dim=-1)
        written = {}
        for head, part in zip(self.heads, latent_LNRH.split(self.rank, 2), strict=True):
            for place, own, new in head(part, self.depths):
                a_BCI, b_BCO = (side_by_side(*factors, condition.chunks) for factors in zip(own, new, strict=True))
                written[place.name] = Written(a_BCI, b_BCO.transpose(1, 2) * self.factor)
        return written

    def penalty(self, written: dict[str, Written]) -> Tensor | None:
        """`l1` times the mean |number| of a and of b before the scale, summed over the chunks of a document."""
        if not self.regular:
            return None
        sizes = []
        for place in self.places:
            a, b = written[place.name].a[:, self.rank :], written[place.name].b[:, :, self.rank :]
            sizes.append(a.abs().sum() / place.d_in + b.abs().sum() / (place.d_out * self.factor))
        return self.options.l1 * torch.stack(sizes).mean() / (len(a) * self.rank)


def _by_depth(places: Sequence[Place]) -> list[Place]:
    return sorted(places, key=lambda place: place.depth)


class LayerMLP(nn.Module):
    """A residual MLP with weights of its own for each block: LayerNorm, H to 4H, SiLU, back, LayerNorm."""

    def __init__(self, layers: int, latent: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(latent), nn.LayerNorm(latent)
        self.up, self.down = LayerLinear(layers, latent, 4 * latent), LayerLinear(layers, 4 * latent, latent)

    def forward(self, x_LNRH: Tensor) -> Tensor:
        """[L, N, R, H] to the same."""
        return x_LNRH + self.after(self.down(F.silu(self.up(self.before(x_LNRH)))))


class LayerLinear(nn.Module):
    """A linear layer with weights of its own for each block of the base; first values as of `nn.Linear`."""

    def __init__(self, layers: int, d_in: int, d_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight_LIO = nn.Parameter(torch.empty(layers, d_in, d_out).uniform_(-bound, bound))
        self.bias_LO = nn.Parameter(torch.empty(layers, d_out).uniform_(-bound, bound))

    def forward(self, x_LNRI: Tensor) -> Tensor:
        """[L, N, R, d_in] to [L, N, R, d_out]."""
        y = torch.baddbmm(self.bias_LO[:, None], x_LNRI.flatten(1, 2), self.weight_LIO)
        return y.unflatten(1, x_LNRI.shape[1:3])


class Head(nn.Module):
    """From latent vectors to the factors of one module: a linear layer for each block, scalers, and factors of its own.

    Args:
        places: of the module, by depth.
        rank: R.
        latent: H.
    """

    def __init__(self, places: Sequence[Place], rank: int, latent: int) -> None:
        super().__init__()
        self.places, self.d_in, self.d_out = list(places), places[0].d_in, places[0].d_out
        layers, size = len(places), self.d_in + self.d_out
        # As small as in the source: the numbers of a LoRA at its start, a vector of the latent being 1 long.
        self.weight_LHX = nn.Parameter(torch.randn(layers, latent, size) * (0.5 / math.sqrt(latent + size * rank)))
        self.scale_a_LR, self.scale_b_LR = (nn.Parameter(torch.full((layers, rank), x)) for x in (1.0, 0.0))
        self.a_LRI = nn.Parameter(torch.randn(layers, rank, self.d_in) * (0.2 / math.sqrt(self.d_in * rank)))
        self.b_LRO = nn.Parameter(torch.zeros(layers, rank, self.d_out))

    def forward(
        self, latent_LNRH: Tensor, depths: Sequence[int]
    ) -> list[tuple[Place, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """For each place its a [R, I] and b [R, O] of all documents, and a [N, R, I] and b [N, R, O] of every chunk.

        Args:
            latent_LNRH: of all blocks, each 1 long.
            depths: of these blocks.
        """
        latent_LNRH = latent_LNRH[[depths.index(place.depth) for place in self.places]]
        factors = (latent_LNRH.flatten(1, 2) @ self.weight_LHX).unflatten(1, latent_LNRH.shape[1:3])
        a_LNRI, b_LNRO = factors.split([self.d_in, self.d_out], -1)
        a_LNRI, b_LNRO = a_LNRI * self.scale_a_LR[:, None, :, None], b_LNRO * self.scale_b_LR[:, None, :, None]
        own, new = zip(self.a_LRI, self.b_LRO, strict=True), zip(a_LNRI, b_LNRO, strict=True)
        return list(zip(self.places, own, new, strict=True))


def side_by_side(own_RX: Tensor, new_NRX: Tensor, chunks: Sequence[int]) -> Tensor:
    """The components of all documents, then those of a document's chunks, one after the other. [B, (n+1)·R, X]

    Args:
        own_RX: of all documents.
        new_NRX: of all chunks.
        chunks: how many of them each document has; where it has fewer than another, 0 takes their place.
    """
    parts = [part.flatten(0, 1) for part in new_NRX.split(list(chunks))]
    return torch.cat([own_RX.expand(len(chunks), -1, -1), nn.utils.rnn.pad_sequence(parts, batch_first=True)], 1)
