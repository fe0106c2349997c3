"""Latents of all pictures of a run and conditions of all captions: made once, before the first batch, and then kept.

The pipeline's encoders are let go as soon as they have seen everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynlora_cli.tasks.images.pipeline import XL, Conditions, Pipeline

if TYPE_CHECKING:
    from dynlora_cli.tasks.images.picture import Picture

Rows = Sequence[tuple[str, "Picture"]]  # of each its caption and its picture
AT_ONCE = 64  # pictures that are opened before their latents are made


class Studio:
    """What is made of the rows of a run.

    Args:
        pipeline: without its denoiser.
        side: pixels of a line of what the model is shown.
        caption_dropout: share of the rows that are learned without their caption.
        mirrors: left and right are changed in half of the passes.
    """

    def __init__(self, pipeline: Pipeline, side: int, caption_dropout: float, *, mirrors: bool) -> None:
        self.pipeline, self.side, self.caption_dropout, self.mirrors = pipeline, side, caption_dropout, mirrors
        self._waiting: list[tuple[str, Picture]] = []
        self._latents: dict[bytes, tuple[Tensor, ...]] = {}
        self._sizes: dict[bytes, Tensor] = {}
        self._given: dict[str, Conditions] = {}
        self._none: Conditions = {}

    def expect(self, rows: Rows) -> None:
        """Take note of rows that will be asked for."""
        self._waiting += rows

    def prepare(self) -> None:
        """Make what is needed of all rows that were noted."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        with self.pipeline.in_use():
            self._encode(sorted({caption for caption, _ in waiting} - self._given.keys()))
            pictures = {picture.digest: picture for _, picture in waiting}
            left = [picture for digest, picture in pictures.items() if digest not in self._latents]
            for at in range(0, len(left), AT_ONCE):
                part = left[at : at + AT_ONCE]
                squares, corners = zip(*(picture.square(self.side) for picture in part), strict=True)
                stacked = np.stack(squares)
                kinds = [stacked, np.ascontiguousarray(stacked[:, :, ::-1])] if self.mirrors else [stacked]
                latents = zip(*(self.pipeline.latents(pixels) for pixels in kinds), strict=True)
                for picture, found, corner in zip(part, latents, corners, strict=True):
                    self._latents[picture.digest] = tuple(one.clone() for one in found)
                    # SDXL is told the size that a picture had, where it was cut, and how large it is drawn.
                    width, height = picture.size
                    self._sizes[picture.digest] = torch.tensor([height, width, *corner, self.side, self.side]).float()

    def _encode(self, captions: list[str]) -> None:
        if not captions and self._none:
            return
        found, self._none = self.pipeline.conditions(captions or [""])
        for at, caption in enumerate(captions):
            self._given[caption] = {name: rows[at].clone() for name, rows in found.items()}

    def latents(self, picture: Picture, *, mirrored: bool = False) -> Tensor:
        """Of a picture of the rows, or of its mirror image, [C, H, W]."""
        return self._latents[picture.digest][int(mirrored)]

    def conditions(self, rows: Rows) -> Conditions:
        """Of the captions of rows, `given.` before each name, and of none, `none.` before it."""
        given = [self._given[caption] for caption, _ in rows]
        found = {f"given.{name}": torch.stack([one[name] for one in given]) for name in given[0]}
        found |= {f"none.{name}": rows for name, rows in self._none.items()}
        if self.pipeline.kind == XL:
            found["given.time_ids"] = torch.stack([self._sizes[picture.digest] for _, picture in rows])
        return found

    def known(self, captions: Sequence[str]) -> tuple[Conditions, Conditions]:
        """Conditions of captions of the rows, a row each, and of none; to draw by.

        Raises:
            KeyError: one is of no row that was prepared.
        """
        given = [self._given[caption] for caption in captions]
        return {name: torch.stack([one[name] for one in given]) for name in given[0]}, self._none
