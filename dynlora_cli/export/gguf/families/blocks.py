"""What most decoders share: one norm before each half of a block, q, k, v, o, and a gated feed-forward part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dynlora_cli.export.gguf.form import Entry, Value

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Args:
        hidden: of the stream between blocks.
        inner: of the feed-forward part.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: numbers of one head.
        layers: blocks.
        vocab: rows of the embedding.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """The sizes in a complete config."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            hidden=hidden,
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            layers=config["num_hidden_layers"],
            vocab=config["vocab_size"],
        )


def size_keys(config: Mapping[str, Any], sizes: Sizes, context: int) -> dict[str, Value]:
    """The hyperparameters that all these models have, without the architecture's name."""
    return {
        "context_length": context,
        "embedding_length": sizes.hidden,
        "block_count": sizes.layers,
        "feed_forward_length": sizes.inner,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": sizes.head_dim,
        "vocab_size": sizes.vocab,
    }


def ends(sizes: Sizes, *, tied: bool, head: str = "own", shift: float = 0.0) -> list[Entry]:
    """Embedding, last norm and output head.

    Args:
        sizes: of the model.
        tied: the head is the embedding.
        head: `own`: llama.cpp takes the embedding where there is no head; `always`: it needs one, so that a tied one
            is written twice.
        shift: of the norm.
    """
    table = (sizes.vocab, sizes.hidden)
    entries = [Entry("model.embed_tokens.weight", "token_embd.weight", table)]
    if tied and head == "always":
        entries.append(Entry("model.embed_tokens.weight", "output.weight", table))
    if not tied:
        entries.append(Entry("lm_head.weight", "output.weight", table))
    return [*entries, Entry("model.norm.weight", "output_norm.weight", (sizes.hidden,), exact=True, shift=shift)]


def attention(sizes: Sizes, layer: int, *, rotated: bool = False, biased: Collection[str] = ()) -> list[Entry]:
    """The matrices of a block's attention.

    Args:
        sizes: of the model.
        layer: number of the block.
        rotated: llama.cpp rotates neighbouring pairs, so the rows of q and k are interleaved.
        biased: names of those that have a bias.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return matrices(
        layer,
        {
            "self_attn.q_proj": ("attn_q", queries, sizes.hidden, sizes.heads if rotated else 0),
            "self_attn.k_proj": ("attn_k", keys, sizes.hidden, sizes.kv_heads if rotated else 0),
            "self_attn.v_proj": ("attn_v", keys, sizes.hidden, 0),
            "self_attn.o_proj": ("attn_output", sizes.hidden, queries, 0),
        },
        biased,
    )


def gated(sizes: Sizes, layer: int, *, biased: Collection[str] = ()) -> list[Entry]:
    """The matrices of a block's feed-forward part."""
    return matrices(
        layer,
        {
            "mlp.gate_proj": ("ffn_gate", sizes.inner, sizes.hidden, 0),
            "mlp.up_proj": ("ffn_up", sizes.inner, sizes.hidden, 0),
            "mlp.down_proj": ("ffn_down", sizes.hidden, sizes.inner, 0),
        },
        biased,
    )


def matrices(layer: int, shapes: Mapping[str, tuple[str, int, int, int]], biased: Collection[str] = ()) -> list[Entry]:
    """Entries of a block's matrices and their biases.

    Args:
        layer: number of the block.
        shapes: llama.cpp's name, O, I and the heads to interleave, by transformers' name in the block.
        biased: last parts of the names that have a bias.
    """
    entries = []
    for module, (gguf, outputs, inputs, heads) in shapes.items():
        old, new = f"model.layers.{layer}.{module}", f"blk.{layer}.{gguf}"
        entries.append(Entry(f"{old}.weight", f"{new}.weight", (outputs, inputs), heads))
        if module.split(".")[-1] in biased:
            entries.append(Entry(f"{old}.bias", f"{new}.bias", (outputs,), heads, exact=True))
    return entries


def norms(layer: int, sizes: Mapping[str, tuple[str, int]], shift: float = 0.0) -> list[Entry]:
    """Entries of a block's norms: llama.cpp's name and size by transformers' name in the block."""
    return [
        Entry(f"model.layers.{layer}.{module}.weight", f"blk.{layer}.{gguf}.weight", (size,), exact=True, shift=shift)
        for module, (gguf, size) in sizes.items()
    ]


def head_norms(sizes: Sizes) -> dict[str, tuple[str, int]]:
    """Norms on each head's queries and keys, for `norms`."""
    return {
        "self_attn.q_norm": ("attn_q_norm", sizes.head_dim),
        "self_attn.k_norm": ("attn_k_norm", sizes.head_dim),
    }


def half_norms(sizes: Sizes) -> dict[str, tuple[str, int]]:
    """The norms before both halves of a block, for `norms`."""
    return {module: (gguf, sizes.hidden) for module, gguf in NORMS.items()}
