"""`dynlora adapt --hypernet`: an adapter from a text, in one pass of a hypernetwork. `run` is the table of contents."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from dynlora_cli import __version__
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.adapters.write import save
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.dtypes import FULL, rounding_note
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.hypernets.conditions import Descriptions
from dynlora_cli.hypernets.documents import Documents
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.writing import Writer, cut, open_writer
from dynlora_cli.models.quiet import quiet
from dynlora_cli.rounding.floats import changed
from dynlora_cli.runs import events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs import record as records
from dynlora_cli.runs.events import Emit
from dynlora_cli.runs.report.write import write_card

PARAGRAPH = "\n\n"  # between two documents
Source = dict[str, Any]


class Text(Protocol):
    """A document that was read, such as documents.document.Document."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def texts(self) -> Sequence[str]:
        """What it says, in one or several parts."""

    @property
    def sha256(self) -> str:
        """Of its file."""

    @property
    def characters(self) -> int:
        """Of all parts."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        hypernet: the run folder of a variant that writes adapters.
        out: a new folder.
        description: what the task is, in words; empty where documents are named.
        documents: that it is to be written from, read already.
        budget: what the adapter may hold; None: what the hypernetwork's own recipe says (`rank.budget`).
        base_name: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        overwrite: `out` may hold an earlier run.
        dtype: of the factors in the file, of config/dtypes.py.
    """

    hypernet: Path
    out: Path
    description: str = ""
    documents: Sequence[Text] = ()
    budget: Budget | None = None
    base_name: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    dtype: str = FULL


@quiet
def run(request: Request, emit: Emit = lambda event: None) -> dict[str, Any]:  # noqa: ARG005
    """Write the adapter of a description as plain PEFT files.

    Args:
        request: what is asked for.
        emit: takes notes.

    Returns:
        The summary, as data.

    Raises:
        UsageError: the hypernetwork is damaged or of another base, or there is nothing to write from.
        MachineError: its base or its encoder is not on this machine.
        MeasureError: PEFT reads the adapter otherwise; it is kept.
    """
    if request.documents:
        return write_into(request, partial(_read, request.documents), emit)
    text = request.description.strip()
    if not text:
        raise UsageError("--description says nothing", "write what the task is, in words")
    return write_into(request, lambda writer: _described(writer, text), emit)


def _described(writer: Writer, text: str) -> tuple[Hashable, Source]:
    """A description as what the network writes from."""
    if not isinstance(writer.conditions, Descriptions):
        folder = writer.hypernetwork.folder
        raise UsageError(
            f"{folder} writes adapters from documents", "name one in place of --description: --document FILE"
        )
    return text, {"description": text}


def _read(documents: Sequence[Text], writer: Writer) -> tuple[Hashable, Source]:
    """Documents, one after the other, as what the network writes from."""
    conditions = writer.conditions
    if not isinstance(conditions, Documents):
        folder = writer.hypernetwork.folder
        raise UsageError(
            f"{folder} writes adapters from descriptions", "write one in place of --document: --description TEXT"
        )
    key = conditions.of_text(PARAGRAPH.join(text for document in documents for text in document.texts))
    named = [{"name": each.name, "sha256": each.sha256, "characters": each.characters} for each in documents]
    return key, {"documents": named, "chunks": conditions.chunks(key)}


def write_into(request: Request, find: Callable[[Writer], tuple[Hashable, Source]], emit: Emit) -> dict[str, Any]:
    """The walk that all sources share.

    Args:
        request: what is asked for.
        find: what the network writes from, and the same for record and summary; asked once the base is known.
        emit: takes notes.
    """
    run_folder.refuse_occupied(request.out, overwrite=request.overwrite, option="--out")
    run_folder.refuse_inputs(request.out, [request.hypernet])
    hypernetwork = read_hypernet(request.hypernet)
    writer = open_writer(hypernetwork, request.base_name, request.trust_remote_code)
    started = time.perf_counter()
    key, source = find(writer)
    whole = writer.write(key)
    # On record for what is written from one text; a document has as much of each chunk, and what all have in common.
    budget = request.budget or Budget("parameters", hypernetwork.form.budget * (1 + source.get("chunks", 0)))
    kept = cut(whole, budget, request.dtype)
    seconds = time.perf_counter() - started
    saved = kept.rounded(request.dtype)
    if request.dtype != FULL:
        pairs = [[(f.a_CI, f.b_OC) for f in each.layers.values()] for each in (kept, saved)]
        emit(events.note(rounding_note(request.dtype, changed(*pairs), None, None)))
    form = hypernetwork.form
    about = {"hypernet": str(request.hypernet.resolve()), "sha256": hypernetwork.sha256, "method": form.method}
    by = cast("records.Written", {**about, "parameters_written": whole.parameters, **source})
    summary: dict[str, Any] = {
        "ok": True,
        "command": "adapt",
        "output_dir": str(request.out),
        "hypernet": str(request.hypernet),
        "method": form.method,
        **source,
        "model": request.base_name or form.base.name_or_path,
        "parameters_start": whole.parameters,
        "parameters": saved.parameters,
        "components_start": whole.components,
        "components": saved.components,
        "ranks": saved.all_ranks,
        "seconds": seconds,
    }
    with run_folder.replaced(request.out, overwrite=request.overwrite) as folder:
        save(saved, folder, dtype=request.dtype)
        summary["adapter_bytes"] = (folder / WEIGHTS).stat().st_size
        run_folder.copy_tokenizer(request.hypernet, folder)
        summary["peft_check"] = check_files(saved, folder, request.base_name, request.trust_remote_code)
        records.write(folder, _record(request.out, folder, saved, by, summary))
        write_card(folder)
    tell(summary["peft_check"], request.out, emit)
    return summary


def _record(out: Path, folder: Path, adapter: Adapter, by: records.Written, summary: dict[str, Any]) -> records.Record:
    """dynlora.json of an adapter whose tensors are in `folder` already."""
    old = adapter.record
    layers = {
        name: records.Layer(
            rank=adapter.ranks.get(name, 0),
            importance=adapter.layers[name].energy() if name in adapter.layers else 0.0,
            d_in=layer["d_in"],
            d_out=layer["d_out"],
            born=[adapter.ranks.get(name, 0)],
        )
        for name, layer in old["layers"].items()
    }
    kept = {key: old[key] for key in ("chat_template_sha256", "data") if key in old}
    return cast(
        "records.Record",
        {
            "schema_version": records.SCHEMA_VERSION,
            "dynlora_version": __version__,
            "name": out.name,
            "task": adapter.task,
            "variant": "lora",
            "base_model": old["base_model"],
            **kept,
            "layers": layers,
            "written": by,
            "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
            "finished": records.now(),
            "summary": summary,
        },
    )
