"""Lets the blocks of a model train with the functions of lean_functions.py.

No model is known by name. A module is tried on a few numbers instead: what computes an RMS norm is one, whoever wrote
it, and what is not recognised, or trains, stays as it is.

Dimensions: D features, N rows of a trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dynlora_cli.lean_functions import ACTIVATIONS, FACTORS, Activation, Gated, RMSNorm, Rotary

EPSILON = ("variance_epsilon", "eps", "epsilon")  # what models call it
# The layers of a gated feed-forward part, by the names that models share: inputs and outputs for a trial.
APART = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
JOINED = {"gate_up_proj": (8, 32), "down_proj": (16, 8)}  # Phi 3, GLM
ACTIVATION_NAMES = ("act_fn", "activation_fn")
TURN = "apply_rotary_pos_emb"  # by which models turn queries and keys
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # of a module that is tried and is another
Forward = Callable[..., Any]
Candidate = TypeVar("Candidate")


def lean_blocks(model: nn.Module) -> list[str]:
    """Let norms, gated feed-forward parts and rotary attentions train this way; without gradients they run as they are.

    Args:
        model: with or without numbers in its weights.

    Returns:
        the names of the modules that were recognised.
    """
    found = []
    for name, module in model.named_modules():
        if "forward" in vars(module):  # somebody else has been here
            continue
        lean = _as_norm(module) or _as_gated(module) or _as_rotary(module)
        if lean:
            module.forward = MethodType(lean, module)
            found.append(name)
    return found


def _as_norm(module: nn.Module) -> Forward | None:
    """How an RMS norm trains, if this is one."""
    parameters = dict(module.named_parameters())
    epsilon = next((value for name in EPSILON if isinstance(value := getattr(module, name, None), float)), None)
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or epsilon is None:
        return None
    usual, like, random = type(module).forward, parameters["weight"], torch.Generator().manual_seed(0)
    weight_D = torch.rand(len(like), generator=random).to(like.dtype)
    # Rows for which ε matters and for which it does not, and one with a mean, which a layer norm would take away.
    x_ND = torch.randn(4, len(like), generator=random) * torch.tensor([[1e-3], [1.0], [30.0], [1.0]])
    x_ND[3] += 2
    x_ND = x_ND.to(like.dtype)
    made = _tried(module, {"_parameters": {"weight": nn.Parameter(weight_D, requires_grad=False)}}, x_ND)
    factor = _same(made, FACTORS, lambda factor: RMSNorm.apply(x_ND, weight_D, factor, epsilon))
    if factor is None:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if _as_usual(x) or weight.requires_grad or x.dtype != weight.dtype:
            return usual(self, x)
        return RMSNorm.apply(x, weight, factor, epsilon)

    return forward


def _as_gated(module: nn.Module) -> Forward | None:
    """How a gated feed-forward part trains, if this is one."""
    children = dict(module.named_children())
    name = next((name for name in ACTIVATION_NAMES if name in children), "")
    sizes = APART if "gate_proj" in children else JOINED
    if children.keys() != {*sizes, name} or any(children[name].parameters()):
        return None
    usual, random = type(module).forward, torch.Generator().manual_seed(0)
    layers = {layer: nn.utils.skip_init(nn.Linear, *size, bias=False) for layer, size in sizes.items()}
    for layer in layers.values():
        layer.weight.detach().normal_(generator=random)
    x_ND = torch.randn(4, 8, generator=random)
    made = _tried(module, {"_modules": {**layers, name: children[name]}}, x_ND)

    def gated(part: Any, x: Tensor, activation: Activation) -> Tensor:
        gate, up = (part.gate_proj(x), part.up_proj(x)) if sizes is APART else part.gate_up_proj(x).chunk(2, -1)
        return cast("Tensor", part.down_proj(Gated.apply(gate, up, activation)))

    activation = _same(made, ACTIVATIONS, partial(gated, SimpleNamespace(**layers), x_ND))
    if activation is None:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        return usual(self, x) if _as_usual(x) else gated(self, x, activation)

    return forward


def _as_rotary(module: nn.Module) -> Forward | None:
    """How an attention with rotary positions trains, if this is one: its own code, with another function in it."""
    function = type(module).forward
    code = getattr(function, "__code__", None)
    if code is None or TURN not in code.co_names:
        return None
    usual, random = function.__globals__[TURN], torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, heads, 5, 8, generator=random) for heads in (3, 1))
    cos, sin = torch.randn(2, 1, 5, 8, generator=random)

    def turn(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        plain = cos.ndim == 3 and cos.shape[-1] == queries.shape[-1] and cos.dtype == queries.dtype == keys.dtype
        if rest or more or not plain or _as_usual(queries):
            return usual(queries, keys, cos, sin, *rest, **more)
        return Rotary.apply(queries, keys, cos, sin)

    made = None
    with suppress(*REFUSALS):
        made = torch.cat(usual(queries, keys, cos, sin), 1)
    if _same(made, (Rotary,), lambda _: torch.cat(Rotary.apply(queries, keys, cos, sin), 1)) is None:
        return None
    names = {**function.__globals__, TURN: turn}
    own = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _tried(module: nn.Module, held: dict[str, Any], x_ND: Tensor) -> Tensor | None:
    """What a module makes of x if it holds something else, in training; None where it takes no such thing."""
    trial = copy.copy(module)
    vars(trial).update(held, training=True)
    made = None
    with suppress(*REFUSALS):
        made = trial.forward(x_ND)
    return made if isinstance(made, Tensor) and made.shape == x_ND.shape else None


def _same(
    made: Tensor | None, candidates: tuple[Candidate, ...], make: Callable[[Candidate], Tensor]
) -> Candidate | None:
    """The candidate that makes the same up to rounding, and of several the nearest."""
    if made is None:
        return None
    error = {key: ((make(key) - made).abs().max() / made.abs().max()).item() for key in candidates}
    best = min(candidates, key=error.__getitem__)
    return best if error[best] <= max(1e-5, 2 * torch.finfo(made.dtype).eps) else None


def _as_usual(x: Tensor) -> bool:
    """Whether nothing is to be gained, since there is no backward pass."""
    return not (x.requires_grad and torch.is_grad_enabled())
