"""GPT-2, whose Conv1D keeps weights as [I, O]."""

from __future__ import annotations

from typing import Any

from dynlora_cli.export.gguf.form import Architecture, Entry, Value, prefixed, require

NAMES = {"gpt2": "gpt2"}


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    require(
        config, kind, activation_function="gelu_new", scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    )  # fmt: skip
    hidden, layers = config["n_embd"], config["n_layer"]
    inner = config.get("n_inner") or 4 * hidden
    keys: dict[str, Value] = {
        "context_length": config["n_positions"],
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": inner,
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "vocab_size": config["vocab_size"],
    }
    entries = [
        Entry("transformer.wte.weight", "token_embd.weight", (config["vocab_size"], hidden)),
        Entry("transformer.wpe.weight", "position_embd.weight", (config["n_positions"], hidden), exact=True),
    ]
    norms = {"transformer.ln_f": "output_norm"}
    for layer in range(layers):
        old, new = f"transformer.h.{layer}", f"blk.{layer}"
        norms |= {f"{old}.ln_1": f"{new}.attn_norm", f"{old}.ln_2": f"{new}.ffn_norm"}
        entries += _matrices(old, new, hidden, inner)
    for norm, gguf in norms.items():
        entries += [Entry(f"{norm}.{x}", f"{gguf}.{x}", (hidden,), exact=True) for x in ("weight", "bias")]
    if not config["tie_word_embeddings"]:
        entries.append(Entry("lm_head.weight", "output.weight", (config["vocab_size"], hidden)))
    tied = bool(config["tie_word_embeddings"])
    return Architecture("gpt2", prefixed("gpt2", keys), entries, config["vocab_size"], tied)


def _matrices(old: str, new: str, hidden: int, inner: int) -> list[Entry]:
    shapes = {
        "attn.c_attn": ("attn_qkv", 3 * hidden, hidden),
        "attn.c_proj": ("attn_output", hidden, hidden),
        "mlp.c_fc": ("ffn_up", inner, hidden),
        "mlp.c_proj": ("ffn_down", hidden, inner),
    }
    entries = []
    for module, (gguf, outputs, inputs) in shapes.items():
        entries.append(Entry(f"{old}.{module}.weight", f"{new}.{gguf}.weight", (inputs, outputs), conv1d=True))
        entries.append(Entry(f"{old}.{module}.bias", f"{new}.{gguf}.bias", (outputs,), exact=True))
    return entries
