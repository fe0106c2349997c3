"""Names in kohya's LoRA files: `lora_unet_down_blocks_0_attentions_0_...`, in which every dot became an underscore.

Which underscores were dots follows from the words that modules are called by. SD XL is trained by kohya's scripts in a
UNet with the names of Stability's own code, `input_blocks_4_1_...`; those are told apart by their beginning.

    layer_of    a name in a file to the layer's name here
    name_of     the way back

Source: sd-scripts, networks/lora.py (prefixes) and library/sdxl_model_util.py (the UNet's two sets of names).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
LEAVES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
LAYERS_PER_BLOCK = 2  # of the UNets of SD 1, 2 and XL

# Words that have an underscore of their own; all others of a path are one word each.
_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in",
    "proj_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection",
    "token_embedding", "position_embedding",
)  # fmt: skip
_SINGLE = (
    "attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1",
    "conv2", "encoder", "layers", "mlp", "fc1", "fc2", "embeddings",
)  # fmt: skip
_PATH = re.compile(rf"(?:(?:{'|'.join((*_WORDS, *_SINGLE))}|\d{{1,4}})(?:_(?=.)|$))+")
_WORD = re.compile(rf"({'|'.join((*_WORDS, *_SINGLE))}|\d{{1,4}})(?:_|$)")

# Layers of Stability's UNet outside its blocks, and layers of a residual block.
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OF_OUTSIDE = {there: here for here, there in _OUTSIDE.items()}
_OF_RESNET = {there: here for here, there in _RESNET.items()}
_SGM = re.compile(r"(?P<side>input_blocks|output_blocks)_(?P<block>\d{1,2})_(?P<inner>[012])_(?P<rest>.+)")
_OURS = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\.(?P<kind>\w+)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_SGM_MIDDLE = re.compile(r"middle_block_(?P<inner>[012])_(?P<rest>.+)")


@dataclass(frozen=True)
class Style:
    """Which of the names that kohya's files may have a file has.

    Attributes:
        sgm: the UNet has Stability's names.
        numbered: the first text encoder is `te1`, of two; else `te`.
    """

    sgm: bool = False
    numbered: bool = False


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file has a key of this form."""
    return any(key.startswith(tuple(PREFIXES)) for key in keys)


def named(key: str) -> tuple[str, str, str] | None:
    """The layer of a key as here, which of its tensors, and its name in the file; None: no such key."""
    name, _, leaf = key.partition(".")
    layer = layer_of(name)
    return (layer, LEAVES[leaf], name) if layer and leaf in LEAVES else None


def style_of(names: Collection[str]) -> Style | None:
    """Which names a file has, by those of its layers; None: of both kinds, which no tool writes."""
    unet = {_is_sgm(name) for name in names if name.startswith("lora_unet_")}
    text = {name.startswith("lora_te1_") for name in names if name.startswith(("lora_te_", "lora_te1_"))}
    if len(unet) > 1 or len(text) > 1:
        return None
    second = any(name.startswith("lora_te2_") for name in names)
    return Style(sgm=True in unet, numbered=True in text or (not text and second))


def layer_of(name: str) -> str | None:
    """`lora_unet_mid_block_attentions_0_proj_in` to `unet.mid_block.attentions.0.proj_in`; None: no name of a layer."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return None
    rest = name.removeprefix(prefix)
    path = _of_sgm(rest) if prefix == "lora_unet_" and _is_sgm(name) else _dotted(rest)
    return f"{PREFIXES[prefix]}.{path}" if path else None


def name_of(layer: str, style: Style) -> str:
    """The name of a layer in a file; of one that kohya's files have no name for, what `layer_of` does not take."""
    part, _, path = layer.partition(".")
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if style.numbered else "lora_te_"}
    prefix = {**prefixes, "text_encoder_2": "lora_te2_"}.get(part, f"lora_{part}_")
    return prefix + ((style.sgm and part == "unet" and _to_sgm(path)) or path.replace(".", "_"))


def _is_sgm(name: str) -> bool:
    rest = name.removeprefix("lora_unet_")
    return rest in _OUTSIDE or rest.startswith(("input_blocks_", "middle_block_", "output_blocks_"))


def _dotted(rest: str) -> str | None:
    return ".".join(_WORD.findall(rest)) if _PATH.fullmatch(rest) else None


def _of_sgm(rest: str) -> str | None:
    """A layer of Stability's UNet in the UNet of diffusers."""
    if rest in _OUTSIDE:
        return _OUTSIDE[rest]
    per_block = LAYERS_PER_BLOCK + 1
    if match := _SGM_MIDDLE.fullmatch(rest):
        inner = int(match["inner"])
        return _inside("mid_block", "attentions.0" if inner == 1 else f"resnets.{inner // 2}", match["rest"])
    if not (match := _SGM.fullmatch(rest)):
        return None
    number, inner = int(match["block"]), int(match["inner"])
    if match["side"] == "input_blocks":
        if number < 1:
            return None
        block, layer = divmod(number - 1, per_block)
        above = f"down_blocks.{block}"
        if match["rest"] == "op":
            return f"{above}.downsamplers.0.conv" if (inner, layer) == (0, LAYERS_PER_BLOCK) else None
        if layer == LAYERS_PER_BLOCK:
            return None
    else:
        block, layer = divmod(number, per_block)
        above = f"up_blocks.{block}"
        if match["rest"] == "conv":  # the last layer of a block, after its attention where it has one
            return f"{above}.upsamplers.0.conv" if inner and layer == LAYERS_PER_BLOCK else None
    if inner > 1:
        return None
    return _inside(above, f"attentions.{layer}" if inner else f"resnets.{layer}", match["rest"])


def _inside(above: str, block: str, rest: str) -> str | None:
    """A layer of a residual block or of an attention."""
    own = _RESNET.get(rest) if block.startswith("resnets") else _dotted(rest)
    return f"{above}.{block}.{own}" if own else None


def _to_sgm(path: str) -> str | None:
    """A layer of the UNet of diffusers in Stability's; None: it has none."""
    if path in _OF_OUTSIDE:
        return _OF_OUTSIDE[path]
    if not (match := _OURS.fullmatch(path)):
        return None
    kind, layer, rest = match["kind"], int(match["layer"]), match["rest"].replace(".", "_")
    if kind == "resnets":
        if match["rest"] not in _OF_RESNET:
            return None
        rest = _OF_RESNET[match["rest"]]
    if not match["side"]:
        return f"middle_block_{1 if kind == 'attentions' else 2 * layer}_{rest}"
    per_block, block = LAYERS_PER_BLOCK + 1, int(match["block"])
    if kind == "downsamplers":
        return f"input_blocks_{per_block * block + per_block}_0_op"
    inner = int(kind == "attentions")
    if match["side"] == "down":
        return f"input_blocks_{per_block * block + layer + 1}_{inner}_{rest}"
    if kind == "upsamplers":
        return f"output_blocks_{per_block * block + LAYERS_PER_BLOCK}_2_conv"
    return f"output_blocks_{per_block * block + layer}_{inner}_{rest}"
