"""Libraries whose keys are made by hand, and an encoder that knows where each text lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynlora_cli.files.whole import write_json
from dynlora_cli.library.calibration import Confidence, Threshold
from dynlora_cli.library.features import Background
from dynlora_cli.library.forms import BaseOf, Card, EncoderOf, EntryForm, LibraryForm
from dynlora_cli.library.held_out import write_held_out
from dynlora_cli.library.keys import Key, write_texts, write_vectors
from dynlora_cli.library.learn import Calibration, Judge
from dynlora_cli.library.library import LIBRARY, Library, Paths

HASH = "0" * 64
SCORE_ALONE = Confidence((10.0, 0.0, 0.0), -5.0)  # evidence is 10 x score - 5
Updates = dict[str, tuple[str, dict[str, Sequence[float]]]]  # date, and vectors of keys by their texts


class Places:
    """An encoder that knows where each text lies."""

    name, dimension, fingerprint = "places", 3, HASH

    def __init__(self, at: dict[str, Sequence[float]]) -> None:
        self.at = at

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.array([self.at.get(text, (0, 0, 0)) for text in texts], dtype=np.float32).reshape(-1, 3)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)


def entry(root: Path, name: str, date: str, keys: dict[str, Sequence[float]]) -> EntryForm:
    paths = Paths(root, name)
    vectors = write_vectors(paths.vectors, Places(keys).encode(list(keys)))
    texts = write_texts(paths.texts, [Key(text, f"row {number}") for number, text in enumerate(keys)])
    held_out = write_held_out(paths.held_out, [])
    return EntryForm(
        name=name, date=date, tags=[], sha256=HASH, data_sha256=None, trained=None, sources=[], card=Card(), files={},
        vectors=vectors, texts=texts, held_out=held_out,
    )  # fmt: skip


def library(
    root: Path,
    updates: Updates,
    *,
    seen: Sequence[str] | None = None,
    above: float = 0.0,
    at_most: int = 1,
    calibrated: bool = True,
) -> Library:
    """A library whose evidence for an update is 10 x score - 5, and needs to be above `above`."""
    root.mkdir()
    names = tuple(updates if seen is None else seen)
    background = Background((0.0,) * len(names), (1.0,) * len(names))
    learned = Calibration(names, Judge(SCORE_ALONE, background), Threshold(above, 0.01, 100, True), at_most, {})
    form = LibraryForm(
        schema_version=1,
        base=BaseOf(name="base", model_type="llama", fingerprint={"sha256": HASH, "sampled_sha256": HASH}),
        encoder=EncoderOf(name="places", dimension=3, fingerprint=HASH),
        entries=[entry(root, name, *rest) for name, rest in updates.items()],
        calibration=learned.as_dict() if calibrated else None,
    )
    write_json(root / LIBRARY, form.model_dump())
    return Library.open(root)


APART: Updates = {"law": ("2026-01-01", {"the law": (1, 0, 0)}), "news": ("2026-02-01", {"the news": (0, 1, 0)})}
