"""The commands of an adapter's life after training: prune, merge, export, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once
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
Adapters = Annotated[
    list[Path],
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder, or any PEFT LoRA folder; a folder that holds none means the newest run below it. "
        "Repeatable.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="FOLDER", help="The base model, in place of the one on record.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what dynlora made there before.")]


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
        typer.Option(help="magnitude needs no data; activation, the best, fisher and gradient look at held-out rows."),
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
    trust_remote_code: Trust = False,
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
        from dynlora_cli import plugins
        from dynlora_cli.cli import preflight
        from dynlora_cli.cli.values import choice, share, size
        from dynlora_cli.runs.folder import refuse_occupied

        wanted, rise = size(budget, "--budget"), share(tolerance, "--tolerance")
        choice(policy, plugins.names("policies"), "--policy")
        preflight.adapters([adapter], base, data)
        refuse_occupied(out, overwrite=overwrite, option="--out")
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import prune as prune_command

        view = AdapterView(console())
        summary = prune_command.run(
            adapter,
            wanted,
            out,
            policy=policy,
            data=data,
            tolerance=rise,
            heal_steps=heal,
            base_name=base,
            trust_remote_code=trust_remote_code,
            max_samples=max_samples,
            measure=measure,
            overwrite=overwrite,
            seed=seed,
            emit=view,
        )
        result.update(summary)
        view.show_pruned(summary)


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
        from dynlora_cli.cli import preflight
        from dynlora_cli.cli.values import choice, numbers, share, size
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
        from dynlora_cli.commands import merge as merge_command
        from dynlora_cli.merging import combine

        view = AdapterView(console())
        adapters = merge_command.read_all(adapter, view, base)
        way = combine.Way(method, given, limit, density, seed)
        if wanted == "adapter":
            assert out is not None
            summary = merge_command.into_adapter(
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
            summary = merge_command.into_base(
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


def export(
    adapter: AdapterPath,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="peft, uniform, vllm, sglang, tgi, lorax, gguf, ollama, merged or merged-gguf.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.", show_default=False)],
    base: Base = None,
    trust_remote_code: Trust = False,
    outtype: Annotated[str, typer.Option(metavar="f32|f16|q8_0", help="Number format of a GGUF model.")] = "f16",
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Nats per token by which the export may differ; by default 0.01, and 0.1 for q8_0.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the form that another tool reads, and check it there."""
    with reporting(as_json) as result:
        from dynlora_cli import plugins
        from dynlora_cli.cli import preflight
        from dynlora_cli.cli.values import choice
        from dynlora_cli.runs.folder import refuse_occupied

        choice(to, plugins.names("exporters"), "--to")
        choice(outtype, ("f32", "f16", "q8_0"), "--outtype")
        preflight.adapters([adapter], base)
        refuse_occupied(out, overwrite=overwrite, option="--out")
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import export as export_command

        view = AdapterView(console())
        summary = export_command.run(
            adapter,
            to,
            out,
            base_name=base,
            trust_remote_code=trust_remote_code,
            outtype=outtype,
            max_kl=max_kl,
            overwrite=overwrite,
            emit=view,
        )
        result.update(summary)
        view.show_exported(summary)


def inspect(adapter: Adapters, as_json: AsJson = False) -> None:
    """Show what an adapter is made of; two are put side by side."""
    with reporting(as_json) as result:
        if len(adapter) > 2:
            raise UsageError("--adapter: one or two can be looked at together", "leave some out")
        from dynlora_cli.cli import preflight

        preflight.adapters(adapter)
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import inspect as inspect_adapter_command

        found = inspect_adapter_command.run(adapter)
        result.update(found)
        AdapterView(console()).show_inspected(found)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (prune, merge, export, inspect):
        app.command()(command)
