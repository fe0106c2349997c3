"""`dynlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import Adapters, Base, Overwrite, PlugInOptions, words
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once
from dynlora_cli.cli.values import METHODS

Into = Annotated[
    str | None,
    typer.Option(
        metavar="base|adapter",
        autocompletion=words("base", "adapter"),
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
    str,
    typer.Option(
        help=f"How several adapters are combined: {', '.join(METHODS[:-1])} or {METHODS[-1]}.",
        autocompletion=words(*METHODS),
    ),
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
AtStep = Annotated[
    float | None,
    typer.Option(
        metavar="0..1000",
        help="Of a T-LoRA: as it is at this timestep, where 0 is a clean picture and 1000 all noise.",
        show_default=False,
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
    at_step: AtStep = None,
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
        from dynlora_cli.cli import asked

        work = asked.merge(
            adapter,
            into=into,
            out=out,
            method=method,
            options=set_ or [],
            weights=weights,
            budget=budget,
            density=density,
            seed=seed,
            at_step=at_step,
            base=base,
            trust_remote_code=trust_remote_code,
            base_weights=base_weights,
            dtype=dtype,
            max_kl=max_kl,
            max_changed=max_changed,
            overwrite=overwrite,
        )
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console())
        summary = work(view)
        result.update(summary)
        view.show_merged(summary)
