"""`dynlora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import AdapterPath, Base, Overwrite, PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once

To = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        help="peft, uniform, vllm, sglang, tgi, lorax, gguf, ollama, merged or merged-gguf.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.", show_default=False)]
OutType = Annotated[str, typer.Option(metavar="f32|f16|q8_0", help="Number format of a GGUF model.")]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Nats per token by which the export may differ; by default 0.01, and 0.1 for q8_0.",
        show_default=False,
    ),
]


def export(
    adapter: AdapterPath,
    to: To,
    out: Out,
    set_: PlugInOptions = None,
    base: Base = None,
    trust_remote_code: Trust = False,
    outtype: OutType = "f16",
    max_kl: MaxKl = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the form that another tool reads, and check it there."""
    with reporting(as_json) as result:
        from dynlora_cli import plugins
        from dynlora_cli.cli.values import choice
        from dynlora_cli.commands import preflight
        from dynlora_cli.config.options import given
        from dynlora_cli.runs.folder import refuse_occupied

        choice(to, plugins.names("exporters"), "--to")
        choice(outtype, ("f32", "f16", "q8_0"), "--outtype")
        options = given("exporters", to, set_ or [])
        preflight.adapters([adapter], base)
        refuse_occupied(out, overwrite=overwrite, option="--out")
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import export as command

        view = AdapterView(console())
        summary = command.run(
            adapter,
            to,
            out,
            base_name=base,
            trust_remote_code=trust_remote_code,
            outtype=outtype,
            options=options,
            max_kl=max_kl,
            overwrite=overwrite,
            emit=view,
        )
        result.update(summary)
        view.show_exported(summary)
