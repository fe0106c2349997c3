"""Names in LoRA files of diffusion pipelines, and what they are called here: PART.path.in.module.

The parts are those of a pipeline's folder: `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`. A CLIP
text encoder has a level `text_model` here whether or not the file has it: transformers took it away, and diffusers
loads both.

    named      the layer of a key in diffusers' form, old or new, and which of its tensors
    refusal    what is said of a key that is not understood
"""

from __future__ import annotations

import re
from pathlib import Path

from dynlora_cli.errors import UsageError

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
LONGEST_KEY = 300  # characters
DENOISERS = ("unet", "transformer")
CLIP_LEVEL = (
    "text_model."  # of a CLIP encoder's layers, which files have or not, as transformers was when it saved them
)
DOWN, UP, ALPHA = "down", "up", "alpha"

_NEW = re.compile(
    r"(?P<layer>\w+(?:\.\w+)+)\.(?:(?P<down>lora_A|lora\.down|lora_linear_layer\.down)\.weight"
    r"|(?P<up>lora_B|lora\.up|lora_linear_layer\.up)\.weight|(?P<alpha>alpha))",
    re.ASCII,
)
_OLD = re.compile(r"(?P<block>\w+(?:\.\w+)+)\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>down|up)\.weight", re.ASCII)
_WITHOUT_PART = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
_CLIP_WITHOUT_LEVEL = re.compile(r"(text_encoder(?:_2)?)\.(?=(?:encoder|embeddings|final_layer_norm)\.)")

_SAVE = "load it with diffusers (`pipe.load_lora_weights`) and save that as a LoRA of diffusers"
_FUSE = "let diffusers put it into the pipeline: `pipe.load_lora_weights`, `pipe.fuse_lora`, `pipe.save_pretrained`"
# What is known of keys that are not read: a part of the key, what such a file is, and what to do.
_OTHERS = (
    (r"lora_magnitude_vector|dora_scale", "a DoRA, whose magnitudes are not read here", _FUSE),
    (r"\.hada_", "a LoHa, whose update is no sum of components", _FUSE),
    (r"\.lokr_", "a LoKr, whose update is no sum of components", _FUSE),
    (r"lora_mid|\.oft_|\.glora|\.a1\.|\.on_input|\.w_norm|\.b_norm", "another kind than LoRA of LyCORIS'", _FUSE),
    (r"\.diff(_b)?$", "a whole tensor, no component", _FUSE),
    (r"lora_B\.bias|lora_up\.bias", "a bias beside the components", _FUSE),
    (r"^bundle_emb|^emb_params|^clip_[lg]$", "a new word's embedding in the LoRA's file", "save the LoRA without it"),
    (r"^base_model\.model\.", "an adapter of PEFT's", "name its folder, with adapter_config.json in it"),
    (
        r"^(lora_unet_(double|single|joint)_blocks|lora_unet_blocks|lora_transformer_|lycoris_|diffusion_model\.)",
        "a LoRA in a form of other tools, of FLUX, SD 3 or video models; kohya's files are read of SD 1, 2 and XL",
        _SAVE,
    ),
)


def named(key: str) -> tuple[str, str] | None:
    """The layer of a key in diffusers' form, as here, and which of its tensors; None: no such key."""
    if len(key) > LONGEST_KEY:
        return None
    plain = key.replace(".processor.", ".")
    if match := _OLD.fullmatch(plain):
        encoder = plain.startswith("text_encoder")
        which = {"out": "out_proj" if encoder else "to_out.0"}.get(match["which"])
        which = which or (f"{match['which']}_proj" if encoder else f"to_{match['which']}")
        layer, leaf = f"{match['block']}.{which}", match["factor"]
    elif match := _NEW.fullmatch(plain):
        layer = match["layer"]
        leaf = DOWN if match["down"] else UP if match["up"] else ALPHA
    else:
        return None
    if _WITHOUT_PART.match(layer):  # as diffusers saved a UNet's attention alone
        layer = f"unet.{layer}"
    part = layer.partition(".")[0]
    if part not in PARTS:
        return None
    return _CLIP_WITHOUT_LEVEL.sub(r"\1.text_model.", layer), leaf


def refusal(key: str, file: Path, keys: int) -> UsageError:
    """What is said of a key that is not understood.

    Args:
        key: of the file.
        file: it is in.
        keys: how many the file has.
    """
    said = repr(key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}...")
    for pattern, what, hint in _OTHERS:
        if re.search(pattern, key[: 2 * LONGEST_KEY]):
            return UsageError(f"{file} is not read: {said} is of {what}", hint)
    return UsageError(
        f"{file}: the tensor {said} is not understood, and none of its {keys} is left out",
        "LoRA files of diffusers are read, and kohya's of SD 1, 2 and XL; if this is one, " + _SAVE,
    )


def is_other(key: str) -> bool:
    """Whether a key is of a kind of file that is known, and not read."""
    return any(re.search(pattern, key[: 2 * LONGEST_KEY]) for pattern, _, _ in _OTHERS)


def looks_like_image(keys: list[str]) -> bool:
    """Whether a file with these tensors is an adapter of a pipeline, understood or not."""
    lora = re.compile(r"lora|hada_|lokr_|dora_scale")
    begins = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_", "diffusion_model.")
    parts = tuple(f"{part}." for part in PARTS)
    return any(
        key.startswith(begins) or ((key.startswith(parts) or _WITHOUT_PART.match(key)) and lora.search(key))
        for key in keys
    )
