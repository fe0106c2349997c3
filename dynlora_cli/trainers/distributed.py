"""Components under several processes: what `DistributedDataParallel` (DDP) holds of them, and what cannot be done.

DDP averages gradients through a reducer that knows each parameter by its autograd node. At an event the leaves are new
parameters, which the old reducer does not know: their gradients would stay each process's own, and nobody would say
so. So the reducer is made anew after every event, in place, since the trainer holds the wrapper in several places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dynlora_cli.errors import DynloraError, UsageError

if TYPE_CHECKING:
    from dynlora_cli.lora.pool import Pool

_WHOLE = {DistributedType.NO} | {kind for kind in DistributedType if kind.value.startswith("MULTI_")}  # by DDP


class Processes:
    """The DDP wrapper around a model, found while it runs: callbacks are only given the model inside.

    Args:
        model: the one that a trainer wraps; gets a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.wrapper: DistributedDataParallel | None = None
        self.hook = model.register_forward_pre_hook(self._see)

    def _see(self, *_: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()
        if active is not None:
            self.wrapper = active

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def average(self, gradient_P: Tensor) -> None:
        """Average a gradient over all processes, in place, as DDP does with those of the leaves."""
        if self.several:
            distributed.all_reduce(gradient_P)
            gradient_P /= distributed.get_world_size()

    def total(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place, for observers (their argument `reduce`)."""
        if self.several:
            distributed.all_reduce(tensor)
        return tensor

    def remove(self) -> None:
        """Look no longer."""
        self.hook.remove()
        self.wrapper = None

    def after_event(self, pool: Pool) -> None:
        """Let every process go on with the components of the first, and DDP average the gradients of the new leaves.

        All processes saw the same averaged gradients and so removed the same components; where they did not, their
        gradients would be added up as if they were of the same components, so that is an error.

        Raises:
            DynloraError: the processes kept different components, or no DDP wrapper was seen around the model.
        """
        if not self.several:
            return
        survivors_K = torch.cat([layer.survivors_C for layer in pool.layers.values()]).to(pool.values.device)
        counts = torch.tensor(list(pool.counts.values()), device=pool.values.device)
        if not (_alike(counts) and _alike(survivors_K)):
            raise DynloraError(
                "the processes pruned different components: their gradients were not the same",
                "train with DistributedDataParallel, which averages the gradients of all processes at each step",
            )
        distributed.broadcast(pool.values.detach(), 0)
        if self.wrapper is None:
            raise DynloraError(
                f"{distributed.get_world_size()} processes train, but the model was not called through "
                "DistributedDataParallel, so nothing averages the gradients of its components",
                "start the script with `accelerate launch` or `torchrun` and a trainer that wraps the model in DDP",
            )
        renew(self.wrapper)


def _alike(numbers: Tensor) -> bool:
    """Whether a tensor is the same in all processes. It may have another length in each."""
    length = torch.tensor([len(numbers), -len(numbers)], device=numbers.device)
    distributed.all_reduce(length, op=distributed.ReduceOp.MAX)
    if length[0] != -length[1]:
        return False
    both = torch.cat([numbers, -numbers])
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
    return bool((both[: len(numbers)] == -both[len(numbers) :]).all())


def renew(wrapper: DistributedDataParallel) -> None:
    """Give a DDP wrapper a reducer for the parameters that its module has now. To be called in all processes at once.

    What pickle does with a wrapper: everything is kept but the reducer, which is made anew. The old one takes its hooks
    along. Its communication hooks (such as gradients in 16 bits) are registered again.

    A layer without components has leaves without numbers, which no backward pass reaches. DDP would wait for them.
    """
    from torch.distributed import _register_comm_hook

    hooks = list(wrapper._comm_hooks)
    wrapper.parameters_to_ignore |= {name for name, leaf in wrapper.module.named_parameters() if not leaf.numel()}
    wrapper.__setstate__(wrapper.__getstate__())
    wrapper._module_parameters = [
        parameter for name, parameter in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore
    ]
    wrapper._has_rebuilt_buckets = False
    for hook, state in hooks:
        _register_comm_hook(wrapper.reducer, state, hook)


def refuse(arguments: Any) -> None:
    """Say what a trainer cannot do with components. To be asked when the trainer has made its accelerator.

    Args:
        arguments: transformers' `TrainingArguments`.

    Raises:
        UsageError: FSDP, DeepSpeed or another way of splitting the model, or `nn.DataParallel`.
    """
    if arguments.n_gpu > 1:
        raise UsageError(
            f"this process sees {arguments.n_gpu} GPUs, for which the trainer copies the model at each step "
            "(nn.DataParallel); that does not go with components",
            "start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU",
        )
    how = AcceleratorState().distributed_type
    # What was asked for counts, too: on a CPU accelerate passes over `fsdp` in silence.
    asked = "FSDP" if arguments.fsdp else "DEEPSPEED" if arguments.deepspeed else None
    if asked or how not in _WHOLE:
        name = {"DEEPSPEED": "DeepSpeed"}.get(asked or how.value, asked or how.value)
        raise UsageError(
            f"dynamic rank does not work under {name}: it keeps the parameters in pieces of its own, "
            "which pruning cannot make smaller",
            "use DistributedDataParallel (`accelerate launch --multi_gpu`), or `dynlora train --devices all` with "
            "`train.shard_base`, which shards the frozen base and keeps the components whole",
        )
