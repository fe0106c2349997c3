"""LoRA: W' = W + ΔW. Its files hold DoRA as well, and slices of the weights of many experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.expert_files import unfuse
from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.adapters.keys import BIAS
from dynlora_cli.adapters.kind import Files, Own, Parts, Read
from dynlora_cli.adapters.peft_parameters import WEIGHT, adapted_parameters
from dynlora_cli.errors import UsageError
from dynlora_cli.files.patterns import PatternMap
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.text import natural_order

title = "LoRA"
ANOTHER_FILE = "one of the two files is of another adapter; copy both again"
tensors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def read(adapter: Adapter, parts: Parts, _base: str | None) -> dict[str, Factors]:
    """The factors of every layer, each with PEFT's scale for it folded in; DoRA's with their magnitudes.

    Raises:
        UsageError: a layer is incomplete, or the configuration is another adapter's.
    """
    scales = Scales(adapter.config, adapter.folder)
    parameters = adapted_parameters(parts, adapter.config, adapter.folder / CONFIG)
    layers: dict[str, Factors] = {}
    for module, factors in parts.items():
        owner, _, leaf = parameters.get(module, "").rpartition(".")
        if owner and (leaf != WEIGHT or len(factors.get("lora_A", ())) != scales.rank_of(owner)):
            layers |= _slices(parameters[module], factors, scales)
        else:
            layers[owner or module] = _factors(owner or module, factors, scales)
    return {name: layers[name] for name in sorted(layers, key=natural_order)}


def written(config: dict[str, Any], tensors: dict[str, Tensor], _own: Own) -> Files:
    """As they are."""
    return config, tensors


def layer(base: nn.Module, factors: Factors, _weight: Read, _bias: Read) -> ComponentLinear:
    """The layer with its components."""
    return ComponentLinear(base, factors.scale)


def fold(W_OI: Tensor, factors: Factors) -> None:
    """W' in the place of W."""
    W_OI.addmm_(factors.b_OC, factors.a_CI)


def _factors(module: str, parts: Mapping[str, Tensor], scales: Scales) -> Factors:
    embedding = "lora_embedding_A" in parts
    try:
        if embedding:  # of a table [tokens, width]: PEFT adds (B A)ᵀ
            a, b = parts["lora_embedding_B"].T.contiguous(), parts["lora_embedding_A"].T.contiguous()
        else:
            a, b = parts["lora_A"], parts["lora_B"]
    except KeyError as error:
        raise UsageError(f"{scales.folder}: layer {module} lacks its {error.args[0]}", "copy the files again") from None
    if a.ndim != 2 or b.ndim != 2:
        raise UsageError(f"{scales.folder}: layer {module} is a convolution; only linear layers and tables are merged")
    scale = scales.of(module, a.shape[0])
    if a.shape[0] != b.shape[1]:
        raise UsageError(f"{scales.folder}: layer {module} has factors of rank {a.shape[0]} and {b.shape[1]}")
    magnitude = parts.get("lora_magnitude_vector")
    if scales.config.get("use_dora") and magnitude is None:
        raise UsageError(f"{scales.folder}: layer {module} is DoRA and lacks its magnitude", "copy the files again")
    bias_O = _bias(module, parts, scales, len(b))
    made = Factors(a, *_scaled(b, scale), embedding, bias_O=None if bias_O is None else scale * bias_O)
    if magnitude is None:
        return made
    if bias_O is not None:
        raise UsageError(f"{scales.folder}: {module} is a DoRA with lora_bias, which PEFT does not have", ANOTHER_FILE)
    # PEFT takes the norms of a table over its tokens, one for each number of a vector.
    own, length = ("magnitude_I", a.shape[1]) if embedding else ("magnitude_O", b.shape[0])
    if magnitude.numel() != length:
        raise UsageError(
            f"{scales.folder}: layer {module} has {magnitude.numel()} magnitudes, and {length} belong to it",
            ANOTHER_FILE,
        )
    return replace(made, kind="dora", own={own: magnitude.flatten()})


def _bias(module: str, parts: Mapping[str, Tensor], scales: Scales, outputs: int) -> Tensor | None:
    """The bias of B, without the scale, where `lora_bias` is set."""
    bias_O, wanted = parts.get(BIAS), bool(scales.config.get("lora_bias"))
    if (bias_O is not None) != wanted:
        what = "no lora_B.bias, and lora_bias is set" if wanted else "a lora_B.bias, and lora_bias is not set"
        raise UsageError(f"{scales.folder}: layer {module} has {what} in {CONFIG}", ANOTHER_FILE)
    if bias_O is not None and bias_O.shape != (outputs,):
        raise UsageError(
            f"{scales.folder}: layer {module} has a lora_B.bias of shape {tuple(bias_O.shape)} for {outputs} outputs",
            ANOTHER_FILE,
        )
    return bias_O


def _scaled(b_OC: Tensor, scale: float) -> tuple[Tensor, float]:
    """B with the scale in it, and the scale; 1 for a layer that an alpha of 0 switches off, whose B is 0 then."""
    return (scale * b_OC, scale) if scale else (b_OC.new_zeros(b_OC.shape), 1.0)


def _slices(parameter: str, parts: Mapping[str, Tensor], scales: Scales) -> dict[str, Factors]:
    """The factors of every expert that has components."""
    if parts.keys() != {"lora_A", "lora_B"}:
        raise UsageError(f"{scales.folder}: {parameter} lacks its lora_A or lora_B", "copy the files again")
    a, b = parts["lora_A"], parts["lora_B"]
    rank = scales.rank_of(parameter)
    if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0):
        raise UsageError(
            f"{scales.folder}: {parameter} has factors {tuple(a.shape)} and {tuple(b.shape)}, and {CONFIG} rank {rank}",
            ANOTHER_FILE,
        )
    scale = scales.of(parameter, rank)
    return {
        name: Factors(a_CI, *_scaled(b_OC, scale), experts=a.shape[0] // rank)
        for name, (a_CI, b_OC) in unfuse(parameter, a, b, rank).items()
    }


class Scales:
    """alpha / r of every module, as PEFT finds it: a pattern's key matches the end of a name, and may be a regex."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ranks = PatternMap(config.get("rank_pattern") or {}, f"{folder / CONFIG}: rank_pattern")
        self.alphas = PatternMap(config.get("alpha_pattern") or {}, f"{folder / CONFIG}: alpha_pattern")

    def of(self, module: str, rank: int) -> float:
        """The scale of a module whose factors have this rank.

        Raises:
            UsageError: the config announces another rank.
        """
        announced = self.rank_of(module)
        alpha = self.alphas.first(self._named(module), self.config.get("lora_alpha"))
        if announced != rank:
            raise UsageError(
                f"{self.folder}: layer {module} has rank {rank} in {WEIGHTS} and {announced} in {CONFIG}",
                ANOTHER_FILE,
            )
        if rank == 0 or not isinstance(alpha, (int, float)):
            raise UsageError(
                f"{self.folder / CONFIG}: layer {module} has rank {rank} and lora_alpha {alpha!r}",
                "a layer has a rank of at least 1, and an alpha; leave one without components out of the files",
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _named(self, module: str) -> str:
        """What patterns are matched with: the name of the weight, where that is the target and not the module."""
        weight = f"{module}.weight"
        wanted = self.config.get("target_parameters") or ()
        return weight if any(weight == end or weight.endswith(f".{end}") for end in wanted) else module

    def rank_of(self, module: str) -> Any:
        """The rank that the config announces."""
        return self.ranks.first(self._named(module), self.config.get("r"))
