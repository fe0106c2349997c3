"""What trains in a run: components (`Pool`), a router over adapters (`Routed`) or the whole base (`WholeModel`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.shared_inputs import SharedInput


class Trained(Protocol):
    """What a run needs from whatever it trains, components or a whole model.

    Attributes:
        layers: those that hold components, by name; empty where the whole model trains.
        counts: components of each layer.
        sharing: layers that compute together, because they are given one input.
    """

    layers: dict[str, ComponentLinear]
    counts: dict[str, int]
    sharing: list[SharedInput]

    @property
    def parameters(self) -> int:
        """Numbers in all components that are alive; 0 where the whole model trains."""

    @property
    def components(self) -> int:
        """Components that are alive; 0 where the whole model trains."""

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The parameters that the layers compute with, such as a_CI and b_OC; empty where the whole model trains."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; if `coupled`, a group's learning rate follows the parameters alive."""

    def see(self, batch: Batch) -> None:
        """Called before each micro-batch that is learned from."""

    def switched_off(self) -> AbstractContextManager[None]:
        """In it the model answers as its base alone does; for passes without a gradient. A whole model stays on."""

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (from 1)."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of an optimizer step, or None."""

    def settle_gradient(self) -> None:
        """Called when the gradient of an optimizer step is complete, before it is clipped."""

    def let_go(self) -> bool:
        """Set the gradient of what does not train to zero; whether there is any such."""

    def alive(self) -> dict[str, int]:
        """How many components and numbers there are now, for metrics and events; empty where the whole model trains."""

    def rates_of_a_and_b(self, b_rate: float) -> AbstractContextManager[None]:
        """A context for the optimizer's step, in which the learning rate of B is `b_rate` times that of A."""

    def after_update(self, rate: float) -> None:
        """Called after every optimizer step, with its learning rate."""

    def stand_after(self, step: int, total_steps: int) -> None:
        """On resuming: restore what follows from optimizer step `step` and is in no checkpoint."""

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of an optimizer step, or set them to zero."""


class WithoutComponents:
    """What trains where there are no components: nothing is counted, pruned or settled."""

    def __init__(self) -> None:
        self.layers: dict[str, ComponentLinear] = {}
        self.counts: dict[str, int] = {}
        self.sharing: list[SharedInput] = []
        self.leaves: list[nn.Parameter] = []
        self.parameters = self.components = 0

    def see(self, batch: Batch) -> None:
        pass

    def switched_off(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin_step(self, step: int, total_steps: int) -> None:
        pass

    def penalty(self) -> Tensor | None:
        return None

    def settle_gradient(self) -> None:
        pass

    def let_go(self) -> bool:
        return False

    def alive(self) -> dict[str, int]:
        return {}

    def rates_of_a_and_b(self, b_rate: float) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def after_update(self, rate: float) -> None:
        pass

    def stand_after(self, step: int, total_steps: int) -> None:
        pass

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)


class WholeModel(WithoutComponents):
    """All weights of the base train (variant `full`), and nothing is put on it.

    Args:
        model: whose weights train from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.requires_grad_(True)

    def to(self, device: torch.device) -> WholeModel:  # noqa: ARG002
        """Stay on the device that the model was loaded to."""
        return self

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "coupled": False}]
