"""Gemma 2 and the text models of Gemma 3.

Their norms multiply by 1 + weight, which the file stores as one number. Some blocks attend to a window only, in an
order that llama.cpp knows; Gemma 3 has a rotary embedding of its own for those, and norms on queries and keys.
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.families.blocks import Sizes, attention, ends, gated, head_norms, norms, size_keys
from dynlora_cli.export.gguf.form import INSTEAD, Architecture, Value, prefixed, require
from dynlora_cli.export.gguf.rope import linear_keys, plain_rope_keys

NAMES = {"gemma2": "gemma2", "gemma3_text": "gemma3"}
# Every so many blocks one attends to everything; the number of blocks of the models that llama.cpp scales otherwise.
PATTERN = {"gemma2": 2, "gemma3_text": 6}
LARGEST = {"gemma2": 46, "gemma3_text": 62}


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    require(config, kind, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    if config.get("use_bidirectional_attention"):
        raise UsageError("use_bidirectional_attention has no GGUF form here: it is of encoders", INSTEAD)
    name, sizes, tied = NAMES[kind], Sizes.of(config), bool(config["tie_word_embeddings"])
    if kind == "gemma2" and not tied:
        raise UsageError("llama.cpp takes Gemma 2's embedding for its output head, and here they are two", INSTEAD)
    _check_scale(config, kind, sizes)
    keys = size_keys(config, sizes, int(config["max_position_embeddings"])) | _window(config, kind)
    keys |= _gemma2_keys(config, sizes) if kind == "gemma2" else _gemma3_keys(config)
    around = {
        "input_layernorm": ("attn_norm", sizes.hidden),
        "post_attention_layernorm": ("post_attention_norm", sizes.hidden),
        "pre_feedforward_layernorm": ("ffn_norm", sizes.hidden),
        "post_feedforward_layernorm": ("post_ffw_norm", sizes.hidden),
    }
    entries = ends(sizes, tied=tied, shift=1.0)
    for layer in range(sizes.layers):
        entries += attention(sizes, layer) + gated(sizes, layer)
        entries += norms(layer, around | (head_norms(sizes) if kind == "gemma3_text" else {}), shift=1.0)
    return Architecture(name, prefixed(name, keys), entries, sizes.vocab, tied)


def _gemma2_keys(config: dict[str, Any], sizes: Sizes) -> dict[str, Value]:
    caps = {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if missing := [key for key, value in caps.items() if not value]:
        raise UsageError(f"{missing[0]} is {caps[missing[0]]!r}; llama.cpp's Gemma 2 always has one", INSTEAD)
    return plain_rope_keys(config, sizes.head_dim) | {key: float(value) for key, value in caps.items()}


def _gemma3_keys(config: dict[str, Any]) -> dict[str, Value]:
    require(config, "gemma3_text", attn_logit_softcapping=None)
    rope = config["rope_parameters"]
    far, near = rope["full_attention"], rope["sliding_attention"]
    if near.get("rope_type", "default") != "default":
        raise UsageError(f"rope_type {near['rope_type']!r} of the blocks with a window has no GGUF form here", INSTEAD)
    keys = {"rope.freq_base": float(far["rope_theta"]), "rope.freq_base_swa": float(near["rope_theta"])}
    cap = config.get("final_logit_softcapping")
    return keys | linear_keys(far) | ({"final_logit_softcapping": float(cap)} if cap else {})


def _window(config: dict[str, Any], kind: str) -> dict[str, Value]:
    """The sliding window, and which blocks have it where that is not what llama.cpp takes by itself."""
    windowed = [layer == "sliding_attention" for layer in config["layer_types"]]
    usual = [bool((layer + 1) % PATTERN[kind]) for layer in range(len(windowed))]
    keys: dict[str, Value] = {"attention.sliding_window": int(config["sliding_window"] or 0)}
    return keys if windowed == usual else keys | {"attention.sliding_window_pattern": windowed}


def _check_scale(config: dict[str, Any], kind: str, sizes: Sizes) -> None:
    """llama.cpp knows the factor of the attention by the number of blocks, and is not told it."""
    largest = sizes.layers == LARGEST[kind]
    expected = sizes.hidden // sizes.heads if largest else sizes.head_dim
    if config["query_pre_attn_scalar"] != expected:
        raise UsageError(
            f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}; llama.cpp computes with {expected} in a "
            f"{NAMES[kind]} of {sizes.layers} blocks",
            INSTEAD,
        )
