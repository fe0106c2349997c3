"""Adapters on a diffusers UNet with a mask by timestep, written apart from dynlora: what its files say, computed plainly.

    y = W x + s sum_{i < r(t)} b_i a_i' x

Dimensions: C components, I inputs, O outputs, B rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Rank = Callable[[Tensor, int], Tensor]  # timesteps (B,) and components of a layer to components in use (B,)
TARGETS = (".attn1.to_", ".attn2.to_", ".ff.net.")


class Adapted(nn.Module):
    """A linear layer with components; `clock` holds the timesteps of the pass."""

    def __init__(self, base: nn.Linear, a_CI: Tensor, b_OC: Tensor, clock: dict[str, Any]) -> None:
        super().__init__()
        self.base, self.clock = base, clock
        self.a_CI, self.b_OC = nn.Parameter(a_CI), nn.Parameter(b_OC)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.a_CI.T
        if self.clock["rank"] is not None:
            count = len(self.a_CI)
            open_BC = torch.arange(count) < self.clock["rank"](self.clock["t"], count)[:, None]
            h = h * open_BC.view(-1, *[1] * (x.ndim - 2), count)
        return self.base(x) + h @ self.b_OC.T


def targets(unet: nn.Module) -> list[str]:
    """Linear layers of attention and feed-forward, as dynlora takes them by default."""
    return [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and any(t in f".{n}" for t in TARGETS)]


def put(unet: Any, factors: dict[str, tuple[Tensor, Tensor]], rank: Rank | None) -> list[nn.Parameter]:
    """Give a UNet components in place; returns what trains."""
    clock: dict[str, Any] = {"rank": rank, "t": None}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        clock["t"] = t.reshape(-1).float()

    unet.requires_grad_(False)
    unet.register_forward_pre_hook(look, with_kwargs=True)
    for name, (a, b) in factors.items():
        parent, last = name.rsplit(".", 1)
        setattr(unet.get_submodule(parent), last, Adapted(unet.get_submodule(name), a, b, clock))
    return [p for p in unet.parameters() if p.requires_grad]


def read(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a run folder or checkpoint, alpha / r in B."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
            found.setdefault(name, {})[side] = file.get_tensor(key)
    factors = {}
    for name, sides in found.items():
        count = len(sides["A"])
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank = next((v for k, v in ranks.items() if re.match(rf"(.*\.)?({k})$", name)), config["r"])
        alpha = next((v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", name)), config["lora_alpha"])
        assert rank == count, (name, rank, count)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        factors[name] = sides["A"].float(), sides["B"].float() * scale
    return factors


def falling(least: int, terms: int = 1) -> Rank:
    """T-LoRA's r(t)."""

    def rank(t: Tensor, count: int) -> Tensor:
        most = count // terms
        return terms * (((1000 - t) / 1000 * (most - least) + 1e-6).floor().long() + least)

    return rank


def rising(least: int) -> Rank:
    return lambda t, count: falling(least)(1000 - t, count)
