"""The command line of `dynlora eval`: its options, and what can be refused before anything heavy loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynlora_cli.cli.eval_library import evaluate_library, one_file
from dynlora_cli.cli.options import PlugInOptions, adapters, plug_ins, recipes
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting
from dynlora_cli.errors import MeasureError

if TYPE_CHECKING:
    from dynlora_cli.evaluation.thresholds import Thresholds

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE.yaml",
        autocompletion=recipes,
        help="Measure on its held-out rows, by default the adapter it made.",
        show_default=False,
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder or any PEFT LoRA. Repeatable.",
        show_default=False,
        autocompletion=adapters,
    ),
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
        autocompletion=plug_ins("routers"),
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
        from dynlora_cli.cli import asked_eval

        work = asked_eval.evaluate(
            recipe,
            adapter or [],
            thresholds=_limits(fail_above, fail_below, baseline, max_regression),
            data=one_file(data, explain, set_),
            also=asked_eval.named_rows(also or []),
            base=base,
            trust_remote_code=trust_remote_code,
            with_base=not no_base,
            max_samples=max_samples,
            generate=generate,
            samples=samples,
            tasks=tasks,
            limit=limit,
            allow_template_mismatch=allow_template_mismatch,
        )
        from dynlora_cli.cli.views.evaluation import show_evaluation

        view = console()
        result.update(work(view.line))
        show_evaluation(view, result)
        if result["failed"]:
            view.error(MeasureError(result["error"]))
    if result["failed"]:  # not an exception: the report is the result, also where a threshold is missed
        raise typer.Exit(MeasureError.exit_code)


def _limits(above: list[str] | None, below: list[str] | None, baseline: Path | None, most: str | None) -> Thresholds:
    from dynlora_cli.cli.thresholds import read_thresholds

    return read_thresholds(fail_above=above or (), fail_below=below or (), baseline=baseline, max_regression=most)
