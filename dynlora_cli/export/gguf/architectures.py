"""From a transformers config to GGUF: architecture, hyperparameters, and one entry per tensor.

Everything follows from the config: which tensors a complete model has, their shapes, their GGUF names, and what is
done to them on the way. So a file is checked before its first byte is written, and is written in one pass.

    llama   Llama and Mistral; the rows of q and k are interleaved, since llama.cpp rotates neighbouring pairs
            where transformers rotates the two halves of a head
    qwen2   with q, k and v biases
    qwen3   with a norm on each head's q and k
    gpt2    whose Conv1D keeps weights as [I, O]

Dimensions: I inputs, O outputs of a matrix; R rows, of a matrix or a bias.

Reference: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dynlora_cli.errors import UsageError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
# Buffers that old checkpoints store beside the weights: attention masks and rotary frequencies.
BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
INSTEAD = "export with `--to merged`, which every transformers model can"

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a model.

    Args:
        name: in transformers' state dict.
        gguf: in the GGUF file.
        shape: in transformers: [O, I] of a matrix, [I, O] where `conv1d`, [R] of a bias or a norm.
        heads: the rows belong to this many heads and are interleaved within each; 0: rows keep their order.
        conv1d: transformers stores the transpose.
        exact: stays f32 whatever the file's kind, as llama.cpp expects of norms, biases and positions.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    conv1d: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """What GGUF must know of a model.

    Args:
        name: llama.cpp's `general.architecture`.
        keys: hyperparameters by their full GGUF key; an int is written as uint32, a float as float32.
        entries: every tensor of a complete model, by transformers' name.
        vocab_size: rows of the embedding.
        tied: the output head is the embedding.
        rope_factors: divisors of the rotary frequencies, one per pair of a head's dimensions, or None.
        notes: where llama.cpp computes something else than transformers.
    """

    name: str
    keys: dict[str, Value]
    entries: dict[str, Entry]
    vocab_size: int
    tied: bool
    rope_factors: list[float] | None = None
    notes: list[str] = field(default_factory=list)

    def entry(self, name: str) -> Entry | None:
        """The entry of a tensor; GPT-2's own checkpoint leaves `transformer.` out. None: not of this model."""
        return self.entries.get(name) or self.entries.get(f"transformer.{name}")


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The GGUF form of a config.

    Args:
        config: content of config.json; keys that are missing have transformers' defaults.

    Raises:
        UsageError: llama.cpp has no such model, or we do not know how to say it in GGUF.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UsageError(
            f"model_type {kind!r} has no GGUF form here; supported: {', '.join(sorted(ARCHITECTURES))}", INSTEAD
        )
    from transformers import CONFIG_MAPPING

    complete = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    return _gpt2(complete) if kind == "gpt2" else _llama_like(complete, kind)


def to_gguf(entry: Entry, tensor: Tensor) -> Tensor:
    """A tensor as GGUF stores it: [O, I] or [R], rows interleaved where rotary embeddings need it.

    Raises:
        UsageError: the tensor has another shape than the config says.
    """
    if tuple(tensor.shape) != entry.shape:
        raise UsageError(
            f"{entry.name} has shape {list(tensor.shape)}, but config.json means {list(entry.shape)}",
            "config.json and the weights must be of the same model",
        )
    if entry.conv1d:
        tensor = tensor.T
    return interleave(tensor, entry.heads) if entry.heads else tensor


def from_gguf(entry: Entry, tensor: Tensor) -> Tensor:
    """The inverse of `to_gguf`."""
    if entry.heads:
        tensor = deinterleave(tensor, entry.heads)
    return tensor.T if entry.conv1d else tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, n/2, 1, n/2 + 1, ...: first and second half of a head as neighbouring pairs."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _llama_like(config: dict[str, Any], kind: str) -> Architecture:
    _require(config, kind, hidden_act="silu")
    name, hidden, heads = ARCHITECTURES[kind], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    notes: list[str] = []
    keys: dict[str, Value] = {
        "context_length": _context(config, kind, notes),
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    rope_keys, factors = _rope(config, head_dim)
    entries = [
        Entry("model.embed_tokens.weight", "token_embd.weight", (config["vocab_size"], hidden)),
        Entry("model.norm.weight", "output_norm.weight", (hidden,), exact=True),
    ]
    if not config["tie_word_embeddings"]:
        entries.append(Entry("lm_head.weight", "output.weight", (config["vocab_size"], hidden)))
    for layer in range(config["num_hidden_layers"]):
        entries += _llama_block(config, kind, layer, heads, kv_heads, head_dim)
    return Architecture(
        name,
        {f"{name}.{key}": value for key, value in (keys | rope_keys).items()},
        {entry.name: entry for entry in entries},
        config["vocab_size"],
        bool(config["tie_word_embeddings"]),
        factors,
        notes,
    )


def _llama_block(
    config: dict[str, Any], kind: str, layer: int, heads: int, kv_heads: int, head_dim: int
) -> list[Entry]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rotated = ARCHITECTURES[kind] == "llama"
    matrices = {
        "self_attn.q_proj": ("attn_q", heads * head_dim, hidden, heads if rotated else 0),
        "self_attn.k_proj": ("attn_k", kv_heads * head_dim, hidden, kv_heads if rotated else 0),
        "self_attn.v_proj": ("attn_v", kv_heads * head_dim, hidden, 0),
        "self_attn.o_proj": ("attn_output", hidden, heads * head_dim, 0),
        "mlp.gate_proj": ("ffn_gate", inner, hidden, 0),
        "mlp.up_proj": ("ffn_up", inner, hidden, 0),
        "mlp.down_proj": ("ffn_down", hidden, inner, 0),
    }
    norms = {"input_layernorm": ("attn_norm", hidden), "post_attention_layernorm": ("ffn_norm", hidden)}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": ("attn_q_norm", head_dim), "self_attn.k_norm": ("attn_k_norm", head_dim)}
    biased = _biased(config, kind)
    entries = []
    for module, (gguf, outputs, inputs, interleaved) in matrices.items():
        names = f"model.layers.{layer}.{module}", f"blk.{layer}.{gguf}"
        entries.append(Entry(f"{names[0]}.weight", f"{names[1]}.weight", (outputs, inputs), interleaved))
        if module.split(".")[1] in biased:
            entries.append(Entry(f"{names[0]}.bias", f"{names[1]}.bias", (outputs,), interleaved, exact=True))
    for module, (gguf, size) in norms.items():
        names = f"model.layers.{layer}.{module}", f"blk.{layer}.{gguf}"
        entries.append(Entry(f"{names[0]}.weight", f"{names[1]}.weight", (size,), exact=True))
    return entries


def _biased(config: dict[str, Any], kind: str) -> set[str]:
    """Names of the matrices that have a bias."""
    if kind == "qwen2":
        return {"q_proj", "k_proj", "v_proj"}
    if kind == "qwen3":
        _require(config, kind, attention_bias=False)
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} if config.get("attention_bias") else set()
    return attention | ({"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set())


def _gpt2(config: dict[str, Any]) -> Architecture:
    _require(
        config, "gpt2", activation_function="gelu_new", scale_attn_weights=True,
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
    matrices = {
        "attn.c_attn": ("attn_qkv", 3 * hidden, hidden),
        "attn.c_proj": ("attn_output", hidden, hidden),
        "mlp.c_fc": ("ffn_up", inner, hidden),
        "mlp.c_proj": ("ffn_down", hidden, inner),
    }
    norms = {"transformer.ln_f": "output_norm"}
    for layer in range(layers):
        old, new = f"transformer.h.{layer}", f"blk.{layer}"
        norms |= {f"{old}.ln_1": f"{new}.attn_norm", f"{old}.ln_2": f"{new}.ffn_norm"}
        for module, (gguf, outputs, inputs) in matrices.items():
            weight, bias = f"{old}.{module}.weight", f"{old}.{module}.bias"
            entries.append(Entry(weight, f"{new}.{gguf}.weight", (inputs, outputs), conv1d=True))
            entries.append(Entry(bias, f"{new}.{gguf}.bias", (outputs,), exact=True))
    for norm, gguf in norms.items():
        entries += [Entry(f"{norm}.{x}", f"{gguf}.{x}", (hidden,), exact=True) for x in ("weight", "bias")]
    if not config["tie_word_embeddings"]:
        entries.append(Entry("lm_head.weight", "output.weight", (config["vocab_size"], hidden)))
    return Architecture(
        "gpt2",
        {f"gpt2.{key}": value for key, value in keys.items()},
        {entry.name: entry for entry in entries},
        config["vocab_size"],
        bool(config["tie_word_embeddings"]),
    )


def _require(config: Mapping[str, Any], kind: str, **values: Any) -> None:
    """Raises UsageError where llama.cpp knows one value of a key, and the config has another."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"{key} is {config[key]!r}; llama.cpp's form of model_type {kind!r} knows {value!r} only", INSTEAD
            )


def _context(config: dict[str, Any], kind: str, notes: list[str]) -> int:
    """Positions, cut to the sliding window: llama.cpp attends to everything in these architectures."""
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window is None or window >= length:
        return length
    notes.append(
        f"context length {window} instead of {length}: beyond the sliding window llama.cpp would attend to everything"
    )
    return int(window)


def _rope(config: dict[str, Any], head_dim: int) -> tuple[dict[str, Value], list[float] | None]:
    """Keys of the rotary embedding, and frequency divisors where Llama 3's scaling needs them.

    transformers 5 has one `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError("partial_rotary_factor other than 1 has no GGUF form here", INSTEAD)
    theta = float(rope.get("rope_theta", config.get("rope_theta") or 10000.0))
    keys: dict[str, Value] = {"rope.freq_base": theta}
    if kind == "default":
        return keys, None
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, None
    if kind == "llama3":
        return keys, llama3_factors(rope, theta, head_dim)
    raise UsageError(f"rope_type {kind!r} has no GGUF form here; supported: default, linear, llama3", INSTEAD)


def llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """Divisors of the rotary frequencies, [head_dim / 2]: 1 for short waves, `factor` for long, smooth in between.

    Reference: Llama 3.1's `rope_type: llama3`, as transformers' `_compute_llama3_parameters` defines it.
    """
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for index in range(0, head_dim, 2):
        turns = context * theta ** (-index / head_dim) / (2 * math.pi)  # of this pair over the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
