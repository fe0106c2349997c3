"""What a pruning policy is: one file in policies/ with these names.

scores(pool, observed, generator) -> Tensor
    What each component is worth per number it holds; higher is better. [K], finite. A policy scores and never decides
    which components go: `select.select_K` does that, for all policies alike.

observer(options, training) -> Observer
    Optional: what the policy looks at before it scores. It may be one of signals.py and covariances.py, or a class of
    the policy's own. Without an observer the policy judges the components as they stand; they are turned into the SVD
    basis before, and `observed` is None.

after_training_only = True
    Optional: only `dynlora prune` can use the policy.

as_they_stand = True
    Optional: `dynlora prune` does not turn the components into the SVD basis before it scores them.

OPTIONS and CONFLICTS
    Optional: keys that the policy adds to the section `pruning` of recipes, see config/options.py, and other keys that
    it cannot be used with.

Dimensions: K components of the pool, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynlora_cli.data.batches import Batch


class Observer:
    """What a policy has seen of the components so far, such as running averages of gradients.

    It is used in two places:

    - Training calls `observe` once for each optimizer step.
    - `dynlora prune` passes held-out rows through the trained model and calls `observe` once for each batch of them.

    Whoever has to see more than the gradient of the pool sets hooks in `watching`, which is around the passes of every
    batch: in `dynlora prune`, and with `watches_training` in training, too.

    This class keeps its tensors in `seen`, with one number per component in each. An observer that needs no more than
    that only has to write `observe`.

    Attributes:
        name: tells its tensors from others in a checkpoint.
        own_basis: after training, `turn` changes the components before they are scored. Otherwise they are turned into
            the SVD basis before anything is observed.
        watches_training: `watching` is called in training as well.
        seen: tensors by name, each [K].
    """

    name: ClassVar[str] = "observed"
    own_basis: ClassVar[bool] = False
    watches_training: ClassVar[bool] = False

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything: the components were turned into another basis, so these are others."""
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watching(
        self,
        pool: Pool,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        *,
        real_BT: Tensor | None = None,  # noqa: ARG002
        divisor: float = 1.0,  # noqa: ARG002
    ) -> Iterator[None]:
        """Around the forward and backward pass of each batch: a place for hooks.

        Args:
            pool: on the model.
            batch: passes through it.
            real_BT: which tokens of the batch are no padding; None: all, or nobody knows.
            divisor: the loss that is passed back is the sum over the batch's targets divided by this.
        """
        yield

    def gather(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes what `watching` has collected since the last step, before `observe`.

        Args:
            reduce: sums a tensor over processes, in place.
        """

    def skip(self) -> None:
        """Forget what `watching` has collected since the last step: its gradient overflowed in fp16."""

    def observe(self, pool: Pool, targets: float) -> None:
        """Look at the gradient at hand, `pool.values.grad`.

        Args:
            pool: the components.
            targets: supervised tokens (or rows) that the gradient is the mean of. It is summed over micro-batches and
                processes, and not yet clipped.
        """
        raise NotImplementedError

    def turn(self, name: str, a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor]:
        """The same update s·BA of a layer, as the components that are to be scored; where there is `own_basis`.

        Called once for each run that components of the layer began in, in their order, with the components of that run.
        """
        raise NotImplementedError

    def get(self, key: str, pool: Pool) -> Tensor:
        """A tensor of `seen`; zeros as long as nothing was observed. [K]"""
        found = self.seen.get(key)
        return pool.values.new_zeros(pool.components, requires_grad=False) if found is None else found

    def select(self, pool: Pool, keep_K: Tensor) -> None:  # noqa: ARG002
        """Keep only what belongs to the components that stay.

        Args:
            pool: still has all of them.
            keep_K: which stay, boolean.
        """
        self.seen = {key: value_K[keep_K] for key, value_K in self.seen.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in another process; empty before the first step."""
        return dict(self.seen)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.restart()
        self.seen |= state


class Policy(Protocol):
    """The shape of a policy's module; `observer` and the other names above are optional."""

    def scores(self, pool: Pool, observed: Any, generator: torch.Generator) -> Tensor:
        """Worth of every component per number it holds. [K]

        Args:
            pool: the components.
            observed: the policy's own observer; None where it has none.
            generator: for whatever is drawn at random; on the CPU.
        """


def observer_of(policy: Policy | ModuleType, options: Any, *, training: bool) -> Observer | None:
    """A new observer for a policy; None for one that judges the components as they stand.

    Args:
        policy: a file of policies/.
        options: the section `pruning` of the recipe, with the policy's own keys.
        training: whether the components still change while they are observed. Then what is long ago counts less.
    """
    make = getattr(policy, "observer", None)
    return make(options, training) if make else None


def scores_of(policy: Policy | ModuleType, pool: Pool, observed: Observer | None, generator: torch.Generator) -> Tensor:
    """A policy's scores of the pool's components. [K]

    Raises:
        UsageError: they are not one number for each component.
    """
    scores_K = policy.scores(pool, observed, generator)
    if scores_K.shape != (pool.components,) or scores_K.isnan().any():
        name = str(getattr(policy, "__name__", "")).rpartition(".")[2]
        raise UsageError(
            f"policy {name} gives no score for some of the {pool.components} components", "mend it, or choose another"
        )
    return scores_K
