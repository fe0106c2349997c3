"""A denoiser of two layers whose components go by the timestep, and what it computes, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import nn

from dynlora_cli import plugins
from dynlora_cli.lora.start import Start

T = torch.tensor([0, 130, 499, 500, 999])


class Denoiser(nn.Module):
    """Two layers around a mean, told a timestep as diffusers' denoisers are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 6)

    def forward(self, sample, timestep, caption=None):
        return self.second(torch.tanh(self.first(sample)))


def options(**changes):
    given = {"schedule": "falling", "power": 1.0, "min_rank": 1, "start": "vanilla", **changes}
    rest = {"alpha": "auto", "scaling": "lora", "dropout": 0.0, "old": "tune", "orthogonality": 0.0, "freeze_a": False}
    return SimpleNamespace(**given, **rest)


def timed(count=4, *, dtype=torch.float64, **changes):
    """A denoiser with filled components."""
    torch.manual_seed(0)
    model = Denoiser().requires_grad_(False)
    targets = {"first": model.first, "second": model.second}
    counts = {"first": count, "second": count - 1}
    pool = plugins.load("variants", "t-lora").attach(
        model, targets, Start(counts, 1, 1, float(count)), options(**changes), 3
    )
    model.to(dtype)
    pool.adopt(pool.values.detach().to(dtype), pool.counts)
    return model, pool


def fill(pool):
    with torch.no_grad():
        noise = torch.randn(pool.parameters, generator=torch.Generator().manual_seed(5))
        pool.values.add_(0.3 * noise.to(pool.values))


def rank_by_hand(t, most, least=1, power=1.0, horizon=1000):
    return math.floor(((horizon - t) / horizon) ** power * (most - least) + 1e-9) + least


def by_hand(model, pool, x, timesteps):
    """The same model row by row, from its factors and the formula."""
    rows = []
    for row, t in zip(x, timesteps.tolist(), strict=True):
        h = row
        for layer in pool.layers.values():
            a, b = layer.factors()
            r = layer.terms * rank_by_hand(t, layer.count)
            h = layer.base(h) + layer.scale * (h @ a[:r].T) @ b[:, :r].T
            h = torch.tanh(h) if layer is pool.layers["first"] else h
        rows.append(h)
    return torch.stack(rows)
