"""LoRA folders for servers that stack the factors of a module type over all blocks: one rank, and no block left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import DynloraError
from dynlora_cli.export.exporter import Job, padded, plain_lora
from dynlora_cli.runs.folder import copy_tokenizer

Together = Sequence[tuple[str, ...]]
RankRule = Callable[[int], int]


def sgmv_rank(rank: int) -> int:
    """The rank to which the kernels of TGI and LoRAX fill up an adapter on one GPU: 8, or the next multiple of 16.

    Both divide lora_alpha by the given rank for the first module type and by the filled-up one for all others, so an
    adapter of another rank than these is served with wrong scales.
    """
    return 8 if rank <= 8 else (rank + 15) // 16 * 16


def write_stacked(
    job: Job, folder: Path, consumer: str, *, together: Together = (), rank_rule: RankRule = int
) -> dict[str, Any]:
    """Write the padded and completed adapter and its tokenizer.

    Args:
        job: with the base's layers.
        folder: an empty one.
        consumer: who reads it, for messages.
        together: ends of names that must be there together.
        rank_rule: gives the rank to write from the largest that there is.
    """
    adapter = plain_lora(job.adapter, consumer)
    assert job.linear_layers is not None
    wanted = expected_layers(job, adapter.layers, together)
    missing = {name: job.linear_layers[name] for name in wanted if name not in adapter.layers}
    wide = padded(adapter, missing, rank_rule(max(adapter.ranks.values())))
    save(wide, folder, for_peft=False, dtype=job.dtype)
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    return {"rank": max(wide.ranks.values()), "filled_layers": len(missing)}


def read_stacked(
    job: Job, folder: Path, consumer: str, *, together: Together = (), rank_rule: RankRule = int
) -> Adapter:
    """Read the folder as such a server does.

    Raises:
        DynloraError: it has more than one rank, or one that the server changes, or a block lacks a type that others
            have.
    """
    adapter = read_adapter(folder)
    wanted = expected_layers(job, adapter.layers, together)
    if len(set(adapter.ranks.values())) != 1 or set(adapter.layers) != wanted:
        raise DynloraError(f"{consumer} would drop a module type of the export", "please report this")
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    if not rank == alpha == rank_rule(rank) == max(adapter.ranks.values()):
        raise DynloraError(f"{consumer} would scale the export of rank {rank} otherwise", "please report this")
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
