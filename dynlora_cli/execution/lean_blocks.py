"""Finds the modules of a model that kernels/lean.py can compute, and patches their `forward` to use it in training.

Modules are recognised by what they compute, not by the names of models. A module is run on a few random numbers; if it
returns what an RMS norm returns, it is one, whoever wrote it. What is not recognised stays as it is, and so does a norm
whose weight is trained. Without gradients every module runs its own code.

Dimensions: D features, N rows of a trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import signature
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dynlora_cli.execution.short_attention import TABLE, ShortAttention
from dynlora_cli.kernels.lean import ACTIVATIONS, FACTORS, Activation, Gated, RMSNorm, Rotary
from dynlora_cli.models.patched import Patches

EPSILON = ("variance_epsilon", "eps", "epsilon")  # the attribute's name differs from model to model
# The linear layers of a gated feed-forward, by the names that models share, with (inputs, outputs) for the trial.
APART = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
JOINED = {"gate_up_proj": (8, 32), "down_proj": (16, 8)}  # Phi 3, GLM
ACTIVATION_NAMES = ("act_fn", "activation_fn")
TURN = "apply_rotary_pos_emb"  # the function with which models rotate queries and keys
# The rows of a trial have sizes from very small, where ε matters, to very large, which a model's clamp would change.
SIZES_N1 = torch.tensor([[1e-3], [1.0], [30.0], [1000.0]])
Forward = Callable[..., Any]
Candidate = TypeVar("Candidate")


def lean_blocks(model: nn.Module, patches: Patches | None = None) -> list[str]:
    """Patch the `forward` of every RMS norm, gated feed-forward and rotary attention that is recognised.

    Args:
        model: changed in place. Its weights may still be on the meta device: a trial brings its own.
        patches: undo it again; None: it stays for good.

    Returns:
        the names of the modules that were patched.
    """
    found, patches = [], patches or Patches()
    for name, module in model.named_modules():
        if "forward" in vars(module):  # somebody has patched it already
            continue
        lean = (_as_norm(module) or _as_gated(module)) if _takes_one(module) else _as_rotary(module)
        if lean:
            patches.set(module, "forward", MethodType(lean, module))
            found.append(name)
    return found


def _takes_one(module: nn.Module) -> bool:
    try:
        return len(signature(module.forward).parameters) == 1
    except ValueError:  # TorchScript modules have no signature
        return False


def _as_norm(module: nn.Module) -> Forward | None:
    """The new `forward` if this module is an RMS norm, else None."""
    parameters = dict(module.named_parameters())
    epsilon = next((value for name in EPSILON if isinstance(value := getattr(module, name, None), float)), None)
    if list(parameters) != ["weight"] or epsilon is None or any(module.children()):
        return None
    usual, like, random = type(module).forward, parameters["weight"], torch.Generator().manual_seed(0)
    if like.ndim != 1 or not len(like) or like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    weight_D = torch.rand(len(like), generator=random).to(like.dtype)
    x_ND = torch.randn(4, len(like), generator=random) * SIZES_N1
    x_ND[1] += 2  # a mean that is not zero, which a layer norm would subtract
    x_ND = x_ND.to(like.dtype)
    made = _tried(module, {"_parameters": {"weight": nn.Parameter(weight_D, requires_grad=False)}}, x_ND)
    factor = _same(made, FACTORS, lambda factor: RMSNorm.apply(x_ND, weight_D, factor, epsilon))
    if factor is None:
        return None

    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,), weight = (*given, *named.values()), self.weight
        if _as_usual(x) or weight.requires_grad or x.dtype != weight.dtype:
            return usual(self, x)
        return cast("Tensor", RMSNorm.apply(x, weight, factor, epsilon))

    return forward


def _as_gated(module: nn.Module) -> Forward | None:
    """The new `forward` if this module is a gated feed-forward, else None."""
    children = dict(module.named_children())
    name = next((name for name in ACTIVATION_NAMES if name in children), "")
    joined = "gate_proj" not in children
    sizes = JOINED if joined else APART
    if children.keys() != {*sizes, name} or next(children[name].parameters(), None) is not None:
        return None
    usual, random = type(module).forward, torch.Generator().manual_seed(0)
    layers = {layer: nn.utils.skip_init(nn.Linear, *size, bias=False) for layer, size in sizes.items()}
    for layer in layers.values():
        layer.weight.detach().normal_(generator=random)
    x_ND = torch.randn(4, 8, generator=random) * SIZES_N1
    held = {**layers, name: copy.deepcopy(children[name]).train()}

    def gated(part: Any, x: Tensor, activation: Activation) -> Tensor:
        gate, up = part.gate_up_proj(x).chunk(2, -1) if joined else (part.gate_proj(x), part.up_proj(x))
        return cast("Tensor", part.down_proj(Gated.apply(gate, up, activation)))

    own = partial(gated, SimpleNamespace(**layers))
    activation = _same(_tried(module, {"_modules": held}, x_ND), ACTIVATIONS, partial(own, x_ND))
    if activation is None:
        return None
    for layer in layers.values():
        layer.bfloat16()
    made = _tried(module, {"_modules": held}, x_ND.bfloat16())
    if made is None or not torch.equal(made, own(x_ND.bfloat16(), activation)):  # in bf16 it rounds at other places
        return None

    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        return usual(self, x) if _as_usual(x) else gated(self, x, activation)

    return forward


def _as_rotary(module: nn.Module) -> Forward | None:
    """The new `forward` if this is an attention with rotary positions, else None.

    An attention is too varied to write again, so it keeps its own code: a copy of its `forward` function with the same
    bytecode, whose globals hold `turn` instead of the model's `apply_rotary_pos_emb`, and another table of attention
    functions (execution/short_attention.py).
    """
    function = type(module).forward
    code: Any = getattr(function, "__code__", None)
    usual: Any = getattr(function, "__globals__", {}).get(TURN)
    if code is None or TURN not in code.co_names or not _turns(usual):
        return None

    def turn(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        like, trains = (queries.dtype, queries.shape[-1]), queries.requires_grad or keys.requires_grad
        plain = cos.ndim == 3 and (cos.dtype, cos.shape[-1]) == like and keys.dtype == queries.dtype
        if rest or more or not (plain and trains and torch.is_grad_enabled()) or cos.requires_grad:
            return cast("tuple[Tensor, Tensor]", usual(queries, keys, cos, sin, *rest, **more))
        return Rotary.apply(queries, keys, cos, sin)

    names = {**function.__globals__, TURN: turn}
    if TABLE in code.co_names:
        names[TABLE] = ShortAttention(names[TABLE])
    own = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _turns(usual: Any) -> bool:
    """Whether a model's function does to queries and keys what `Rotary` does, up to rounding."""
    random = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, heads, 5, 8, generator=random).bfloat16() for heads in (3, 1))
    cos, sin = torch.randn(2, 1, 5, 8, generator=random).bfloat16()
    inputs = [tensor.float() for tensor in (queries, keys, cos, sin)]
    with suppress(Exception):  # a function of that name that takes other arguments: not the one that is looked for
        made, low = (torch.cat(usual(*tensors), 1) for tensors in (inputs, (queries, keys, cos, sin)))
        # ModernBERT computes in fp32 and rounds once at the end, which `Rotary` does not: that model keeps its own.
        careful = torch.equal(made.bfloat16(), low)
        return not careful and _same(made, (Rotary,), lambda _: torch.cat(Rotary.apply(*inputs), 1)) is not None
    return False


def _tried(module: nn.Module, held: dict[str, Any], x_ND: Tensor) -> Tensor | None:
    """The output for x of a copy of the module whose attributes `held` replaces, in training mode.

    None if it fails or returns something other than one tensor of x's shape: then it is not what is looked for.
    """
    with suppress(Exception):  # unknown code, called with inputs that it may not be made for
        trial = copy.copy(module)
        vars(trial).update(held, training=True)
        with torch.random.fork_rng([]):
            made = trial.forward(x_ND)
        return made if isinstance(made, Tensor) and (made.shape, made.device) == (x_ND.shape, x_ND.device) else None
    return None


def _same(
    made: Tensor | None, candidates: tuple[Candidate, ...], make: Callable[[Candidate], Tensor]
) -> Candidate | None:
    """The candidate whose output equals `made` up to rounding in every row; the nearest of several, or None."""
    if made is None:
        return None
    error = {}
    for key in candidates:
        apart, size = (tensor.abs().flatten(1).amax(1) for tensor in (make(key) - made, made))
        error[key] = (apart / size).max().item()
    best = min(candidates, key=error.__getitem__)
    return best if error[best] <= max(1e-5, 2 * torch.finfo(made.dtype).eps) else None


def _as_usual(x: Tensor) -> bool:
    """Whether no gradient is computed for x, so that the module's own code may run."""
    return not (x.requires_grad and torch.is_grad_enabled())
