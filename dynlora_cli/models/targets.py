"""Which layers of a model get components: found by structure and name, for any model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError
from dynlora_cli.models.experts import WORD, ExpertSlice, fused_experts
from dynlora_cli.models.linear import is_linear
from dynlora_cli.models.peft_types import not_adapted
from dynlora_cli.models.token_rows import without_rows
from dynlora_cli.text import did_you_mean

# Leaf names of query and value projections, fused ones included.
QUERY_VALUE = {
    "q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "wq", "wv", "to_q", "to_v",
    "q", "v",
    "c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj",
}  # fmt: skip
PRESETS = {"all-linear", "attention", "qv", WORD}
ATTENTION = re.compile(r"(^|[._])(self_?|encdec)?(attn|attention)\d*([._]|$)", re.IGNORECASE)


def find_targets(
    model: PreTrainedModel, wanted: str | list[str], *, whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers that get components, by name, in the model's order.

    Args:
        model: the base.
        wanted: "all-linear" (all but the output layer, routers, slices of experts and `layers_left_out`; of a denoiser,
            those of attention and feed-forward), "attention", "qv", "experts" (all linear layers in modules of this
            name), one name or glob, or a list of them. A name matches a whole module name or its end after a dot, as in
            PEFT; a glob matches the whole name. The first four stay within the language model of a model that also sees
            or hears.
        whole: modules that train whole, never targets: a classifier's head.

    Raises:
        UsageError: a pattern matches nothing; the message lists what there is.
    """
    head: nn.Module | None = model.get_output_embeddings()
    output = None if head is None else without_rows(head)
    routers, text = _routers(model), text_part(model)
    left_out = layers_left_out(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not output and not inside(name, (*whole, *routers)) and name not in left_out
    }
    patterns = [wanted] if isinstance(wanted, str) else wanted
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name, module in linear.items() if _matches(name, pattern, isinstance(module, ExpertSlice))}
        if pattern == "all-linear" and (usual := getattr(model, "usual_targets", None)):
            found = {name for name in found if any(part in f"{name}." for part in usual)}
        if pattern in PRESETS and text:
            found = {name for name in found if inside(name, [text])}
        reasons = [why for name, why in left_out.items() if _matches(name, pattern, False)]
        if reasons and not found:
            raise UsageError(
                f"adapter.target_modules: {pattern!r}: {reasons[0]}", "write all-linear, which leaves it out"
            )
        if not found and head is not output:
            _refuse_head(model, head, pattern)
        if not found:
            listed = "\n".join(f"  {group}" for group in group_names(linear))
            near = "" if pattern in PRESETS else did_you_mean(pattern, {n.split(".")[-1] for n in linear} | PRESETS)
            raise UsageError(
                f"adapter.target_modules: {pattern!r} matches no linear layer of this model{near}",
                f"there are:\n{listed}",
            )
        chosen |= found
    return {name: module for name, module in linear.items() if name in chosen}


def _refuse_head(model: nn.Module, head: nn.Module | None, pattern: str) -> None:
    """Refuse an output head as a target, where new tokens have rows in it."""
    name = next((name for name, module in model.named_modules() if module is head), "")
    if _matches(name, pattern, False):
        raise UsageError(
            f"adapter.target_modules: {pattern!r} is the output head, in which new tokens have rows of their own; PEFT "
            "takes no components beside them",
            "leave it out, or adapter.new_tokens",
        )


def text_part(model: PreTrainedModel) -> str:
    """The name of the module that is the language model of a model of images, sounds and text; "" for other models."""
    config = model.config.get_text_config()
    if config is model.config or model.config.is_encoder_decoder:
        return ""
    parts = (name for name, part in model.named_modules() if name and getattr(part, "config", None) is config)
    return next(parts, "")


def layers_left_out(model: PreTrainedModel) -> dict[str, str]:
    """Why some linear layers get no components whatever a recipe says, by name."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return not_adapted(model, linear)


def _routers(model: nn.Module) -> list[str]:
    """The linear layers beside fused experts that weigh them: one output for each expert, or one for a shared one."""
    found = []
    for experts, count in fused_experts(model).items():
        block = experts.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, nn.Linear) and module.out_features in (1, count) and not inside(name, [experts]):
                found.append(name)
    return found


def _matches(name: str, pattern: str, of_expert: bool) -> bool:
    if pattern == "all-linear":
        return not of_expert
    if pattern == WORD:
        return WORD in name.split(".")
    if pattern == "attention":
        return ATTENTION.search(name) is not None
    if pattern == "qv":
        return ATTENTION.search(name) is not None and name.split(".")[-1] in QUERY_VALUE
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def group_names(names: Iterable[str]) -> list[str]:
    """Module names with block numbers folded: `model.layers.*.self_attn.q_proj (6)`."""
    groups: dict[str, int] = {}
    for name in names:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        groups[key] = groups.get(key, 0) + 1
    return [f"{key} ({count})" if count > 1 else key for key, count in groups.items()]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
