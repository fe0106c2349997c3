"""`dynlora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynlora_cli.cli.options import Base, Overwrite, PlugInOptions
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once

To = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        help="peft, uniform, vllm, sglang, tgi, lorax, gguf, ollama, merged or merged-gguf; vllm-library of a library.",
        show_default=False,
    ),
]
One = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A run folder, or any PEFT LoRA folder; a folder that holds none means the newest run below it.",
        show_default=False,
    ),
]
All = Annotated[
    Path | None,
    typer.Option("--library", metavar="LIB", help="All adapters of a library; --to vllm-library.", show_default=False),
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
    to: To,
    out: Out,
    adapter: One = None,
    library: All = None,
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
        from dynlora_cli.library.library import Library
        from dynlora_cli.runs.folder import refuse_occupied

        choice(to, plugins.names("exporters"), "--to")
        choice(outtype, ("f32", "f16", "q8_0"), "--outtype")
        options = given("exporters", to, set_ or [])
        _check_named(to, adapter, library)
        if library is not None:
            Library.open(library)
        preflight.adapters([adapter] if adapter else [], base)
        refuse_occupied(out, overwrite=overwrite, option="--out")
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import export as command

        view = AdapterView(console())
        shared: dict[str, Any] = {
            "base_name": base,
            "trust_remote_code": trust_remote_code,
            "options": options,
            "max_kl": max_kl,
        }
        if library is not None:
            summary = command.run_library(library, to, out, **shared, overwrite=overwrite, emit=view)
            result.update(summary)
            view.show_exported_library(summary)
            return
        assert adapter is not None
        summary = command.run(adapter, to, out, **shared, outtype=outtype, overwrite=overwrite, emit=view)
        result.update(summary)
        view.show_exported(summary)


def _check_named(to: str, adapter: Path | None, library: Path | None) -> None:
    """Check that there is what the form is of: one adapter, or a library.

    Raises:
        UsageError: there is not, or there are both.
    """
    from dynlora_cli import plugins
    from dynlora_cli.errors import UsageError

    of_library = plugins.declared("exporters", to, "OF_LIBRARY", False)
    if of_library and library is None:
        raise UsageError(f"--to {to} writes all adapters of a library", "name one: --library LIB")
    if not of_library and adapter is None:
        raise UsageError(f"--to {to} writes one adapter", "name it: --adapter FOLDER")
    if adapter is not None and library is not None:
        raise UsageError("--adapter and --library do not go together", f"leave out the one that --to {to} is not of")
