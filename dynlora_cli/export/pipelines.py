"""Which adapters can go into a file for a diffusion pipeline, and what pipeline they are of."""

from __future__ import annotations

from dynlora_cli.adapters.adapter import PLAIN, Adapter, ImageFile
from dynlora_cli.adapters.images.of_run import as_image
from dynlora_cli.errors import UsageError

TIMED = "t-lora"  # the file's metadata says by which timesteps
XL_WIDTH = 2048  # of the texts' vectors that SD XL's attention looks at
DEEP = ".transformer_blocks.1."  # of SD's UNets, XL's alone have attentions of several blocks


def of_pipeline(adapter: Adapter, to: str) -> tuple[Adapter, ImageFile]:
    """The adapter with the names of its layers in the pipeline, and how its file was.

    Args:
        adapter: to be exported.
        to: the exporter's name, for messages.

    Raises:
        UsageError: it is of a language model, or has more than components.
    """
    found = as_image(adapter)
    if found is None or found.image is None:
        raise UsageError(
            f"{adapter.folder} is an adapter of no diffusion pipeline, and --to {to} writes a file for one",
            "use --to peft, or name the .safetensors file of a LoRA for a pipeline",
        )
    if found.form not in (PLAIN, TIMED) or found.own_numbers():
        what = f"a {found.kind}" if found.form != PLAIN else "more than components"
        raise UsageError(f"{adapter.folder} is {what}, which --to {to} does not write", "use --to peft")
    return found, found.image


def is_xl(adapter: Adapter) -> bool:
    """Whether a UNet is that of SD XL, by its layers."""
    if any(name.startswith("text_encoder_2.") or DEEP in name for name in adapter.layers):
        return True
    return any(name.endswith("attn2.to_k") and f.a_CI.shape[1] == XL_WIDTH for name, f in adapter.layers.items())
