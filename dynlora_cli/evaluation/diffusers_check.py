"""Whether the file of an adapter for a diffusion pipeline says what was to be written: it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.images.read import read_image
from dynlora_cli.adapters.images.write import NEAR


def check_file(adapter: Adapter, file: Path) -> dict[str, Any]:
    """Compare a file with the adapter that it was written from.

    Args:
        adapter: with the values that the file's number format has.
        file: as it was written.

    Returns:
        checked, reason and problem, as of `peft_check.check_files`.
    """
    found = read_image(file)
    lost = sorted(adapter.layers.keys() ^ found.layers.keys())
    same = (name for name in adapter.layers if name in found.layers)
    lost += [name for name in same if not _equal(adapter, found, name)]
    problem = f"{lost[0]} is another one in {file.name}" if lost else None
    return {"checked": True, "reason": None, "problem": problem}


def _equal(adapter: Adapter, found: Adapter, name: str) -> bool:
    one, two = adapter.layers[name], found.layers[name]
    same_b = one.b_OC.shape == two.b_OC.shape and torch.allclose(one.b_OC, two.b_OC, rtol=NEAR, atol=0)
    return one.kernel == two.kernel and one.a_CI.equal(two.a_CI) and same_b
