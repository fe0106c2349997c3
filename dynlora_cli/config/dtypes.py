"""The number formats that an adapter's factors are saved in; known without torch."""

from __future__ import annotations

from typing import Literal

SavedDtype = Literal["float32", "bf16", "fp8"]
FULL: SavedDtype = "float32"
BYTES: dict[str, int] = {"float32": 4, "bf16": 2, "fp8": 1}
# Their names in the header of a safetensors file; fp8 is e4m3, with 4 bits of exponent and 3 of mantissa. fp16 is for
# adapters of diffusion pipelines, whose files usually have it.
IN_FILES = {"float32": "F32", "bf16": "BF16", "fp8": "F8_E4M3", "fp16": "F16"}
OF_IMAGES = ("float32", "fp16", "bf16")
# Read in their sources, or tried: scripts/bench/NOTES.md. An export converts for all of them.
READERS = {
    "fp8": "PEFT 0.21 reads fp8 as it is; mlx-lm does not, nor do older TensorRT-LLM and loaders that know no F8_E4M3: "
    "`dynlora export` writes what they read"
}


MUCH, MOST = 0.08, 0.5  # of the update: by so much fp8 changes one that is small for it, or too small


def rounding_note(dtype: str, lost: float, before: float | None = None, after: float | None = None) -> str:
    """What rounding did to an adapter, and who reads it now.

    Args:
        dtype: of its factors.
        lost: ‖ΔW' - ΔW‖ / ‖ΔW‖.
        before, after: held-out loss without and with it.
    """
    text = f"saved in {dtype}: rounding changes the update by {lost:.2%}"
    if before and after is not None:
        text += f", the held-out loss from {before:.4f} to {after:.4f} ({after / before - 1:+.2%})"
    if dtype == "fp8" and lost > MOST:
        text += "; most of it is lost, since its numbers are too small for fp8 at a scale of 1: save it in bf16"
    elif dtype == "fp8" and lost > MUCH:
        text += "; its numbers are small for fp8 at a scale of 1, and bf16 keeps more of them"
    return f"{text}; {READERS[dtype]}" if dtype in READERS else text
