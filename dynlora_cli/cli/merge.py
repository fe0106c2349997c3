"""`dynlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynlora_cli.cli.options import Adapters, Base, Overwrite, PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once
from dynlora_cli.errors import UsageError

METHODS = ("exact", "linear", "ties", "dare", "svd")  # in the order in which they are shown, others behind them

Into = Annotated[
    str | None,
    typer.Option(
        metavar="base|adapter",
        help="By default one adapter goes into its base, several into one adapter.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the result goes; by default `merged` inside the run, for one adapter.",
        show_default=False,
    ),
]
Method = Annotated[
    str, typer.Option(help=f"How several adapters are combined: {', '.join(METHODS[:-1])} or {METHODS[-1]}.")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W,W", help="A weight for each adapter; by default 1 each.", show_default=False),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        metavar="8|0.5|2M",
        help="Size of the combined adapter; by default that of the largest, and for exact what it takes.",
        show_default=False,
    ),
]
Density = Annotated[float, typer.Option(help="Share of the entries that ties and dare keep.")]
Seed = Annotated[int, typer.Option(help="Of dare.")]
BaseWeights = Annotated[
    str,
    typer.Option(
        metavar="original|dequantized",
        help="Of an adapter trained on a quantized base: add to its weights as they were, or as training saw them.",
    ),
]
DType = Annotated[
    str,
    typer.Option(
        metavar="keep|float32|bfloat16|float16", help="Of the merged model; rounding to 16 bits costs precision."
    ),
]
MaxKl = Annotated[float, typer.Option(help="Nats per token by which the merged model may differ from base + adapter.")]
MaxChanged = Annotated[
    str,
    typer.Option(
        metavar="1%", help="Share of choices that may change, beyond what rounding to the stored type explains."
    ),
]


def merge(
    adapter: Adapters,
    into: Into = None,
    out: Out = None,
    method: Method = "exact",
    set_: PlugInOptions = None,
    weights: Weights = None,
    budget: BudgetText = None,
    density: Density = 0.5,
    seed: Seed = 0,
    base: Base = None,
    trust_remote_code: Trust = False,
    base_weights: BaseWeights = "original",
    dtype: DType = "keep",
    max_kl: MaxKl = 0.01,
    max_changed: MaxChanged = "1%",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, or several adapters into one."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.values import choice, share

        wanted = into or ("base" if len(adapter) == 1 else "adapter")
        changed = share(max_changed, "--max-changed")
        choice(wanted, ("base", "adapter"), "--into")
        choice(base_weights, ("original", "dequantized"), "--base-weights")
        choice(dtype, ("keep", "float32", "bfloat16", "float16"), "--dtype")
        way = _way(method, weights, budget, density)
        way["options"] = _options(method, set_ or [], len(adapter))
        _refuse_places(adapter, wanted, out, base, overwrite=overwrite)
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import merge as command

        view = AdapterView(console())
        summary = command.run(
            adapter,
            wanted,
            out,
            command.Way(**way, seed=seed),
            command.Wanted(base_weights, dtype, max_kl, changed),
            base_name=base,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            emit=view,
        )
        result.update(summary)
        view.show_merged(summary)


def _way(method: str, weights: str | None, budget: str | None, density: float) -> dict[str, Any]:
    """How adapters are combined, as the arguments of `Way`; its file needs torch, and wrong ones are told before."""
    from dynlora_cli import plugins
    from dynlora_cli.cli.values import choice, numbers, size

    others = [name for name in plugins.names("methods") if name not in METHODS]
    choice(method, (*METHODS, *others), "--method")
    given = numbers(weights, "--weights") if weights else None
    limit = size(budget, "--budget", auto=False) if budget else None
    if not 0 < density <= 1:
        raise UsageError(f"--density {density} is no share above 0", "for example --density 0.5")
    return {"method": method, "weights": given, "budget": limit, "density": density}


def _options(method: str, texts: list[str], adapters: int) -> Any:
    """Options that the method itself brings."""
    from dynlora_cli.config.options import given

    if texts and adapters == 1:
        raise UsageError("--set is for how several adapters are combined, and there is one", "leave --set out")
    return given("methods", method, texts)


def _refuse_places(adapters: list[Path], into: str, out: Path | None, base: str | None, *, overwrite: bool) -> None:
    """Refuse folders that are not there, and one for the result that is taken."""
    from dynlora_cli.commands import preflight
    from dynlora_cli.runs.folder import refuse_occupied

    if len(adapters) == 1 and into == "adapter":
        raise UsageError("--into adapter combines several adapters", "add --adapter, or use `dynlora prune`")
    if len(adapters) > 1 and out is None:
        raise UsageError("several adapters have no folder of their own for the result", "name one with --out")
    found = preflight.adapters(adapters, base)
    refuse_occupied(out or found[0] / "merged", overwrite=overwrite, option="--out")
