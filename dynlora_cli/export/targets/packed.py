"""An archive of a few bits a number, for sending and storing.

What it does
    Turns each layer's components into SVD form and gives each from 0 to 8 bits a number by its energy, so that `bits`
    is their average; components worth nothing are dropped. Writes
    adapter_packed.safetensors and adapter_packed.json, whose layout adapters/packed/archive.py describes. Every
    command of dynlora reads it; `dynlora export --adapter PACKED --to peft` makes a plain PEFT LoRA of it, exactly.

When to use it
    To send or to keep many adapters; not for other tools, which cannot read it before it is unpacked.

Reference
    Reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.packed.archive import in_svd_form, pack
from dynlora_cli.adapters.packed.archive import write as write_archive
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import files_of
from dynlora_cli.export.exporter import Job, Read, plain_lora
from dynlora_cli.rounding.bits import Pair, costs, share_out, within
from dynlora_cli.rounding.floats import changed
from dynlora_cli.runs.folder import copy_tokenizer

needs_base = False
ROUNDING = 0.25
MAX_KL = 0.5  # few bits are asked for, and what they cost is shown
OPTIONS = {
    "bits": {
        "type": "float",
        "default": 3.0,
        "above": 0,
        "at_most": 8,
        "help": "Bits a number on average, such as 2.5; a component gets more or fewer by its energy.",
    },
}


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write both files and the tokenizer; the job's adapter becomes what they hold."""
    bits: float = job.options.model_dump()["bits"]
    turned = in_svd_form(plain_lora(job.adapter, "a packed archive", heads=True))
    sizes = {name: costs(f.a_CI, f.b_OC) for name, f in turned.layers.items()}
    shares = share_out(sizes, int(sum(within(cost, bits) for cost in sizes.values())))
    job.adapter, data = pack(turned, shares)
    write_archive(folder, job.adapter, shares, data, files_of(job.adapter))
    if job.tokenizer_folder:
        copy_tokenizer(job.tokenizer_folder, folder)
    kept = [k for of_layer in shares.values() for k in of_layer]
    lost = changed(*_pairs(turned, job.adapter))
    job.notes.append(
        f"rounding changes the update by {lost:.1%}; other tools read it when it is unpacked: "
        "dynlora export --to peft --adapter FOLDER --out NEW"
    )
    return {"components_by_bits": {k: kept.count(k) for k in range(9) if k in kept}, "rounding": lost}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The archive as every command reads it."""
    return read_adapter(folder)


def _pairs(before: Adapter, after: Adapter) -> tuple[list[Pair], list[Pair]]:
    """Factors of all layers; a layer that was dropped has none afterwards."""
    none = {name: (f.a_CI[:0], f.b_OC[:, :0]) for name, f in before.layers.items()}
    of = {name: (f.a_CI, f.b_OC) for name, f in after.layers.items()}
    return [(f.a_CI, f.b_OC) for f in before.layers.values()], [of.get(name, none[name]) for name in before.layers]
