"""Experts in an adapter's files: PEFT has one pair of matrices for the experts of a block together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dynlora_cli.models.experts import PARAMETERS


def parts_of(slice_name: str) -> tuple[str, int, str]:
    """`a.experts.3.down_proj` as (`a.experts`, 3, `down_proj`)."""
    module, expert, parameter = slice_name.rsplit(".", 2)
    return module, int(expert), parameter


def parameter_of(slice_name: str) -> str:
    """`a.experts.3.down_proj` as `a.experts.down_proj`."""
    module, _, parameter = parts_of(slice_name)
    return f"{module}.{parameter}"


def fuse(factors: Mapping[str, tuple[Tensor, Tensor]], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """PEFT's tensors of all slices: lora_A.weight [E·R, I], expert by expert, lora_B.weight [O, R·E], rank by rank.

    PEFT has one rank for a parameter, so slices are filled up with zeros to the largest. It wraps a module once for
    each of its parameters, the first innermost, and calls what is inside `base_layer`.

    Args:
        factors: a_CI and b_OC of slices that have components.
        experts: of each slice's parameter (E).

    Source: peft 0.21, tuners/lora/layer.py: ParamWrapper.
    """
    groups: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, pair in factors.items():
        groups.setdefault(parameter_of(name), {})[name] = pair
    tensors: dict[str, Tensor] = {}
    for group in groups.values():
        some, (a, b) = next(iter(group.items()))
        module, _, parameter = parts_of(some)
        rank = max(len(a_CI) for a_CI, _ in group.values())
        a_ERI = a.new_zeros(experts[some], rank, a.shape[1])
        b_ORE = b.new_zeros(b.shape[0], rank, experts[some])
        for name, (a_CI, b_OC) in group.items():
            expert = parts_of(name)[1]
            a_ERI[expert, : len(a_CI)] = a_CI
            b_ORE[:, : len(a_CI), expert] = b_OC
        inner = parameter == PARAMETERS[0] and f"{module}.{PARAMETERS[1]}" in groups
        place = f"{module}.base_layer" if inner else module
        tensors |= {f"{place}.lora_A.weight": a_ERI.flatten(0, 1), f"{place}.lora_B.weight": b_ORE.flatten(1)}
    return tensors


def unfuse(parameter: str, a: Tensor, b: Tensor, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """a_CI and b_OC of every slice of a parameter, without the components of zeros; slices without any are left out.

    Args:
        parameter: its name in the model.
        a: [E·R, I].
        b: [O, R·E].
        rank: R.
    """
    a_ERI, b_ORE = a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1)
    module, _, leaf = parameter.rpartition(".")
    slices = {}
    for expert, a_RI in enumerate(a_ERI):
        b_OR = b_ORE[:, :, expert]
        alive_R = a_RI.any(1) | b_OR.any(0)
        if alive_R.any():
            slices[f"{module}.{expert}.{leaf}"] = a_RI[alive_R], b_OR[:, alive_R]
    return slices
