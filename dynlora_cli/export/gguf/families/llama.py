"""Llama and its relatives.

llama    Llama and Mistral; the rows of q and k are interleaved, since llama.cpp rotates neighbouring pairs
         where transformers rotates the two halves of a head
smollm3  likewise; every fourth block has no rotary embedding
granite  likewise; with four factors that scale embeddings, attention, both halves of a block, and logits
qwen2    with q, k and v biases
qwen3    with a norm on each head's q and k
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.families.blocks import (
    Sizes,
    attention,
    ends,
    gated,
    half_norms,
    head_norms,
    norms,
    size_keys,
)
from dynlora_cli.export.gguf.form import INSTEAD, Architecture, Value, prefixed, require
from dynlora_cli.export.gguf.rope import context, plain_rope_keys, rope_keys

NAMES = {
    **{"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite"},
    **{"qwen2": "qwen2", "qwen3": "qwen3"},
}
_NO_ROPE_STEP = 4  # fixed in llama.cpp's smollm3


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    require(config, kind, hidden_act="silu")
    name, sizes, tied = NAMES[kind], Sizes.of(config), bool(config["tie_word_embeddings"])
    notes: list[str] = []
    factors: dict[str, list[float]] = {}
    windowed = kind == "mistral" or bool(config.get("use_sliding_window"))
    keys = size_keys(config, sizes, context(config, windowed, notes))
    if kind == "smollm3":
        _check_smollm3(config)
        rope = plain_rope_keys(config, sizes.head_dim)
    else:
        rope, factors = rope_keys(config, sizes.head_dim)
    keys |= rope | (_granite_keys(config, sizes) if kind == "granite" else {})
    biased = _biased(config, kind)
    entries = ends(sizes, tied=tied)
    for layer in range(sizes.layers):
        entries += attention(sizes, layer, rotated=name in ("llama", "smollm3", "granite"), biased=biased)
        entries += gated(sizes, layer, biased=biased)
        entries += norms(layer, half_norms(sizes) | (head_norms(sizes) if kind == "qwen3" else {}))
    return Architecture(name, prefixed(name, keys), entries, sizes.vocab, tied, factors, notes)


def _biased(config: dict[str, Any], kind: str) -> set[str]:
    """Names of the matrices that have a bias."""
    if kind == "qwen2":
        return {"q_proj", "k_proj", "v_proj"}
    if kind in ("qwen3", "smollm3"):
        require(config, kind, attention_bias=False, mlp_bias=False)
    attention_biases = {"q_proj", "k_proj", "v_proj", "o_proj"} if config.get("attention_bias") else set()
    return attention_biases | ({"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set())


def _granite_keys(config: dict[str, Any], sizes: Sizes) -> dict[str, Value]:
    """Granite's four factors. llama.cpp divides the logits by theirs, as transformers does."""
    if sizes.head_dim * sizes.heads != sizes.hidden:
        raise UsageError("granite with heads of another size than hidden_size / heads has no GGUF form", INSTEAD)
    names = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    if zero := [key for key in names if not config[key]]:
        raise UsageError(f"{zero[0]} is 0, which llama.cpp takes for unset", INSTEAD)
    return {gguf: float(config[key]) for key, gguf in names.items()}


def _check_smollm3(config: dict[str, Any]) -> None:
    expected = [int((layer + 1) % _NO_ROPE_STEP != 0) for layer in range(config["num_hidden_layers"])]
    if list(config["no_rope_layers"]) != expected:
        raise UsageError(
            f"no_rope_layers is {config['no_rope_layers']}; llama.cpp leaves the rotary embedding out of every fourth "
            "block",
            INSTEAD,
        )
