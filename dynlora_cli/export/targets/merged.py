"""The base with the adapter folded in, as a Hugging Face folder.

What it does
    The same as `dynlora merge`: shards, types, tokenizer, chat template and generation settings stay.

When to use it
    For whatever loads a model folder: transformers, vLLM, TGI, MLX, further training.

Reference
    W' = W + BA, see merging/fold.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.models.weights import Weights

needs_base = True


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write the merged model."""
    job.merged().write(folder)
    return {"modules": len(job.adapter.layers)}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:  # noqa: ARG001
    """The folder itself, whose files are read as transformers would."""
    Weights(folder)
    return folder
