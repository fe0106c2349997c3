"""LoRA folders for servers that stack the factors of a module type over all blocks: one rank, and no block left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.adapter import Adapter, save
from dynlora_cli.adapter_reader import read_adapter
from dynlora_cli.errors import DynloraError
from dynlora_cli.exporters._exporter import Job, padded, plain_lora
from dynlora_cli.run_folder import copy_tokenizer

Together = Sequence[tuple[str, ...]]


def write_stacked(job: Job, folder: Path, consumer: str, *, together: Together = ()) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer.

    Args:
        job: with the base's layers.
        folder: an empty one.
        consumer: who reads it, for messages.
        together: ends of names that must be there together.
    """
    adapter = plain_lora(job.adapter, consumer)
    assert job.linear_layers is not None
    wanted = expected_layers(job, adapter.layers, together)
    missing = {name: job.linear_layers[name] for name in wanted if name not in adapter.layers}
    wide = padded(adapter, missing)
    save(wide, folder, for_peft=False)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    return {"rank": max(wide.ranks.values()), "filled_layers": len(missing)}


def read_stacked(job: Job, folder: Path, consumer: str, *, together: Together = ()) -> Adapter:
    """The folder by these rules.

    Raises:
        DynloraError: it has more than one rank, or a block lacks a type that others have.
    """
    adapter = read_adapter(folder)
    wanted = expected_layers(job, adapter.layers, together)
    if len(set(adapter.ranks.values())) != 1 or set(adapter.layers) != wanted:
        raise DynloraError(f"{consumer} would drop a module type of the export", "please report this")
    return adapter


def expected_layers(job: Job, names: Collection[str], together: Together) -> set[str]:
    """Layers of the base of the types that are adapted, and of those that must be there with them."""
    assert job.linear_layers is not None
    used = {_type(name) for name in names}
    for group in together:
        for kind in list(used):
            parent, _, leaf = kind.rpartition(".")
            used |= {f"{parent}.{other}" for other in group} if leaf in group else set()
    return {name for name in job.linear_layers if _type(name) in used}


def _type(name: str) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)
