"""PEFT's `target_parameters`: which parameter the tensors of a module belong to.

PEFT names the module alone. It wraps a module once for each targeted parameter, in the order in which the module
registers them, the first innermost, and calls what is inside `base_layer`. A target without a module's name, such as
the `gate_up_proj` that PEFT 0.21 writes for mixtures of experts, matches wherever a module has such a parameter, which
the files do not say: `target_modules` and the number of wrappers tell.

Source: peft 0.21, tuners/tuners_utils.py: _inject_parameters; tuners/lora/layer.py: ParamWrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.models.experts import PARAMETERS, WORD

INNER = ".base_layer"
WEIGHT = "weight"


def adapted_parameters(modules: Collection[str], config: Mapping[str, Any], source: Path) -> dict[str, str]:
    """The parameters that modules of an adapter's file stand for; modules that are layers of their own are left out.

    Args:
        modules: as the tensors are named, `base_layer` included.
        config: adapter_config.json.
        source: that file, for messages.

    Returns:
        the parameter's full name, by the module's.

    Raises:
        UsageError: it cannot be told.
    """
    targets = config.get("target_parameters") or ()
    if not targets:
        return {}
    wrappers: dict[str, list[str]] = {}
    for module in sorted(modules, key=len, reverse=True):  # the innermost first
        owner = module
        while owner.endswith(INNER):
            owner = owner.removesuffix(INNER)
        wrappers.setdefault(owner, []).append(module)
    found = {}
    for owner, inside_out in wrappers.items():
        named, bare = _leaves(owner, targets, by_module=True), _leaves(owner, targets, by_module=False)
        if len(inside_out) == 1 and not named and (not bare or _is_layer(owner, config)):
            continue
        leaves = next((some for some in (named, bare, named | bare) if len(some) == len(inside_out)), set())
        order = (*PARAMETERS, WEIGHT)
        if not leaves or (len(leaves) > 1 and not leaves <= {*order}):
            raise UsageError(
                f"{source}: which of target_parameters the {len(inside_out)} pairs of factors of {owner} belong to is "
                f"not to be told: {', '.join(sorted(named | bare))}",
                "merge it with the tool that made it",
            )
        known = sorted(leaves, key=lambda leaf: order.index(leaf) if leaf in order else 0)
        for module, leaf in zip(inside_out, known, strict=True):
            found[module] = f"{owner}.{leaf}"
    return found


def _leaves(owner: str, targets: Collection[str], *, by_module: bool) -> set[str]:
    """The targeted parameters that a module may have: by targets that name the module too, or by those that do not."""
    parts = (target.rpartition(".") for target in targets)
    if not by_module:
        return {leaf for module, _, leaf in parts if not module}
    return {leaf for module, _, leaf in parts if module and (owner == module or owner.endswith(f".{module}"))}


def _is_layer(owner: str, config: Mapping[str, Any]) -> bool:
    """Whether `target_modules` names the module. Where it is a regular expression, the module's own name tells."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return owner.rpartition(".")[2] != WORD
    return any(owner == target or owner.endswith(f".{target}") for target in targets)
