"""`dynlora adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynlora_cli.cli.options import Base, Columns, SavedDtype
from dynlora_cli.cli.reporting import AsJson, Trust, console, opened, reporting, typed
from dynlora_cli.cli.values import column_names

if TYPE_CHECKING:
    from collections.abc import Sequence

ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The base: a folder, a hub id or builtin:tiny.", show_default=False),
]
Hypernet = Annotated[
    Path | None,
    typer.Option(
        "--hypernet",
        metavar="FOLDER",
        help="A trained network that writes the adapter at once, from a description or a document; it knows its base.",
        show_default=False,
    ),
]
Description = Annotated[
    str | None,
    typer.Option(
        "--description", metavar="TEXT", help="With --hypernet: what the task is, in words.", show_default=False
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option(
        "--document",
        metavar="FILE",
        help="A text (.txt, .md), a table with a column `text`, or a folder of these. Repeatable.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter goes.", show_default=False)]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Rows about the documents: `prompt`, and `completion` where the answer is known; by default the model "
        "writes both.",
        show_default=False,
    ),
]
Questions = Annotated[
    int, typer.Option("--questions", metavar="N", min=1, help="Questions that the model writes about each chunk.")
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens",
        metavar="N",
        min=1,
        help="Tokens of a document that are in the prompt at once; by default 512, or what the model's context leaves.",
        show_default=False,
    ),
]
AnswerTokens = Annotated[
    int, typer.Option("--answer-tokens", metavar="N", min=1, help="Tokens of an answer that the model writes, at most.")
]
AddChunks = Annotated[
    bool,
    typer.Option("--add-chunks", help="Train each chunk by itself and put the components side by side, then prune."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Average rank (8), share of the start (0.5), parameters (2M), bytes (200kB), or auto; by default 8, and "
        "with --hypernet what its recipe said.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as train.max_steps=200. Repeatable."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where it was stopped: with the rows, or with training.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, load no weights, write nothing.")]


def adapt(
    out: Out,
    model: ModelName = None,
    document: Documents = None,
    hypernet: Hypernet = None,
    description: Description = None,
    base: Base = None,
    data: Data = None,
    columns: Columns = None,
    questions: Questions = 24,
    chunk_tokens: ChunkTokens = None,
    answer_tokens: AnswerTokens = 128,
    add_chunks: AddChunks = False,
    budget: Budget = None,
    overrides: Overrides = None,
    dtype: SavedDtype = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter from documents, or have a trained network write one from a description or a document."""
    with reporting(as_json) as result:
        from dynlora_cli.cli import asked_adapt

        work = asked_adapt.adapt(
            model,
            document or [],
            out,
            hypernet=hypernet,
            description=description,
            base=base,
            data=data,
            columns=column_names(columns) if columns else None,
            questions=questions,
            chunk_tokens=chunk_tokens,
            answer_tokens=answer_tokens,
            add_chunks=add_chunks,
            budget=budget,
            settings=overrides or [],
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
        )
        from dynlora_cli.cli.views.adapt import AdaptView

        view = AdaptView(console())
        if dry_run:
            result.update({"ok": True, "plan": work(view)})
            view.show_plan(result["plan"])
            return
        with view:
            summary = work(view)
        summary["next"] = _next_commands(out, has_keys=hypernet is None or description is not None)
        result.update(summary)
        view.show(summary)


def _next_commands(out: Path, *, has_keys: bool) -> Sequence[str]:
    """Commands that make sense after it.

    Args:
        out: the adapter.
        has_keys: it was made from rows or a description, by which a library finds it.
    """
    folder = str(out)
    page = out / "report.html"
    return [
        typed("chat", "--adapter", folder),
        typed("generate", "a question", "--adapter", folder, "--compare"),
        *([typed("library", "add", f"{out.parent}/library", "--adapter", folder)] if has_keys else []),
        *([opened(page)] if page.is_file() else []),
    ]
