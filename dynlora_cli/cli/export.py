"""`dynlora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynlora_cli.cli.options import AnyDtype, Base, Overwrite, PlugInOptions, adapters, plug_ins
from dynlora_cli.cli.reporting import AsJson, Trust, console, reporting, return_memory_at_once

To = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        autocompletion=plug_ins("exporters"),
        help="peft, uniform, vllm, sglang, tgi, lorax, mlx, gguf, ollama, merged, merged-gguf or packed; "
        "vllm-library of a library; diffusers or kohya of a pipeline's LoRA.",
        show_default=False,
    ),
]
One = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        autocompletion=adapters,
        help="A run folder, any PEFT LoRA, or the LoRA file of an image pipeline; a folder of runs means the newest of "
        "them, a sweep's folder its best.",
        show_default=False,
    ),
]
All = Annotated[
    Path | None,
    typer.Option("--library", metavar="LIB", help="All adapters of a library; --to vllm-library.", show_default=False),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.", show_default=False)]
OutType = Annotated[
    str,
    typer.Option(
        metavar="TYPE", help="Number format of a GGUF model: f32, f16, q8_0; q4_k_m, q6_k ... by llama.cpp's quantizer."
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Nats per token by which the export may differ; by default 0.01, and more for small --outtype.",
        show_default=False,
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        help="Send the files and a card to the Hugging Face hub, to a private repository.",
        show_default=False,
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Everybody may see what --push-to-hub sends.")]


def export(
    to: To,
    out: Out,
    adapter: One = None,
    library: All = None,
    set_: PlugInOptions = None,
    base: Base = None,
    trust_remote_code: Trust = False,
    outtype: OutType = "f16",
    dtype: AnyDtype = None,
    max_kl: MaxKl = None,
    push_to_hub: Push = None,
    public: Public = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the form that another tool reads, and check it there."""
    with reporting(as_json) as result:
        from dynlora_cli.cli import asked

        work = asked.export(
            to,
            out,
            adapter=adapter,
            library=library,
            options=set_ or [],
            base=base,
            trust_remote_code=trust_remote_code,
            outtype=outtype,
            dtype=dtype,
            max_kl=max_kl,
            overwrite=overwrite,
            push_to_hub=push_to_hub,
            public=public,
        )
        return_memory_at_once()
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console())
        summary = work(view)
        result.update(summary)
        (view.show_exported if library is None else view.show_exported_library)(summary)
