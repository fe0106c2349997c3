"""How many components a layer uses at a timestep.

    r(t) = floor(share(t)^power · (r_max - r_min)) + r_min          r_max: the components that the layer has

    falling   share = (T - t) / T     few where there is much noise: T-LoRA
    rising    share = t / T           the reverse, to compare with
    random    drawn anew              as many on average, whatever the noise, to compare with

T is the timestep of pure noise, in whatever unit the denoiser is told it. The first r(t) components are used, so their
order means something.

Source: T-LoRA, arXiv 2507.05964, equation 3, where power is called alpha.

Dimensions: B rows of a batch.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynlora_cli.errors import UsageError
from dynlora_cli.text import show

KEY = "dynlora_rank_by_timestep"  # in the metadata of a safetensors file
SHAPES = ("falling", "rising", "random")
NEAR = 1e-9  # rounding of a share in fp64; the shares of whole timesteps are never so near to the next number


@dataclass(frozen=True)
class Schedule:
    """The rule, and what it takes to carry it out.

    Attributes:
        timesteps: T.
        power: exponent of the share; above 1, fewer components at most timesteps.
        min_rank: components that are used at every timestep, where a layer has so many.
        shape: one of `SHAPES`.
        terms: products b aᵀ that make one component; they stand together in the files, and are used together.
        seed: of what is drawn.
    """

    timesteps: float = 1000
    power: float = 1.0
    min_rank: int = 1
    shape: str = "falling"
    terms: int = 1
    seed: int = 0

    def shares_B(self, timesteps_B: Tensor, step: int = 0) -> Tensor:
        """The share of r_max - r_min that rows at these timesteps use. [B], fp64

        Args:
            timesteps_B: of each row.
            step: of training; for what is drawn.
        """
        t_B = timesteps_B.detach().cpu().double()
        if self.shape == "random":
            draws = [random.Random(f"{self.seed} {step} {row} {t}").random() for row, t in enumerate(t_B.tolist())]
            share_B = torch.tensor(draws, dtype=torch.float64)
        else:
            share_B = (t_B if self.shape == "rising" else self.timesteps - t_B) / self.timesteps
        return share_B.clamp(0, 1) ** self.power

    def ranks_B(self, shares_B: Tensor, rank: int) -> Tensor:
        """Of a layer's components, in the files `rank` products, how many products each row uses. [B], int64"""
        most = rank // self.terms
        least = min(self.min_rank, most)
        return self.terms * ((shares_B * (most - least) + NEAR).floor().long() + least)

    def rank_at(self, timestep: float, rank: int) -> int:
        """The same at one timestep."""
        return int(self.ranks_B(self.shares_B(torch.tensor([timestep])), rank))

    def as_dict(self) -> dict[str, Any]:
        """For a file; `read` makes it again."""
        return asdict(self)

    def as_metadata(self) -> dict[str, str]:
        """For the metadata of a safetensors file."""
        return {KEY: json.dumps(self.as_dict(), sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None, place: str) -> Schedule | None:
    """The schedule in the metadata of a safetensors file; None where it holds none.

    Raises:
        UsageError: it cannot be read.
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        return read(json.loads(text), place)
    except (ValueError, RecursionError):
        raise _damaged(place, text) from None


def read(found: Any, place: str) -> Schedule:
    """A schedule from a file.

    Args:
        found: what stands there.
        place: where, for a message.

    Raises:
        UsageError: it is none.
    """
    number = (int, float)
    kinds: dict[str, Any] = {
        "timesteps": number,
        "power": number,
        "min_rank": int,
        "shape": str,
        "terms": int,
        "seed": int,
    }
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise _damaged(place, found)
    fits = all(isinstance(found[key], kind) and not isinstance(found[key], bool) for key, kind in kinds.items())
    if not fits or found["shape"] not in SHAPES:
        raise _damaged(place, found)
    positive = all(math.isfinite(found[key]) and found[key] > 0 for key in ("timesteps", "power"))
    if not positive or found["min_rank"] < 0 or found["terms"] not in (1, 2):
        raise _damaged(place, found)
    return Schedule(**found)


def _damaged(place: str, found: Any) -> UsageError:
    return UsageError(
        f"{place}: its rank by timestep is {show(found)}, which cannot be carried out",
        "copy the file again, or train again",
    )
