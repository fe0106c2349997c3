"""What a person asks `dynlora adapt` for, on the command line or in Python: checked before anything heavy loads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.find import HYPERNET, is_hypernet
from dynlora_cli.cli.asked import Work, refuse_both_ways
from dynlora_cli.cli.values import saved_dtype, size
from dynlora_cli.commands import preflight
from dynlora_cli.config.sections import TrainSource
from dynlora_cli.data.sources import BUILTIN
from dynlora_cli.documents.begun import Begun
from dynlora_cli.documents.document import read_documents
from dynlora_cli.documents.given import read_given
from dynlora_cli.drafts.document import BUDGET, document_recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.models.find import find_model, is_hub_name, refuse_no_writer
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.text import is_utf8

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe

QUESTIONS, ANSWER_TOKENS = 24, 128
# Measured in scripts/bench/generated: ten adapters of documents that were added up are worse than the base.
ADDED = (
    "--add-chunks: adapters that are added up get in each other's way, the more the more they are; without it one run "
    "learns all chunks, and learns more"
)


def adapt(
    model: str | None,
    documents: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    hypernet: Path | None = None,
    description: str | None = None,
    base: str | None = None,
    budget: str | float | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    **training: Any,
) -> Work:
    """An adapter that is trained on documents; or, with a hypernetwork, one that it writes.

    Args:
        model, documents, out, hypernet, description, base, budget, dtype, trust_remote_code, overwrite: as of the
            command.
        training: the further options of `from_documents`.
    """
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "overwrite": overwrite}
    if "" in documents:  # as of a shell's variable that is not set; a path would take it for the current folder
        raise UsageError("--document '' names no file", "name one, or a folder of texts: --document FILE")
    paths = [Path(document) for document in documents]
    if hypernet is None:
        for option, value in (("--description", description), ("--base", base)):
            if value is not None:
                raise UsageError(f"{option} goes with a network that writes adapters", "name it: --hypernet FOLDER")
        return from_documents(model, paths, out, budget=BUDGET if budget is None else budget, **how, **training)
    usual = {"questions": QUESTIONS, "answer_tokens": ANSWER_TOKENS}
    given = {"model": model} | {key: value for key, value in training.items() if value != usual.get(key)}
    for key in (key for key, value in given.items() if value):
        option = "--" + {"settings": "set"}.get(key, key.replace("_", "-"))
        raise UsageError(
            f"{option} is for adapters that are trained, and a hypernetwork writes one at once", "leave it out"
        )
    return by_hypernet(hypernet, out, description=description, documents=paths, budget=budget, base=base, **how)


def from_documents(
    model: str | None,
    documents: Sequence[Path],
    out: Path,
    *,
    data: Path | None = None,
    columns: Mapping[str, str] | None = None,
    questions: int = QUESTIONS,
    chunk_tokens: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    add_chunks: bool = False,
    budget: str | float = BUDGET,
    settings: Sequence[str] = (),
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
) -> Work:
    """An adapter from documents; or, of a dry run, what would be done."""
    refuse_both_ways(overwrite, resume, None)
    if not model:
        raise UsageError("no model is named", "name one: --model FOLDER, a hub id or builtin:tiny")
    if columns and data is None:
        raise UsageError("--columns names the columns of rows, and there are none", "add --data FILE, or leave it out")
    for number, option in (
        (questions, "--questions"),
        (chunk_tokens, "--chunk-tokens"),
        (answer_tokens, "--answer-tokens"),
    ):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: must be 1 or more")
    size(budget, "--budget")
    notes: list[str] = []
    read = read_documents(documents, notes)
    given = None if data is None else read_given(data, columns or {}, notes)
    recipe, text = document_recipe(
        model, [one.name for one in read], out, budget=str(budget), changes=_changes(settings, dtype, trust_remote_code)
    )
    if add_chunks:
        _check_addable(recipe, notes)
    preflight.training(_without_rows(recipe), writes=False)
    if not is_hub_name(model):
        refuse_no_writer(find_model(recipe.model)[0])
    if not dry_run:
        inputs = [*[one.path for one in read], *([data] if data else []), *preflight.inputs(_without_rows(recipe))]
        _refuse_place(out, inputs, overwrite=overwrite, resume=resume)
    how: dict[str, Any] = {"given": given, "data": data, "questions": questions, "chunk_tokens": chunk_tokens}
    told = {change.partition("=")[0].strip() for change in settings}
    how["may_lengthen"] = not told & {"train", "train.epochs", "train.max_steps"}
    how |= {"answer_tokens": answer_tokens, "add_chunks": add_chunks, "overwrite": overwrite, "resume": resume}

    def work(emit: Emit) -> dict[str, Any]:
        from dynlora_cli.commands import adapt as command
        from dynlora_cli.commands import train

        request = command.Request(recipe, text, read, out, train.run, **how, notes=notes)
        return command.plan(request, emit) if dry_run else command.run(request, emit)

    return work


def by_hypernet(
    hypernet: Path,
    out: Path,
    *,
    description: str | None = None,
    documents: Sequence[Path] = (),
    budget: str | float | None = None,
    base: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Work:
    """An adapter that a hypernetwork writes from a description, or from documents."""
    if (description is None) == (not documents):
        both = "both are given" if documents else "nothing is"
        raise UsageError(
            f"--hypernet writes an adapter from a description or from documents, and {both}",
            'name one: --description "what the task is", or --document FILE',
        )
    if description is not None and not description.strip():
        raise UsageError("--description says nothing", "write what the task is, in words")
    if description and not is_utf8(description):
        raise UsageError("--description holds bytes that are no text in UTF-8", "write it in UTF-8")
    if not is_hypernet(hypernet):
        problem = "holds no hypernetwork" if hypernet.is_dir() else "is no folder"
        raise UsageError(
            f"--hypernet {hypernet} {problem} ({HYPERNET})",
            "name the run folder of a variant that writes adapters, such as text-gated",
        )
    limit = None if budget is None else size(budget, "--budget", auto=False)
    if base:
        preflight.base(base)
    run_folder.refuse_occupied(out, overwrite=overwrite, option="--out")
    notes: list[str] = []
    read = read_documents(documents, notes) if documents else []
    run_folder.refuse_inputs(out, [hypernet, *[one.path for one in read]])

    def work(emit: Emit) -> dict[str, Any]:
        from dynlora_cli.commands import adapt_by_hypernet as command

        for text in notes:
            emit(note(text))
        how: dict[str, Any] = {"budget": limit, "base_name": base, "trust_remote_code": trust_remote_code}
        how |= {"overwrite": overwrite, "dtype": saved_dtype(dtype)} if dtype else {"overwrite": overwrite}
        return command.run(command.Request(hypernet, out, description or "", read, **how), emit)

    return work


def _refuse_place(out: Path, inputs: Sequence[Path], *, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that is not free, or in which something lies that is read and would go with it.

    Raises:
        UsageError: it is one.
    """
    Begun(out).refuse(overwrite=overwrite, resume=resume)
    if not resume:
        run_folder.refuse_inputs(out, inputs)


def _changes(settings: Sequence[str], dtype: str | None, trust_remote_code: bool) -> list[str]:
    """Changes of the recipe, with what options of their own stand for."""
    own = [f"adapter.save_dtype={saved_dtype(dtype)}"] if dtype else []
    return [*settings, *own, *(["model.trust_remote_code=true"] if trust_remote_code else [])]


def _check_addable(recipe: Recipe, notes: list[str]) -> None:
    """Refuse what cannot be put side by side, and a budget that the sum cannot be cut to; note what adding does."""
    notes.append(ADDED)
    if recipe.adapter.variant != "lora" or recipe.adapter.origin:
        what = "adapter.from" if recipe.adapter.origin else f"adapter.variant={recipe.adapter.variant}"
        raise UsageError(
            f"--add-chunks puts plain components that start from nothing side by side, and {what} is not that",
            "leave one of them out",
        )
    rank = recipe.rank
    if rank.parsed_budget().kind in ("auto", "bytes"):
        raise UsageError(
            f"--add-chunks cuts the sum of all chunks to a number of parameters, and rank.budget is {rank.budget}",
            "for example --budget 8, --budget 0.5 or --budget 2M",
        )


def _without_rows(recipe: Recipe) -> Recipe:
    """The recipe with rows that are always there in place of those that are yet to be written."""
    sources = {"train": [TrainSource(path=BUILTIN)], "val": []}
    return recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update=sources)})
