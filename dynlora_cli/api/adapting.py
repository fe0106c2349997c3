"""`api.adapt`: an adapter from documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from dynlora_cli.api.calls import as_path, as_text, checked, done

if TYPE_CHECKING:
    from dynlora_cli.api.results import Run

    PathLike = str | os.PathLike[str]
    Progress = Literal["auto"] | Callable[[dict[str, Any]], None] | None
    Settings = Mapping[str, Any] | Sequence[str] | None


@checked
def adapt(
    model: PathLike | None = None,
    document: PathLike | Sequence[PathLike] | None = None,
    *,
    out: PathLike,
    hypernet: PathLike | None = None,
    description: str | None = None,
    base: PathLike | None = None,
    data: PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    questions: int = 24,
    chunk_tokens: int | None = None,
    answer_tokens: int = 128,
    add_chunks: bool = False,
    budget: str | float | None = None,
    set: Settings = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = "auto",
) -> Run:
    """Make an adapter from documents, or have a trained network write one from a description or a document.

    Args:
        model: the base: a folder, a hub id or "builtin:tiny".
        document: a text file, a table with a column `text`, or a folder of these; or several of them.
        out: a new folder.
        hypernet: a run folder of a variant that writes adapters; it writes this one at once, and nothing is trained.
        description: with `hypernet`: what the task is, in words.
        base: with `hypernet`: the base model, in place of the one on record.
        data: rows about the documents: `prompt`, and `completion` where the answer is known; by default the model
            writes both.
        columns: our names to those of `data`.
        questions: that the model writes about each chunk.
        chunk_tokens: of a document that are in the prompt at once; by default 512, or what the context leaves.
        answer_tokens: of an answer that the model writes, at most.
        add_chunks: train each chunk by itself and put the components side by side, then prune.
        budget: an average rank (8), a share of the start (0.5), parameters ("2M"), bytes ("200kB"), or "auto"; by
            default 8, and with `hypernet` what its recipe said.
        set: keys of the recipe to change, such as `{"train.max_steps": 200}`.
        dtype: number format of the saved factors: "float32", "bf16" or "fp8".
        trust_remote_code, overwrite, progress: as of `train` and `prune`.
        resume: go on where it was stopped: with the rows, or with training.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked, asked_adapt

    how: dict[str, Any] = {"data": as_path(data), "columns": columns, "questions": questions, "dtype": dtype}
    how |= {"chunk_tokens": chunk_tokens, "answer_tokens": answer_tokens, "add_chunks": add_chunks, "budget": budget}
    how |= {"settings": asked.settings(set), "trust_remote_code": trust_remote_code}
    how |= {"overwrite": overwrite, "resume": resume, "description": description}
    how |= {"hypernet": as_path(hypernet), "base": as_text(base)}
    documents = cast("Sequence[PathLike]", document or [])  # `checked` has made a list of it
    summary, notes = done(lambda: asked_adapt.adapt(as_text(model), documents, Path(out), **how), progress)
    return results.Run(summary, notes, Path(out))
