"""Qwen 2 and 3 with experts in every block. The experts of a block are one tensor, with gate and up apart.

qwen2moe  with q, k and v biases, and an expert that sees every token
qwen3moe  with a norm on each head's q and k
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.families.blocks import (
    Sizes,
    attention,
    ends,
    half_norms,
    head_norms,
    matrices,
    norms,
    size_keys,
)
from dynlora_cli.export.gguf.form import INSTEAD, Architecture, Entry, Value, prefixed, require
from dynlora_cli.export.gguf.rope import context, plain_rope_keys

NAMES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}


def describe(config: dict[str, Any], kind: str) -> Architecture:
    """The GGUF form of a complete config."""
    shared = kind == "qwen2_moe"
    require(config, kind, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=not shared)
    name, sizes, tied = NAMES[kind], Sizes.of(config), bool(config["tie_word_embeddings"])
    if shared and sizes.head_dim * sizes.heads != sizes.hidden:
        raise UsageError("qwen2_moe with heads of another size than hidden_size / heads has no GGUF form", INSTEAD)
    notes: list[str] = []
    keys = size_keys(config, sizes, context(config, bool(config.get("use_sliding_window")), notes))
    keys |= plain_rope_keys(config, sizes.head_dim) | _expert_keys(config, shared)
    biased = {"q_proj", "k_proj", "v_proj"} if shared and config.get("qkv_bias", True) else set()
    if not shared:
        require(config, kind, attention_bias=False)
    entries = ends(sizes, tied=tied, head="always" if shared else "own")
    for layer in range(sizes.layers):
        entries += attention(sizes, layer, biased=biased) + _experts(config, sizes, layer)
        entries += _shared_expert(config, sizes, layer) if shared else []
        entries += norms(layer, half_norms(sizes) | ({} if shared else head_norms(sizes)))
    return Architecture(name, prefixed(name, keys), entries, sizes.vocab, tied, notes=notes)


def _expert_keys(config: dict[str, Any], shared: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "expert_count": _count(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    if shared:
        keys["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return keys


def _experts(config: dict[str, Any], sizes: Sizes, layer: int) -> list[Entry]:
    """The router and all experts of a block; transformers keeps gate above up in one tensor."""
    old, new = f"model.layers.{layer}.mlp", f"blk.{layer}"
    experts, inner = _count(config), config["moe_intermediate_size"]
    both, down = (experts, 2 * inner, sizes.hidden), (experts, sizes.hidden, inner)
    return [
        Entry(f"{old}.gate.weight", f"{new}.ffn_gate_inp.weight", (experts, sizes.hidden), exact=True),
        Entry(f"{old}.experts.gate_up_proj", f"{new}.ffn_gate_exps.weight", both, rows=(0, inner)),
        Entry(f"{old}.experts.gate_up_proj", f"{new}.ffn_up_exps.weight", both, rows=(inner, 2 * inner)),
        Entry(f"{old}.experts.down_proj", f"{new}.ffn_down_exps.weight", down),
    ]


def _shared_expert(config: dict[str, Any], sizes: Sizes, layer: int) -> list[Entry]:
    inner = config["shared_expert_intermediate_size"]
    gate = f"model.layers.{layer}.mlp.shared_expert_gate.weight", f"blk.{layer}.ffn_gate_inp_shexp.weight"
    return [
        Entry(*gate, (1, sizes.hidden), exact=True),
        *matrices(
            layer,
            {
                "mlp.shared_expert.gate_proj": ("ffn_gate_shexp", inner, sizes.hidden, 0),
                "mlp.shared_expert.up_proj": ("ffn_up_shexp", inner, sizes.hidden, 0),
                "mlp.shared_expert.down_proj": ("ffn_down_shexp", sizes.hidden, inner, 0),
            },
        ),
    ]


def _count(config: dict[str, Any]) -> int:
    """Experts of a block; the two models write it under different names."""
    return int(config.get("num_experts") or config["num_local_experts"])
