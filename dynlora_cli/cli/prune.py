"""`dynlora prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import AdapterPath, AnyDtype, Base, Overwrite, PlugInOptions, plug_ins
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting

BudgetText = Annotated[
    str | None,
    typer.Option(
        metavar="8|0.5|2M|200kB|auto",
        help="An average rank, a share or a number of parameters, bytes of the file, or as few as --tolerance allows.",
        show_default=False,
    ),
]
Born = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN",
        help="Instead of a budget: take out what this run put in, by its name, its id or its folder. Repeatable.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the smaller adapter goes.", show_default=False)]
Policy = Annotated[
    str,
    typer.Option(
        help="auto: activation, which looks at held-out rows, or magnitude where there are none.",
        autocompletion=plug_ins("policies"),
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="RECIPE|FILE",
        help="Rows to look at and measure on, and to heal by where none are on record; by default the run's own.",
        show_default=False,
    ),
]
Tolerance = Annotated[
    str, typer.Option(metavar="0.5%", help="With --budget auto: how much the held-out loss may rise.")
]
Heal = Annotated[int, typer.Option(metavar="STEPS", min=0, help="Training steps after the cut.")]
Teacher = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="With --heal: the share that is learned from the adapter before the cut, such as 0.7; the rest from the "
        "rows.",
    ),
]
MaxSamples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Held-out rows at most.", show_default=False)]
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Measure the loss against the size where rows are known.")
]
Seed = Annotated[int, typer.Option(help="Of policies that draw lots.")]


def prune(
    adapter: AdapterPath,
    out: Out,
    budget: BudgetText = None,
    born: Born = None,
    policy: Policy = "auto",
    set_: PlugInOptions = None,
    data: Data = None,
    tolerance: Tolerance = "0.5%",
    heal: Heal = 0,
    teacher: Teacher = 0.0,
    dtype: AnyDtype = None,
    base: Base = None,
    trust_remote_code: Trust = False,
    max_samples: MaxSamples = None,
    measure: Measure = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a trained adapter smaller, or take one of its updates out again."""
    with reporting(as_json) as result:
        from dynlora_cli.cli import asked

        work = asked.prune(
            adapter,
            out,
            budget=budget,
            born=born or [],
            policy=policy,
            options=set_ or [],
            data=data,
            tolerance=tolerance,
            heal=heal,
            teacher=teacher,
            dtype=dtype,
            base=base,
            trust_remote_code=trust_remote_code,
            max_samples=max_samples,
            measure=measure,
            seed=seed,
            overwrite=overwrite,
        )
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console())
        summary = work(view)
        (view.show_retired if born else view.show_pruned)(summary)
        result.update(summary)
