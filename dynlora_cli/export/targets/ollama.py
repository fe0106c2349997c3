"""A model for Ollama: one GGUF file and a Modelfile.

What it does
    Writes the merged model as GGUF, and a Modelfile with the chat template and stop tokens, the template only where
    Ollama's form of it is known to give the very same text as the tokenizer's own.

When to use it
    For `ollama create NAME -f Modelfile`.

Reference
    Ollama's Modelfile; see export/ollama_templates.py for the templates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.export.exporter import Job, Read
from dynlora_cli.export.gguf.file import read_model
from dynlora_cli.export.gguf.merged import FILE, write_merged_gguf
from dynlora_cli.export.gguf.vocabulary import load_tokenizer
from dynlora_cli.export.ollama_templates import modelfile
from dynlora_cli.files.foreign import read_object

needs_base = True
OUTTYPE = True


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.gguf and Modelfile."""
    facts = write_merged_gguf(job, folder)
    assert job.tokenizer_folder is not None
    tokenizer, writing = load_tokenizer(job.tokenizer_folder), Writing.of(job.adapter.record)
    text, notes = modelfile(FILE, tokenizer, _generation_config(job), writing)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    job.notes.extend(notes)
    dataset = (job.adapter.record.get("recipe") or {}).get("dataset")
    separator = dataset.get("separator") if isinstance(dataset, dict) else None
    if separator and not any(writing.turned.values()):
        job.notes.append(f"training put {separator!r:.40} behind each prompt, and the TEMPLATE does not: ask with it")
    return facts | {"template": "TEMPLATE" in text}


def _generation_config(job: Job) -> dict[str, Any]:
    assert job.base_folder is not None
    path = job.base_folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """The tensors of the GGUF that the Modelfile names."""
    line = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()[0]
    return read_model(folder / line.removeprefix("FROM ").strip(), job.merged().config)
