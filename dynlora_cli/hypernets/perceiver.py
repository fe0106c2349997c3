"""A Perceiver: a few latent vectors that look at many inputs, and then answer so many queries.

    B  rows of a batch                  D  numbers of an input
    T  inputs of the longest row        H  numbers of a latent vector
    Q  latent vectors, or queries       F  numbers inside a gated MLP

The blocks have cross-attention alone: latent vectors do not look at each other, as in Doc-to-LoRA.

Source: Jaegle et al. 2021, Perceiver IO (arXiv 2107.14795); the block's norms and gated MLP as in Laurençon et al.
2024, Idefics2 (arXiv 2405.02246), which Charakorn et al. 2026, Doc-to-LoRA (arXiv 2602.15902) take over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6  # of RMS norms


class Heads(NamedTuple):
    """Attention heads: of queries, of keys and values (which queries share), and the numbers of each."""

    queries: int
    keys: int
    size: int


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), as in Llama."""

    def __init__(self, d_in: int, d_inner: int, d_out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_in, d_inner, bias=False)
        self.up = nn.Linear(d_in, d_inner, bias=False)
        self.down = nn.Linear(d_inner, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_in] to [..., d_out]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class CrossAttention(nn.Module):
    """Latent vectors look at inputs of the same width.

    Args:
        width: H, of both.
        heads: see `Heads`.
    """

    def __init__(self, width: int, heads: Heads) -> None:
        super().__init__()
        self.size = heads.size
        self.q = nn.Linear(width, heads.queries * heads.size, bias=False)
        self.k = nn.Linear(width, heads.keys * heads.size, bias=False)
        self.v = nn.Linear(width, heads.keys * heads.size, bias=False)
        self.o = nn.Linear(heads.queries * heads.size, width, bias=False)

    def forward(self, latents_BQH: Tensor, inputs_BTH: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What the latent vectors read. [B, Q, H]"""
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q(latents_BQH), self.k(inputs_BTH), self.v(inputs_BTH))
        )
        mask = None if mask_BT is None else mask_BT[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(read.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Cross-attention and a gated MLP, each with an RMS norm before and after it, and a residual."""

    def __init__(self, width: int, heads: Heads) -> None:
        super().__init__()
        self.before_latents, self.before_inputs = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)
        self.attention = CrossAttention(width, heads)
        self.after_attention = nn.RMSNorm(width, EPSILON)
        self.before_mlp, self.after_mlp = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)
        self.mlp = GatedMLP(width, 4 * width, width)

    def forward(self, latents_BQH: Tensor, inputs_BTH: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The latent vectors after this block. [B, Q, H]"""
        read = self.attention(self.before_latents(latents_BQH), self.before_inputs(inputs_BTH), mask_BT)
        latents_BQH = latents_BQH + self.after_attention(read)
        return latents_BQH + self.after_mlp(self.mlp(self.before_mlp(latents_BQH)))


class Resampler(nn.Module):
    """Learned latent vectors that look at the inputs block after block.

    Args:
        latents: Q, how many.
        width: H.
        blocks: how often they look.
        heads: see `Heads`.
    """

    def __init__(self, latents: int, width: int, blocks: int, heads: Heads) -> None:
        super().__init__()
        self.latents_QH = nn.Parameter(torch.randn(latents, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm = nn.RMSNorm(width, EPSILON)

    def forward(self, inputs_BTH: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """What the latent vectors have read. [B, Q, H]"""
        latents = self.latents_QH.expand(len(inputs_BTH), -1, -1)
        for block in self.blocks:
            latents = block(latents, inputs_BTH, mask_BT)
        return self.norm(latents)


class Perceiver(nn.Module):
    """Inputs of any number to one vector for each query.

    Args:
        d_in: D, numbers of an input.
        queries: Q, vectors that come out.
        latents: vectors in between.
        width: H, of them and of what comes out.
        blocks: how often the vectors in between look at the inputs.
        heads: see `Heads`.
    """

    def __init__(self, d_in: int, queries: int, *, latents: int, width: int, blocks: int, heads: Heads) -> None:
        super().__init__()
        self.project = GatedMLP(d_in, 4 * d_in, width)
        self.reader = Resampler(latents, width, blocks, heads)
        self.decoder = Resampler(queries, width, 1, heads)

    def forward(self, inputs_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """What the queries are answered. [B, Q, H]

        Args:
            inputs_BTD: [B, T, D].
            mask_BT: true at inputs, false at padding; each row has one input at least.
        """
        return self.decoder(self.reader(self.project(inputs_BTD), mask_BT))
