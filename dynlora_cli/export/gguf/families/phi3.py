"""Phi 3, and Phi 4, which has its model_type: q, k and v are one matrix, gate and up another."""

from __future__ import annotations

import math
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.families.blocks import Sizes, ends, half_norms, matrices, norms, size_keys
from dynlora_cli.export.gguf.form import INSTEAD, Architecture, Value, prefixed, require
from dynlora_cli.export.gguf.rope import context, rope_of, type_of

NAMES = {"phi3": "phi3"}


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    require(config, kind, hidden_act="silu", attention_bias=False)
    sizes, tied = Sizes.of(config), bool(config["tie_word_embeddings"])
    if sizes.head_dim * sizes.heads != sizes.hidden:
        raise UsageError("phi3 with heads of another size than hidden_size / heads has no GGUF form", INSTEAD)
    notes: list[str] = []
    # 0: no window. llama.cpp's Phi 3 has none, so the context is cut to it, and without the key it takes one.
    keys = size_keys(config, sizes, context(config, True, notes)) | {"attention.sliding_window": 0}
    rope, factors = _rope(config, sizes, notes)
    entries = ends(sizes, tied=tied)
    queries, keys_and_values = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    for layer in range(sizes.layers):
        entries += matrices(
            layer,
            {
                "self_attn.qkv_proj": ("attn_qkv", queries + keys_and_values, sizes.hidden, 0),
                "self_attn.o_proj": ("attn_output", sizes.hidden, queries, 0),
                "mlp.gate_up_proj": ("ffn_up", 2 * sizes.inner, sizes.hidden, 0),
                "mlp.down_proj": ("ffn_down", sizes.hidden, sizes.inner, 0),
            },
        )
        entries += norms(layer, half_norms(sizes))
    return Architecture("phi3", prefixed("phi3", keys | rope), entries, sizes.vocab, tied, factors, notes)


def _rope(config: dict[str, Any], sizes: Sizes, notes: list[str]) -> tuple[dict[str, Value], dict[str, list[float]]]:
    """Keys of the rotary embedding, and LongRoPE's divisors for short and for long contexts."""
    rope = rope_of(config)
    rotated = int(rope.get("partial_rotary_factor", 1.0) * sizes.head_dim)
    keys: dict[str, Value] = {"rope.dimension_count": rotated, "rope.freq_base": float(rope["rope_theta"])}
    original = int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
    keys["rope.scaling.original_context_length"] = original
    if type_of(rope) == "default":
        return keys, {}
    if type_of(rope) != "longrope":
        raise UsageError(f"rope_type {type_of(rope)!r} has no GGUF form here; supported: default, longrope", INSTEAD)
    factors = {f"rope_factors_{side}.weight": [float(x) for x in rope[f"{side}_factor"]] for side in ("long", "short")}
    if {len(values) for values in factors.values()} != {rotated // 2}:
        raise UsageError(f"long_factor and short_factor need {rotated // 2} numbers each", "config.json is damaged")
    stretch = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    keys["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or usual)
    notes.append(
        f"llama.cpp takes LongRoPE's long factors for every text where it is started with a context of more than "
        f"{original} tokens, transformers where the text is that long: serve short texts with -c {original}"
    )
    return keys, factors
