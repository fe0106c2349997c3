"""A picture with its caption, as a denoiser learns it.

Which timestep and noise a row has in a pass over the rows follows from the run's seed, the row's number and the pass
alone: a run that goes on draws what the uninterrupted one would have drawn.

A row that is trained on may have a prior: a picture of its class, of many that the pipeline drew, stands beside it in
each pass. The two are lines of a batch, which has all rows first, and then what is beside each of them.

Dimensions: B rows and those beside them, C channels, H lines and W columns of latents.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from dynlora_cli.data.examples import Example, Judge, Lines, Targets

if TYPE_CHECKING:
    from dynlora_cli.tasks.images.picture import Picture
    from dynlora_cli.tasks.images.studio import Studio


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn for a row in a pass.

    Args:
        timestep: from 0, the least noise, to T.
        noise: seed of the noise.
        dropped: it is learned without its caption.
        mirrored: left and right are changed.
    """

    timestep: float
    noise: int
    dropped: bool
    mirrored: bool


@dataclass(frozen=True, slots=True)
class Prior:
    """Pictures of a class that are learned beside the rows.

    Args:
        caption: of all of them.
        input_ids: its tokens.
        pictures: as the pipeline drew them.
    """

    caption: str
    input_ids: Sequence[int]
    pictures: Sequence[Picture]


@dataclass(slots=True)
class Pictured(Example):
    """A picture and its caption.

    Args:
        input_ids: tokens of the caption.
        caption: the caption.
        picture: the picture.
        row: as of `Example`.
        studio: makes latents and conditions of them, once.
        judge: as of `Example`.
        confidence: as of `Example`.
        drawn: for the pass that it stands in a batch of; None: for none.
        prior: what is learned beside it; None: nothing.
        beside: the picture of the prior that is learned beside it in this pass.
    """

    one_target: ClassVar[bool] = True
    renewed: ClassVar[bool] = True

    input_ids: Sequence[int]
    caption: str
    picture: Picture
    row: int
    studio: Studio
    judge: Judge | None = None
    confidence: float = 1.0
    drawn: Drawn | None = None
    prior: Prior | None = None
    beside: Pictured | None = None

    @property
    def lines(self) -> Sequence[Sequence[int]]:
        return [self.input_ids] if self.beside is None else [self.input_ids, self.beside.input_ids]

    @property
    def texts(self) -> list[Sequence[int]]:
        return list(self.lines)

    @property
    def label_ids(self) -> Sequence[int]:
        """The picture's hash, in numbers of 32 bits: what tells rows apart."""
        return np.frombuffer(self.picture.digest, dtype="<i4").tolist()

    @property
    def key(self) -> int:
        """A number of 63 bits that is the picture's alone: seed of the noise that it is measured with."""
        return int.from_bytes(self.picture.digest[:8], "little") >> 1

    def supervised(self) -> int:
        """One: the picture."""
        return 1

    def in_pass(self, seed: int, epoch: int) -> Pictured:
        chance = random.Random(f"{seed} picture {self.row} in pass {epoch}")  # hashed alike on every machine
        other = copy.copy(self)
        other.drawn = Drawn(
            timestep=self.studio.pipeline.noising.drawn(chance),
            noise=chance.getrandbits(62),
            dropped=chance.random() < self.studio.caption_dropout,
            mirrored=self.studio.mirrors and chance.random() < 0.5,
        )
        if self.prior is not None:  # drawn last, so that the row's own are what they are without it
            other.beside = self._of_prior(self.prior, chance)
        return other

    def _of_prior(self, prior: Prior, chance: random.Random) -> Pictured:
        """A picture of the prior; never mirrored nor without its caption, as it is to stay what the pipeline draws."""
        other = copy.copy(self)
        other.prior, other.input_ids, other.caption = None, prior.input_ids, prior.caption
        other.picture = chance.choice(prior.pictures)
        timestep = self.studio.pipeline.noising.drawn(chance)
        other.drawn = Drawn(timestep, chance.getrandbits(62), dropped=False, mirrored=False)
        return other

    @staticmethod
    def targets(lines: Lines, width: int, even: Callable[[int], int]) -> Targets:  # noqa: ARG004
        """Of each row a zero, [B]: what is right is noise, and not among choices."""
        return np.zeros(len(lines), dtype=np.int64)

    @staticmethod
    def extra(examples: Sequence[Pictured]) -> dict[str, Tensor]:
        """
        timestep_B: of each row, fp32, 0 the least noise; whoever acts by timestep in training reads it here.
        noise_BCHW: of each row.
        seed_B: of the noise that the row is measured with.
        latents_BCHW: of the picture.
        shown_BCHW: of the picture, or of its mirror image; to train on.
        dropped_B: rows that are learned without their caption.
        prior_B: whether it stands beside a row.
        given.*: the denoiser's conditions, a row each; none.*: those without any caption, one row.
        """
        studio = examples[0].studio
        studio.prepare()
        rows = [*examples, *(each.beside for each in examples if each.beside is not None)]
        drawn = [each.drawn for each in rows]
        found = {
            "timestep_B": torch.tensor([one.timestep if one else 0.0 for one in drawn], dtype=torch.float32),
            "seed_B": torch.tensor([each.key for each in rows]),
            "prior_B": torch.arange(len(rows)) >= len(examples),
            "dropped_B": torch.tensor([bool(one and one.dropped) for one in drawn]),
            "latents_BCHW": torch.stack([studio.latents(each.picture) for each in rows]),
        }
        mirrored = [bool(one and one.mirrored) for one in drawn]
        shown = [studio.latents(each.picture, mirrored=turned) for each, turned in zip(rows, mirrored, strict=True)]
        found["shown_BCHW"] = torch.stack(shown)
        shape = found["latents_BCHW"].shape[1:]
        found["noise_BCHW"] = torch.stack([noise(one.noise if one else 0, shape) for one in drawn])
        return found | studio.conditions([(each.caption, each.picture) for each in rows])

    def shown(self, decode: Callable[[Sequence[int]], str], classes: Sequence[str] | None) -> list[tuple[str, bool]]:  # noqa: ARG002
        width, height = self.picture.size
        side = self.studio.side
        where = self.picture.content if not isinstance(self.picture.content, bytes) else "in the row"
        return [(f"{self.caption}\n", False), (f"picture {where}, {width} x {height}, shown as {side} x {side}", True)]


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The same noise for a seed on every machine, as it is drawn on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
