"""The merged model as one GGUF file; what `merged-gguf` and `ollama` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.export.exporter import Job
from dynlora_cli.export.gguf.file import write_model

FILE = "model.gguf"


def write_merged_gguf(job: Job, folder: Path) -> dict[str, Any]:
    """Write `folder`/model.gguf; its notes go to the job, its other facts are returned."""
    merged = job.merged()
    assert job.tokenizer_folder is not None
    facts = write_model(folder / FILE, merged.config, job.tokenizer_folder, merged.names, merged.read, kind=job.outtype)
    job.notes.extend(facts["notes"])
    return {key: value for key, value in facts.items() if key not in ("notes", "path")}
