"""Adapters of diffusion pipelines that are merged: which go together, and in which number format the result is."""

from __future__ import annotations

from collections.abc import Sequence

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.images.names import DENOISERS
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import shown

BASES = ("ss_base_model_version", "modelspec.architecture")  # by which kohya's scripts say what a file is of


def refuse_other_pipeline(first: Adapter, other: Adapter) -> None:
    """Refuse two adapters that are of different pipelines, as far as their files tell.

    Raises:
        UsageError: they are.
    """
    if not (first.image and other.image):
        return
    for key in BASES:
        said = [adapter.image.metadata.get(key, "") for adapter in (first, other) if adapter.image]
        if all(said) and said[0] != said[1]:
            raise UsageError(
                f"{first.folder} and {other.folder} are of different pipelines: {shown(said[0])} and {shown(said[1])}",
                "merge adapters of one pipeline",
            )
    parts = [_denoisers(adapter) for adapter in (first, other)]
    if all(parts) and parts[0] != parts[1]:
        raise UsageError(
            f"{first.folder} and {other.folder} are of different pipelines: one has a {' and a '.join(parts[0])}, the "
            f"other a {' and a '.join(parts[1])}",
            "merge adapters of one pipeline",
        )


def _denoisers(adapter: Adapter) -> list[str]:
    return sorted({name.partition(".")[0] for name in adapter.layers} & set(DENOISERS))


def dtype_of(adapters: Sequence[Adapter]) -> str:
    """The number format that files of adapters have in common; float32 where they differ, or are PEFT's."""
    formats = {adapter.image.dtype if adapter.image else FULL for adapter in adapters}
    return formats.pop() if len(formats) == 1 else FULL
