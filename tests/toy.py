"""A network small enough to check by hand: a Llama MLP with 12 inputs, and a pool over its three layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool

SHAPES = {"up": (12, 20), "gate": (12, 20), "down": (20, 8)}


class Net(nn.Module):
    """y = down(silu(gate x) * up x), a Llama MLP in small."""

    def __init__(self, scale: float = 0.7, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (d_in, d_out) in SHAPES.items():
            base = nn.Linear(d_in, d_out).requires_grad_(False)
            self.add_module(name, ComponentLinear(base, scale, dropout))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def layers(self):
        return {name: self.get_submodule(name) for name in SHAPES}


def make(counts=(4, 3, 2), *, dtype=torch.float32, **kwargs):
    """Where a test is about an equation and not about rounding, its type is float64."""
    net = Net(**kwargs)
    pool = Pool(net.layers(), dict(zip(SHAPES, counts, strict=True)), seed=1)
    net.to(dtype)
    pool.adopt(pool.values.detach().to(dtype), pool.counts)
    return net, pool


def fill(pool, seed=5):
    """Values as of a trained adapter: B is not zero."""
    with torch.no_grad():
        pool.values.copy_(torch.randn(pool.parameters, generator=torch.Generator().manual_seed(seed)) * 0.3)


def train(net, pool, optimizer, steps=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(16, width, generator=generator).to(pool.values.dtype) for width in (12, 8))
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses
