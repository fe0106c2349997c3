"""`dynlora adapt`: from documents to an adapter. `run` is the table of contents.

out/.name.adapt/          beside the output folder, until the run holds its rows
  asked.json              what was asked for, so that --resume goes on with the same
  chunk-00001.json ...    requests and answers about each chunk, as they come
  rows.jsonl              the rows, when all are written; and those that are held out
  held_out.jsonl
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.find import find_origin
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.documents import added
from dynlora_cli.documents.begun import Begun
from dynlora_cli.documents.chunks import Chunk, cut_all
from dynlora_cli.documents.document import Document
from dynlora_cli.documents.given import GivenRow, by_chunk
from dynlora_cli.documents.study import DocumentRow, Study, provenance
from dynlora_cli.documents.writer import Reader, Writer
from dynlora_cli.drafts.document import HELD_OUT, ROWS, with_enough_steps
from dynlora_cli.errors import DataError, Interrupted, UsageError
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.files.whole import sha256_of, write_text
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.quiet import quiet
from dynlora_cli.runs import events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit
from dynlora_cli.runs.record import Adapted
from dynlora_cli.text import counted
from dynlora_cli.training.session import Given

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Dataset

WITH_DOCUMENT = "with_document.jsonl"
MOST_CHUNKS = 10_000
LEAST_TRAINED = 2  # rows; one is held out besides
NEEDED = "three at least are needed, of which one is held out"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        recipe: of the run, checked; its rows are yet to be written.
        recipe_text: for the run folder.
        documents: read already.
        out: the run folder.
        given: a person's rows; None: the model writes requests, or goes on with sentences.
        data: the file of these.
        questions: rows that are wanted about each chunk, where nobody gives any.
        chunk_tokens: of a chunk at most; None: 512, or what the model's context leaves.
        answer_tokens: of an answer that the model writes.
        add_chunks: each chunk is trained by itself, and the components are put side by side.
        may_lengthen: more passes may be made over few rows than the recipe says.
        overwrite, resume: as of `train`.
        notes: what is to be told first.
        train: trains a run and returns its summary, as `dynlora train` does.
    """

    recipe: Recipe
    recipe_text: str
    documents: Sequence[Document]
    out: Path
    train: Callable[..., dict[str, Any]]
    given: Sequence[GivenRow] | None = None
    data: Path | None = None
    questions: int = 24
    chunk_tokens: int | None = None
    answer_tokens: int = 128
    add_chunks: bool = False
    may_lengthen: bool = True
    overwrite: bool = False
    resume: bool = False
    notes: Sequence[str] = field(default_factory=list)

    @property
    def place(self) -> Begun:
        """Where its rows are written."""
        return Begun(self.out)


@quiet
def run(request: Request, emit: Emit = lambda event: None) -> dict[str, Any]:  # noqa: ARG005
    """Write rows about the documents, and train on them.

    Args:
        request: what is asked for.
        emit: takes the events of the run, and `progress` while rows are written.

    Returns:
        The summary of the run, with what it was made from.

    Raises:
        Interrupted: Ctrl-C; what is done is on the disk, and --resume goes on.
        DynloraError: with the exit code that fits.
    """
    with run_folder.place_of(request.out, "--out"):
        for note in request.notes:
            emit(events.note(note))
        if request.resume and request.place.has_become_a_run():
            request.place.end()
            summary = _gone_on(request, emit)
        else:
            cut = _cut(request)  # what is refused here leaves nothing behind
            id_ = request.place.begin(_asked_sha256(request), overwrite=request.overwrite, resume=request.resume)
            rows = _written(request, cut, id_, emit)
            summary = _added(request, emit, rows) if request.add_chunks else _trained(request, emit, rows)
    record = run_folder.read_record(request.out)
    return {**summary, "command": "adapt", "adapted": record.get("adapted")}


def plan(request: Request, emit: Emit = lambda event: None) -> dict[str, Any]:  # noqa: ARG005
    """What the command would do, found without loading weights."""
    for note in request.notes:
        emit(events.note(note))
    cut = _cut(request)
    reader, chunks = cut.reader, cut.chunks
    rows = len(request.given) if request.given is not None else len(chunks) * request.questions
    return {
        "model": request.recipe.model.name_or_path,
        "output_dir": str(request.out),
        "documents": provenance(chunks, request.documents),
        "chunks": len(chunks),
        "chunk_tokens": max(chunk.tokens for chunk in chunks),
        "tokens": sum(chunk.tokens for chunk in chunks),
        "rows": rows,
        "questions": _who(request, reader)[0],
        "budget": request.recipe.rank.budget,
    }


def _asked_sha256(request: Request) -> str:
    """Over all that decides which rows are written."""
    model, dataset = request.recipe.model.model_dump(), request.recipe.dataset
    said = [dataset.chat, dataset.separator, dataset.system, dict(dataset.chat_template_kwargs), dataset.reasoning]
    documents = [(one.name, one.sha256) for one in request.documents]
    given = None if request.given is None else [(row.prompt, row.completion) for row in request.given]
    layout = getattr(request.recipe.train, "context_layout", None)
    wanted = [request.questions, request.chunk_tokens, request.answer_tokens, request.recipe.seed, layout]
    if origin := request.recipe.adapter.origin:
        folder = find_origin(Path(origin), request.out)
        wanted += [sha256_of(file) for file in sorted(folder.glob("adapter_*")) if file.is_file()]
    return hashlib.sha256(json.dumps([model, said, documents, given, wanted], default=str).encode()).hexdigest()


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and what they were made from."""

    rows: list[DocumentRow]
    texts: dict[str, str]
    adapted: Adapted


@dataclass(frozen=True)
class Cut:
    """The documents in chunks, and the room that was left for what is asked about them.

    Attributes:
        reader: the model's tokenizer and form.
        chunks: of all documents.
        request_tokens, answer_tokens: that a request and an answer may have.
    """

    reader: Reader
    chunks: list[Chunk]
    request_tokens: int
    answer_tokens: int


def _cut(request: Request) -> Cut:
    reader = Reader(request.recipe, BaseFiles.find(request.recipe.model))
    given = request.given or ()
    asks = reader.request_tokens([row.prompt for row in given])
    answers = max([reader.count(row.completion) for row in given if row.completion], default=0)
    unanswered = [row.prompt for row in given if not row.completion]
    if not given or unanswered:
        answers = max(answers, request.answer_tokens)
    if unanswered or (not given and reader.chat):  # a person's answers, and sentences, are cut as in any run
        reader.refuse_cut(reader.request_tokens(unanswered), request.answer_tokens)
    chunks = cut_all(request.documents, reader.count, reader.chunk_tokens(request.chunk_tokens, asks, answers))
    if len(chunks) > MOST_CHUNKS:
        raise UsageError(
            f"the documents make {len(chunks):,} chunks, and at most {MOST_CHUNKS:,} go into one adapter",
            "name fewer documents, or look passages up instead: dataset.retrieve",
        )
    most = len(given) if given else len(chunks) * request.questions
    if most <= LEAST_TRAINED:
        raise UsageError(
            f"{counted(most, 'row')} about the documents: {NEEDED}",
            f"give more rows in {request.data}" if given else "ask more: --questions 8",
        )
    return Cut(reader, chunks, asks, request.answer_tokens)


def _who(request: Request, reader: Reader) -> tuple[str, str]:
    """Who writes prompts, and who answers."""
    model = _speaker(request)
    if request.given is None:
        return (model, model) if reader.chat else ("the documents' own sentences", "the documents")
    assert request.data is not None
    file = (
        f"{request.data.name} (sha256 {sha256_of(request.data)[:12]})" if request.data.is_file() else f"{request.data}"
    )
    answered = [bool(row.completion) for row in request.given]
    return file, file if all(answered) else f"{file} and {model}" if any(answered) else model


def _speaker(request: Request) -> str:
    """The model that asks, answers and teaches: what the run begins with."""
    model, origin = request.recipe.model.name_or_path, request.recipe.adapter.origin
    return f"{model} with {Path(origin).name}" if origin else model


def _written(request: Request, cut: Cut, id_: str, emit: Emit) -> Rows:
    """The rows, all of them, as files of the place beside."""
    began = time.monotonic()
    reader, chunks = cut.reader, cut.chunks
    _tell(request, reader, chunks, emit)
    given = None if request.given is None else by_chunk(request.given, chunks)
    study = Study(chunks, request.place.folder, request.questions, reader.chat, given)
    with interruptible() as stopped:
        with request.place.empty_where_it_fails():
            writer = Writer(reader, cut.request_tokens, cut.answer_tokens, stopped)
        rows = study.write(writer, lambda text: emit({"event": "progress", "text": text}))
        if sum(not row.held_out for row in rows) < LEAST_TRAINED:
            request.place.end()  # nothing here is worth going on with
            raise DataError(
                f"{counted(len(rows), 'row')} could be written about the documents, and {NEEDED}",
                "name longer documents, or give rows: --data FILE" if given is None else f"add rows to {request.data}",
            )
        texts = {
            ROWS: "".join(row.line() for row in rows if not row.held_out),
            HELD_OUT: "".join(row.line() for row in rows if row.held_out),
        }
        for name, text in texts.items():
            write_text(request.place.folder / name, text)
        loss = _loss_with_document(request, writer, rows)
        writer.heed()  # nothing asks while a loss is measured
    for note in study.notes:
        emit(events.note(note))
    del writer
    gc.collect()  # the run loads the base for itself
    questions, answers = _who(request, reader)
    if study.filled:
        questions, answers = (f"{who}, and sentences of the documents" for who in (questions, answers))
    adapted = Adapted(
        id=id_,
        asked_sha256=_asked_sha256(request),
        documents=provenance(chunks, request.documents),  # type: ignore[typeddict-item]
        chunk_tokens=max(chunk.tokens for chunk in chunks),
        questions=questions,
        answers=answers,
        teacher=_speaker(request),
        rows=sum(not row.held_out for row in rows),
        held_out=sum(row.held_out for row in rows),
        writing_seconds=time.monotonic() - began,
    )
    if loss is not None:
        adapted["loss_with_document"] = loss
    return Rows(rows, texts, adapted)


def _tell(request: Request, reader: Reader, chunks: Sequence[Chunk], emit: Emit) -> None:
    tokens = sum(chunk.tokens for chunk in chunks)
    documents = counted(len(request.documents), "document")
    emit({"event": "progress", "text": f"{documents}  {counted(tokens, 'token')} in {counted(len(chunks), 'chunk')}"})
    if marks := reader.marks("\n".join(chunk.text for chunk in chunks)):
        text = f"the documents hold {', '.join(marks)}, which this model reads as marks of its own and not as text"
        emit(events.note(f"{text}: its prompt may end there; write them otherwise if they are not meant"))


def _loss_with_document(request: Request, writer: Writer, rows: Sequence[DocumentRow]) -> float | None:
    """What the held-out answers cost the teacher, which has their chunk in its prompt: what there is to reach."""
    lines = [
        {"prompt": writer.reader.with_context(row.context, row.prompt), "completion": row.completion}
        for row in rows
        if row.held_out
    ]
    file = request.place.folder / WITH_DOCUMENT
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return writer.loss(file)


# -- the run ---------------------------------------------------------------------------------------------------------


def _gone_on(request: Request, emit: Emit) -> dict[str, Any]:
    """Go on with the run in the output folder; what was put together of chunks is finished."""
    record = run_folder.read_record(request.out)
    _refuse_other_work(request, record)
    if (record.get("adapted") or {}).get("chunks_added"):
        emit(events.note(f"{request.out} is finished already; nothing to do"))
        return dict(record["summary"])
    rows = (record.get("adapted") or {}).get("rows") or 0
    recipe, _ = _long_enough(request, rows) if rows else (request.recipe, "")
    return request.train(recipe, listener=emit, resume=True)


def _long_enough(request: Request, rows: int) -> tuple[Recipe, str]:
    """The recipe and its text, for so many rows."""
    recipe, text = request.recipe, request.recipe_text
    return with_enough_steps(recipe, text, rows) if request.may_lengthen else (recipe, text)


def _refuse_other_work(request: Request, record: Mapping[str, Any]) -> None:
    """Check that a run which goes on was made from what is named now, and that its rows were asked for alike."""
    adapted = record.get("adapted") or {}
    before = {one["sha256"] for one in adapted.get("documents") or ()}
    if before and before != {one.sha256 for one in request.documents}:
        raise UsageError(
            f"--resume: the run in {request.out} was made from other documents", "name those, or another --out"
        )
    asked = adapted.get("asked_sha256")
    if asked and (asked != _asked_sha256(request) or request.add_chunks != bool(adapted.get("chunks_added"))):
        raise UsageError(
            f"--resume: the rows of the run in {request.out} were asked for with other options",
            "repeat that command with --resume, or name another --out",
        )


def _trained(request: Request, emit: Emit, rows: Rows) -> dict[str, Any]:
    """Train on the rows, which go into the run's folder with its record."""

    def listener(event: dict[str, Any]) -> None:
        emit(_in_its_place(event, request))
        if event["event"] == "checkpoint":  # the run holds its rows, and can go on
            request.place.end()

    given, load = Given(rows.texts, rows.adapted), partial(_load, request)
    recipe, text = _long_enough(request, rows.adapted["rows"])
    # A folder that was not free was refused when the command began.
    found = request.train(recipe, listener=listener, overwrite=True, recipe_text=text, given=given, load=load)
    request.place.end()
    return found


def _added(request: Request, emit: Emit, rows: Rows) -> dict[str, Any]:
    """Train chunk by chunk, and add."""
    parts = added.Parts(
        recipe=request.recipe,
        recipe_text=request.recipe_text,
        rows=rows.rows,
        texts=rows.texts,
        adapted=rows.adapted,
        beside=request.place.folder,
        may_lengthen=request.may_lengthen,
        train=request.train,
        overwrite=True,  # a folder that was not free was refused when the command began
    )
    try:
        summary = added.run(parts, emit)
    except KeyboardInterrupt:  # between two runs, each of which heeds it itself
        raise Interrupted("interrupted; the parts that are done are saved", "go on with --resume") from None
    request.place.end()
    return summary


def _in_its_place(event: dict[str, Any], request: Request) -> dict[str, Any]:
    """An event whose notes name the rows where the run keeps them, not where they were read."""
    beside, out = str(request.place.folder), str(request.out)
    found = dict(event)
    if "text" in found:
        found["text"] = str(found["text"]).replace(beside, out)
    if found.get("notes"):
        found["notes"] = [str(text).replace(beside, out) for text in found["notes"]]
    return found


def _load(request: Request, dataset: Dataset, *arguments: Any, **options: Any) -> Data:
    """The rows of a run whose folder does not hold them yet, read where they were written."""
    update: Mapping[str, Any] = {
        "train": [one.model_copy(update={"path": str(request.place.folder / ROWS)}) for one in dataset.train],
        "val": [one.model_copy(update={"path": str(request.place.folder / HELD_OUT)}) for one in dataset.val],
    }
    return load_data(dataset.model_copy(update=update), *arguments, **options)
