"""The commands of an adapter's life after training: prune, merge, export, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli_support import console, reporting
from dynlora_cli.errors import UsageError

AdapterPath = Annotated[
    Path,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder, or any PEFT LoRA folder; a folder that holds none means the newest run below it.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="FOLDER", help="The base model, in place of the one on record.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what dynlora made there before.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def prune(
    adapter: AdapterPath,
    budget: Annotated[
        str,
        typer.Option(
            metavar="8|0.5|2M|auto",
            help="An average rank, a share of the parameters, a number of them, or as few as --tolerance allows.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the smaller adapter goes.", show_default=False)],
    policy: Annotated[
        str,
        typer.Option(help="magnitude needs no data; activation, fisher and gradient look at held-out rows."),
    ] = "magnitude",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE|FILE",
            help="Rows to look at and to measure on; by default the run's own held-out rows.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="0.5%", help="With --budget auto: how much the held-out loss may rise.")
    ] = "0.5%",
    heal: Annotated[int, typer.Option(metavar="STEPS", min=0, help="Training steps after the cut.")] = 0,
    base: Base = None,
    max_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Held-out rows at most.", show_default=False)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the loss against the size where rows are known.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of policies that draw lots.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a trained adapter smaller."""
    with reporting(as_json) as result:
        from dynlora_cli import drawers
        from dynlora_cli.options import share, size

        wanted, rise = size(budget, "--budget"), share(tolerance, "--tolerance")
        if policy not in drawers.names("policies"):
            near = drawers.did_you_mean(policy, drawers.names("policies"))
            raise UsageError(
                f"--policy {policy}: there is none{near}", f"choose one of: {', '.join(drawers.names('policies'))}"
            )
        from dynlora_cli import prune as command
        from dynlora_cli.console_adapter import AdapterView

        view = AdapterView(console())
        summary = command.run(
            adapter,
            wanted,
            out,
            policy=policy,
            data=data,
            tolerance=rise,
            heal_steps=heal,
            base_name=base,
            max_samples=max_samples,
            measure=measure,
            overwrite=overwrite,
            seed=seed,
            emit=view,
        )
        result.update(summary)
        view.show_pruned(summary)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (prune,):
        app.command()(command)
