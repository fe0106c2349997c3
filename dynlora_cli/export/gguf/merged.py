"""The merged model as one GGUF file; what `merged-gguf` and `ollama` share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dynlora_cli.errors import DynloraError
from dynlora_cli.export.exporter import Job
from dynlora_cli.export.gguf.file import tensor_types, write_model
from dynlora_cli.export.gguf.outtypes import OWN, QUANTIZED
from dynlora_cli.export.gguf.quantizer import find_quantizer

FILE = "model.gguf"
_UNQUANTIZED = ".model.f16.gguf"


def write_merged_gguf(job: Job, folder: Path) -> dict[str, Any]:
    """Write `folder`/model.gguf; its notes go to the job, its other facts are returned."""
    if job.outtype in OWN:
        return _write(job, folder / FILE, job.outtype)
    quantizer = find_quantizer(job.outtype)
    between = folder / _UNQUANTIZED
    try:
        facts = _write(job, between, "f16")
        quantizer.run(between, folder / FILE, job.outtype)
    finally:
        between.unlink(missing_ok=True)
    types = _check_types(job, folder / FILE, facts["tensors"])
    facts |= {"kind": job.outtype, "bytes": (folder / FILE).stat().st_size}
    return facts | {"quantizer": quantizer.name, "types": dict(types)}


def _write(job: Job, path: Path, kind: str) -> dict[str, Any]:
    merged = job.merged()
    assert job.tokenizer_folder is not None
    facts = write_model(path, merged.config, job.tokenizer_folder, merged.names, merged.read, kind=kind)
    job.notes.extend(facts["notes"])
    return {key: value for key, value in facts.items() if key not in ("notes", "path")}


def _check_types(job: Job, path: Path, tensors: int) -> Counter[str]:
    """How many tensors have which type; a note where rows did not fit into the blocks of the format."""
    found = tensor_types(path)
    if len(found) != tensors:
        raise DynloraError(f"the quantizer wrote {len(found)} tensors of {tensors}", "please report this")
    block = QUANTIZED[job.outtype].block
    odd = Counter(kind for shape, kind in found.values() if len(shape) > 1 and kind != "F32" and shape[-1] % block)
    if odd:
        kinds = ", ".join(f"{count} as {kind}" for kind, count in odd.most_common())
        job.notes.append(
            f"{job.outtype} takes {block} numbers of a row together, and the rows of some matrices do not divide by "
            f"that: llama.cpp stored {kinds}"
        )
    return Counter(kind for _, kind in found.values())
