"""OLMo 2: norms behind both halves of a block, and on all queries and all keys together."""

from __future__ import annotations

from typing import Any

from dynlora_cli.export.gguf.families.blocks import Sizes, attention, ends, gated, norms, size_keys
from dynlora_cli.export.gguf.form import Architecture, prefixed, require
from dynlora_cli.export.gguf.rope import plain_rope_keys

NAMES = {"olmo2": "olmo2"}


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    require(config, kind, hidden_act="silu", attention_bias=False)
    sizes, tied = Sizes.of(config), bool(config["tie_word_embeddings"])
    keys = size_keys(config, sizes, int(config["max_position_embeddings"])) | plain_rope_keys(config, sizes.head_dim)
    behind = {
        "self_attn.q_norm": ("attn_q_norm", sizes.heads * sizes.head_dim),
        "self_attn.k_norm": ("attn_k_norm", sizes.kv_heads * sizes.head_dim),
        "post_attention_layernorm": ("post_attention_norm", sizes.hidden),
        "post_feedforward_layernorm": ("post_ffw_norm", sizes.hidden),
    }
    entries = ends(sizes, tied=tied, head="always")
    for layer in range(sizes.layers):
        entries += attention(sizes, layer) + gated(sizes, layer) + norms(layer, behind)
    return Architecture("olmo2", prefixed("olmo2", keys), entries, sizes.vocab, tied)
