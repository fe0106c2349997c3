"""`dynlora prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynlora_cli.cli.options import AdapterPath, Base, Overwrite, PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting

POLICY, TOLERANCE = "magnitude", "0.5%"

BudgetText = Annotated[
    str | None,
    typer.Option(
        metavar="8|0.5|2M|auto",
        help="An average rank, a share of the parameters, a number of them, or as few as --tolerance allows.",
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
    str, typer.Option(help="magnitude needs no data; activation, the best, fisher and gradient look at held-out rows.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="RECIPE|FILE",
        help="Rows to look at and to measure on; by default the run's own held-out rows.",
        show_default=False,
    ),
]
Tolerance = Annotated[
    str, typer.Option(metavar="0.5%", help="With --budget auto: how much the held-out loss may rise.")
]
Heal = Annotated[int, typer.Option(metavar="STEPS", min=0, help="Training steps after the cut.")]
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
    policy: Policy = POLICY,
    set_: PlugInOptions = None,
    data: Data = None,
    tolerance: Tolerance = TOLERANCE,
    heal: Heal = 0,
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
        from dynlora_cli.commands import preflight
        from dynlora_cli.runs.folder import refuse_occupied

        choosing = {"--policy": policy != POLICY, "--set": set_, "--tolerance": tolerance != TOLERANCE, "--seed": seed}
        _refuse_both(budget, born or [], [option for option, is_given in choosing.items() if is_given])
        cut = None if budget is None else _cut(budget, policy, set_ or [], tolerance)
        preflight.adapters([adapter], base, data)
        refuse_occupied(out, overwrite=overwrite, option="--out")
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console())
        common: dict[str, Any] = {
            "data": data,
            "heal_steps": heal,
            "base_name": base,
            "trust_remote_code": trust_remote_code,
            "max_samples": max_samples,
            "measure": measure,
            "overwrite": overwrite,
        }
        if cut is None:
            from dynlora_cli.commands import retire

            summary = retire.run(retire.Request(adapter, born or [], out, **common), view)
            view.show_retired(summary)
        else:
            from dynlora_cli.commands import prune as command

            summary = command.run(command.Request(adapter, out=out, seed=seed, **cut, **common), view)
            view.show_pruned(summary)
        result.update(summary)


def _refuse_both(budget: str | None, born: list[str], choosing: list[str]) -> None:
    """Refuse a command that says neither what goes nor how much, or both."""
    from dynlora_cli.errors import UsageError

    if not budget and not born:
        raise UsageError(
            "prune needs to know how much may stay, or whose components go", "give --budget 0.5, say, or --born RUN"
        )
    if budget and born:
        raise UsageError(
            "--born and --budget are two steps: one takes an update out, the other makes the adapter smaller",
            "retire first, then prune the folder that --out named",
        )
    if born and choosing:
        raise UsageError(
            f"{choosing[0]} chooses components for --budget; --born takes all that a run brought in",
            f"leave {choosing[0]} out",
        )


def _cut(budget: str, policy: str, options: list[str], tolerance: str) -> dict[str, Any]:
    """What the options of a cut say, each checked."""
    from dynlora_cli import plugins
    from dynlora_cli.cli.values import choice, share, size
    from dynlora_cli.config.options import given

    wanted, rise = size(budget, "--budget"), share(tolerance, "--tolerance")
    choice(policy, plugins.names("policies"), "--policy")
    return {"budget": wanted, "tolerance": rise, "policy": policy, "options": given("policies", policy, options)}
