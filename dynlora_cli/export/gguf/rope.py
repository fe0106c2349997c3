"""Rotary embeddings and context lengths as GGUF says them.

transformers 5 has one `rope_parameters`, by type of layer where a model has several; before, `rope_theta` stood beside
`rope_scaling`. What is read here is what transformers makes of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.form import INSTEAD, Value


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a model whose layers all have the same."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def type_of(rope: Mapping[str, Any]) -> str:
    """default, linear, llama3, longrope, ..."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def context(config: dict[str, Any], windowed: bool, notes: list[str]) -> int:
    """Positions, cut to the sliding window where llama.cpp attends to everything.

    Args:
        config: with `max_position_embeddings` and maybe `sliding_window`.
        windowed: whether the model's layers keep to the window.
        notes: gets a line where it is cut.
    """
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if windowed else None
    if not window or window >= length:
        return length
    notes.append(
        f"context length {window} instead of {length}: beyond the sliding window llama.cpp would attend to everything"
    )
    return int(window)


def rope_keys(config: dict[str, Any], head_dim: int) -> tuple[dict[str, Value], dict[str, list[float]]]:
    """Keys of the rotary embedding, and frequency divisors where Llama 3's scaling needs them.

    Raises:
        UsageError: of a type that llama.cpp's form of these models does not have.
    """
    rope = rope_of(config)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError("partial_rotary_factor other than 1 has no GGUF form here", INSTEAD)
    theta = float(rope.get("rope_theta", config.get("rope_theta") or 10000.0))
    keys: dict[str, Value] = {"rope.freq_base": theta}
    if type_of(rope) == "llama3":
        return keys, {"rope_freqs.weight": llama3_factors(rope, theta, head_dim)}
    return keys | linear_keys(rope, "default, linear, llama3"), {}


def linear_keys(rope: Mapping[str, Any], supported: str = "default, linear") -> dict[str, Value]:
    """Keys of a rotary embedding whose positions are divided by one factor, or by none."""
    kind = type_of(rope)
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    raise UsageError(f"rope_type {kind!r} has no GGUF form here; supported: {supported}", INSTEAD)


def plain_rope_keys(config: dict[str, Any], head_dim: int) -> dict[str, Value]:
    """Keys of the rotary embedding of a model that llama.cpp gives no frequency divisors."""
    keys, factors = rope_keys(config, head_dim)
    if factors:
        raise UsageError("rope_type 'llama3' has no GGUF form for this model; supported: default, linear", INSTEAD)
    return keys


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
