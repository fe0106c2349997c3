"""Whether the file of an adapter for a diffusion pipeline says what was to be written: by our reader and diffusers'."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.images.by_diffusers import loaded, lost_in_encoders
from dynlora_cli.adapters.images.names import DENOISERS
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.images.write import NEAR

READER = "diffusers"
# diffusers knows attention in kohya's form by that layer, and without it leaves out what it does not know, or fails.
_NO_OUT_PROJ = (
    "diffusers does not read all of {}, such as {}: in kohya's form it takes a text encoder's attention only with an "
    "out_proj; kohya's scripts, A1111 and ComfyUI read it, and so does diffusers after `dynlora export --to diffusers`"
)
NOT_CHECKED = "the file was read back, and what diffusers makes of it was not checked"


def check_file(adapter: Adapter, file: Path) -> dict[str, Any]:
    """Compare a file with the adapter that it was written from.

    Args:
        adapter: with the values that the file's number format has.
        file: as it was written.

    Returns:
        checked, reason and problem, as of `peft_check.check_files`; reader: who read it; diffusers: its version.
    """
    if lost := _others(adapter.layers, read_image(file).layers):
        return {"checked": True, "reader": "dynlora", "problem": f"{lost[0]} is another one in {file.name}"}
    try:
        found = loaded(file, adapter)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"checked": True, "reader": READER, "problem": f"it refuses {file.name}: {line}"}
    if found is None:
        return {"checked": False, "reason": f"{NOT_CHECKED}: diffusers or PEFT is not installed"}
    of_denoiser = {name: f for name, f in adapter.layers.items() if name.partition(".")[0] in DENOISERS}
    lost = _others(of_denoiser, found)
    problem = f"{len(lost)} layers are others, such as {lost[0]}" if lost else None
    if not problem and (nothing := lost_in_encoders(file, adapter)):
        if adapter.file_form == "kohya":
            return {"checked": False, "reason": _NO_OUT_PROJ.format(file.name, nothing[0])}
        problem = f"it puts nothing into {len(nothing)} layers, such as {nothing[0]}"
    version = importlib.metadata.version("diffusers")
    return {"checked": True, "reader": READER, "diffusers": version, "problem": problem}


def _others(wanted: Mapping[str, Factors], found: Mapping[str, Factors]) -> list[str]:
    """Layers that are not the same."""
    return [name for name in wanted.keys() | found.keys() if not _equal(wanted.get(name), found.get(name))]


def _equal(one: Factors | None, two: Factors | None) -> bool:
    if one is None or two is None or one.kernel != two.kernel or one.b_OC.shape != two.b_OC.shape:
        return False
    return one.a_CI.equal(two.a_CI) and torch.allclose(one.b_OC, two.b_OC, rtol=2 * NEAR, atol=0)
