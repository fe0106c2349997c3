"""`dynlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import Adapters, Base, Overwrite
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once
from dynlora_cli.errors import UsageError


def merge(
    adapter: Adapters,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="base|adapter",
            help="By default one adapter goes into its base, several into one adapter.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the result goes; by default `merged` inside the run, for one adapter.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How several adapters are combined: exact, linear, ties, dare or svd.")
    ] = "exact",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W", help="A weight for each adapter; by default 1 each.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="8|0.5|2M",
            help="Size of the combined adapter; by default that of the largest, and for exact what it takes.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the entries that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    base: Base = None,
    trust_remote_code: Trust = False,
    base_weights: Annotated[
        str,
        typer.Option(
            metavar="original|dequantized",
            help="Of an adapter trained on a quantized base: add to its weights as they were, or as training saw them.",
        ),
    ] = "original",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="keep|float32|bfloat16|float16", help="Of the merged model; rounding to 16 bits costs precision."
        ),
    ] = "keep",
    max_kl: Annotated[
        float, typer.Option(help="Nats per token by which the merged model may differ from base + adapter.")
    ] = 0.01,
    max_changed: Annotated[
        str,
        typer.Option(
            metavar="1%", help="Share of choices that may change, beyond what rounding to the stored type explains."
        ),
    ] = "1%",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, or several adapters into one."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.values import choice, numbers, share, size
        from dynlora_cli.commands import preflight
        from dynlora_cli.runs.folder import refuse_occupied

        wanted = into or ("base" if len(adapter) == 1 else "adapter")
        changed = share(max_changed, "--max-changed")
        choice(wanted, ("base", "adapter"), "--into")
        choice(base_weights, ("original", "dequantized"), "--base-weights")
        choice(dtype, ("keep", "float32", "bfloat16", "float16"), "--dtype")
        choice(method, ("exact", "linear", "ties", "dare", "svd"), "--method")
        given = numbers(weights, "--weights") if weights else None
        limit = size(budget, "--budget", auto=False) if budget else None
        if not 0 < density <= 1:
            raise UsageError(f"--density {density} is no share above 0", "for example --density 0.5")
        if len(adapter) == 1 and wanted == "adapter":
            raise UsageError("--into adapter combines several adapters", "add --adapter, or use `dynlora prune`")
        if len(adapter) > 1 and out is None:
            raise UsageError("several adapters have no folder of their own for the result", "name one with --out")
        found = preflight.adapters(adapter, base)
        place = out or found[0] / "merged"
        refuse_occupied(place, overwrite=overwrite, option="--out")
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import merge as command
        from dynlora_cli.merging import combine

        view = AdapterView(console())
        adapters = command.read_all(adapter, view, base)
        way = combine.Way(method, given, limit, density, seed)
        if wanted == "adapter":
            assert out is not None
            summary = command.into_adapter(
                adapters,
                out,
                way,
                base_name=base,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                emit=view,
            )
        else:
            one = adapters[0] if len(adapters) == 1 else combine.combine(adapters, way).adapter
            summary = command.into_base(
                one,
                out,
                base_name=base,
                trust_remote_code=trust_remote_code,
                base_weights=base_weights,
                dtype=dtype,
                max_kl=max_kl,
                max_changed=changed,
                inputs=[each.folder for each in adapters],
                overwrite=overwrite,
                emit=view,
            )
        result.update(summary)
        view.show_merged(summary)
