"""What a trainer does around the components, asked before anything is trained; what cannot work is refused in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynlora_cli.errors import UsageError
from dynlora_cli.trainers.distributed import refuse
from dynlora_cli.trainers.leaves import unwrapped

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dynlora_cli.trainers.attached import Attached

# Optimizers that step inside the backward pass, by the start of their names in TrainingArguments.optim.
IN_BACKWARD = ("lomo", "adalomo", "galore", "apollo")
# Of TRL's trainers: what cannot be done with components, and what can.
OPTIONS = {
    "sync_ref_model": (
        "TRL would average the model's parameters into the reference, which has no components",
        "leave it out: the reference is the base, `ref_model=attached.reference()`",
    ),
    "use_vllm": (
        "TRL would send vLLM the model's parameters by name, and vLLM knows none of the components",
        "leave it out: the answers are then drawn by transformers",
    ),
}


def refuse_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        UsageError: the trainer shards parameters, copies the model over devices, steps inside the backward pass, or
            does something else with the parameters that components do not go with.
    """
    refuse(args)
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.startswith(IN_BACKWARD):
        raise UsageError(
            f"DynamicRankCallback: optim='{optim}' keeps gradients in another form than the components",
            "use another, such as optim='adamw_torch'",
        )
    for name, (why, instead) in OPTIONS.items():
        if getattr(args, name, False):
            raise UsageError(f"DynamicRankCallback: {name}: {why}", instead)


def refuse_model(attached: Attached, model: Any) -> None:
    """
    Raises:
        UsageError: the trainer trains another model than the one that has the components, or has wrapped it in PEFT's.
    """
    if type(model).__module__.startswith("peft."):
        raise UsageError(
            "DynamicRankCallback: the trainer has put an adapter of PEFT on the model",
            "leave `peft_config` out: the components are the adapter",
        )
    parts = set(model.modules()) if isinstance(model, nn.Module) else set()
    if attached.model not in parts:
        raise UsageError(
            f"DynamicRankCallback: the trainer's {type(model).__name__} is not the model with these components",
            "give the trainer the model that `attach` was called with",
        )
    devices = {str(parameter.device) for parameter in attached.model.parameters()}
    if len(devices) > 1:
        raise UsageError(
            f"DynamicRankCallback: the model lies on {len(devices)} devices ({', '.join(sorted(devices))}), "
            "and the components on one",
            "load it with device_map={'': 0}",
        )


def refuse_optimizer(attached: Attached, optimizer: Any) -> torch.optim.Optimizer:
    """The trainer's optimizer, without wrappers.

    Raises:
        UsageError: it does not step the components.
    """
    inner = unwrapped(optimizer)
    stepped = {id(parameter) for group in getattr(inner, "param_groups", ()) for parameter in group["params"]}
    missing = [leaf for leaf in attached.pool.leaves if leaf.requires_grad and id(leaf) not in stepped]
    if missing:
        raise UsageError(
            f"DynamicRankCallback: the optimizer does not step {len(missing)} of the {len(attached.pool.leaves)} "
            "factors of the components",
            "make the optimizer after `attach`, or let the trainer make it",
        )
    return inner
