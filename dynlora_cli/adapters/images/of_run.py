"""The adapter of a text-to-image run, which PEFT's files name by the denoiser alone, as one of its pipeline."""

from __future__ import annotations

from dataclasses import replace

from dynlora_cli.adapters.adapter import Adapter, ImageFile
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images.names import DENOISERS
from dynlora_cli.config.dtypes import FULL


def as_image(adapter: Adapter) -> Adapter | None:
    """The same adapter with the names that its layers have in the pipeline, which calls a denoiser by its model type.

    Returns:
        None: it is of no denoiser.
    """
    if adapter.image or adapter.model_type not in DENOISERS:
        return adapter if adapter.image else None
    layers = {f"{adapter.model_type}.{name}": factors for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers, image=ImageFile("diffusers", IMAGE_STEM, FULL))
