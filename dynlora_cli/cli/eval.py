"""The command line of `dynlora eval`: its options, and what can be refused before anything heavy loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynlora_cli.cli.eval_library import evaluate_library, one_file
from dynlora_cli.cli.options import PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.text import to_type

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model
    from dynlora_cli.evaluation.thresholds import Thresholds

NEWEST_BELOW = Path("out")

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE.yaml",
        help="Measure on its held-out rows, by default the adapter it made.",
        show_default=False,
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="FOLDER", help="A run folder or any PEFT LoRA. Repeatable.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|RECIPE",
        help="Other rows: all of a file, or a recipe's held-out ones. With --library or --router repeatable, and "
        "UPDATE=FILE or unrelated=FILE where it is known what they belong to.",
        show_default=False,
    ),
]
LibraryFolder = Annotated[
    Path | None,
    typer.Option(
        "--library",
        metavar="LIB",
        help="A library, of which a router chooses on each row by its prompt what is active.",
        show_default=False,
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What decides: calibrated, embedding, likelihood, fixed, arrow, spectr, lag or another. With --library or "
        "several --adapter.",
        show_default=False,
    ),
]
Explain = Annotated[bool, typer.Option("--explain", help="With --library or --router: each decision and its reason.")]
Base = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="The base model, where it was moved.", show_default=False)
]
NoBase = Annotated[bool, typer.Option("--no-base", help="Do not measure the base model.")]
MaxSamples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows at most.", show_default=False)]
Generate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Prompts to answer for BLEU and others; 0: none. By default 32.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", min=0, help="Answers to show side by side.")]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Tasks of lm-eval-harness: names or .yaml files.", show_default=False),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Documents of each task at most.", show_default=False)
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="Other rows: what was forgotten of them, against the base. Repeatable.",
        show_default=False,
    ),
]
FailAbove = Annotated[
    list[str] | None,
    typer.Option(
        metavar="X",
        help="Exit 4 if a held-out loss is higher; forgetting=X: if more is forgotten.",
        show_default=False,
    ),
]
FailBelow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC=X",
        help="Exit 4 if an adapter's accuracy, f1, bleu, ... is lower. Repeatable.",
        show_default=False,
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(metavar="REPORT.json", help="A former --json report to compare with.", show_default=False),
]
MaxRegression = Annotated[
    str | None,
    typer.Option(
        metavar="1%",
        help="Exit 4 if a loss is so much above the baseline's; 1% by default.",
        show_default=False,
    ),
]
AllowTemplateMismatch = Annotated[
    bool, typer.Option("--allow-template-mismatch", help="Measure with another chat template than in training.")
]


def evaluate(
    context: typer.Context,
    recipe: RecipeFile = None,
    adapter: Adapters = None,
    library: LibraryFolder = None,
    router: Router = None,
    set_: PlugInOptions = None,
    explain: Explain = False,
    data: Data = None,
    also: Also = None,
    base: Base = None,
    trust_remote_code: Trust = False,
    no_base: NoBase = False,
    max_samples: MaxSamples = None,
    generate: Generate = None,
    samples: Samples = 0,
    tasks: Tasks = None,
    limit: Limit = None,
    fail_above: FailAbove = None,
    fail_below: FailBelow = None,
    baseline: Baseline = None,
    max_regression: MaxRegression = None,
    allow_template_mismatch: AllowTemplateMismatch = False,
    as_json: AsJson = False,
) -> None:
    """Measure adapters and their base on held-out rows. Without arguments: the newest run below ./out."""
    with reporting(as_json) as result:
        if library is not None or router is not None:
            result.update(evaluate_library(context))
            return
        from dynlora_cli.commands import preflight

        limits = _limits(fail_above or (), fail_below or (), baseline, max_regression)
        others, names = _other_rows(also or [], no_base), _task_names(tasks, limit)
        folders, rows = _what_is_meant(recipe, adapter or [], one_file(data, explain, set_))
        preflight.adapters(folders, base, rows, others)
        from dynlora_cli.cli.views.evaluation import show_evaluation
        from dynlora_cli.commands import evaluate as command
        from dynlora_cli.evaluation.options import Options

        options = Options(
            base=base,
            trust_remote_code=_trusted(recipe, trust_remote_code),
            with_base=not no_base,
            max_samples=max_samples,
            also=others,
            generate=generate,
            samples=samples,
            tasks=names,
            limit=limit,
            allow_template_mismatch=allow_template_mismatch,
            thresholds=limits,
        )
        view = console()
        result.update(command.run(folders, rows, options, view.line))
        show_evaluation(view, result)
        if result["failed"]:
            view.error(MeasureError(result["error"]))
    if result["failed"]:  # not an exception: the report is the result, also where a threshold is missed
        raise typer.Exit(MeasureError.exit_code)


def _limits(above: Sequence[str], below: Sequence[str], baseline: Path | None, most: str | None) -> Thresholds:
    from dynlora_cli.cli.thresholds import read_thresholds

    return read_thresholds(fail_above=above, fail_below=below, baseline=baseline, max_regression=most)


def _trusted(recipe: Path | None, everything: bool) -> bool | Model:
    """Whose code may run: that of any base, that of a recipe's own model, or nobody's."""
    from dynlora_cli.config.load import load_recipe

    return everything or (load_recipe(recipe).model if recipe else False)


def _what_is_meant(recipe: Path | None, adapters: list[Path], data: Path | None) -> tuple[list[Path], Path | None]:
    """The adapters' folders, and where the rows come from where that is not the first adapter's own run.

    Raises:
        UsageError: the arguments contradict each other, or what they name is not there.
    """
    from dynlora_cli.config.load import RECIPES, load_recipe

    if recipe is None:
        if not adapters and not NEWEST_BELOW.is_dir():
            raise UsageError("there is no run below ./out", "train one first, or name one with --adapter FOLDER")
        if data is not None and data.suffix.lower() in RECIPES:
            load_recipe(data)
        return adapters or [NEWEST_BELOW], data
    if recipe.is_dir():
        raise UsageError(f"{recipe} is a folder, not a recipe", to_type("eval", "--adapter", recipe))
    if adapters and data is not None:
        raise UsageError(f"{recipe} and --data {data} both say which rows to take", "leave one of them out")
    made = Path(load_recipe(recipe).output_dir)
    if not adapters and not made.is_dir():
        raise UsageError(
            f"{recipe}: there is no run in {made} yet", f"{to_type('train', recipe)}, or name an adapter with --adapter"
        )
    return adapters or [made], data or recipe


def _other_rows(texts: list[str], no_base: bool) -> dict[str, Path]:
    """The files of `--also` by their names.

    Raises:
        UsageError: one is not written NAME=FILE, two have one name, or there is nothing to compare with.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = (part.strip() for part in text.partition("="))
        if not (name and equals and file):
            raise UsageError(f"--also {text} must be written NAME=FILE", "for example --also general=general.jsonl")
        if name in found:
            raise UsageError(f"--also: two sets are called {name}", "give each a name of its own")
        found[name] = Path(file)
    if found and no_base:
        raise UsageError("--also compares with the base model, which --no-base leaves out", "leave one of them out")
    return found


def _task_names(tasks: str | None, limit: int | None) -> list[str]:
    from dynlora_cli.evaluation.lm_eval import require, split_tasks

    if tasks is None:
        if limit is not None:
            raise UsageError("--limit is of tasks, and there are none", "add --tasks, or use --max-samples for rows")
        return []
    require()
    return split_tasks(tasks)
