"""Pruning an adapter that is trained already: put its components in order once, then cut anywhere.

    Order.by_policy    components in the policy's basis, and their scores
    Order.keep         which of them stay within so many parameters: one threshold over all layers
    Order.cut          the smaller adapter
    smallest_within    bisection over the threshold: the smallest adapter whose loss rises by no more than is allowed

Dimensions: K components of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.nested import from_the_end
from dynlora_cli.lora.pissa import RelativeLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import plan_start
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.pruning.policy import Observer, Policy, observer_of, scores_of
from dynlora_cli.pruning.select import select_K
from dynlora_cli.tasks.loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.config.budget import Budget
    from dynlora_cli.data.batches import Batch

BISECTIONS = 8
Batches = Callable[[], Iterable["Batch"]]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Order:
    """An adapter whose components are in the policy's basis, with a score for each.

    Attributes:
        adapter: computes the same as the one that it was made from.
        scores_K: higher is better; layer by layer, in the adapter's order.
        loss: of the whole adapter on the rows that were looked at, nats per target; None: none were, or it is not told.
    """

    adapter: Adapter
    scores_K: Tensor
    loss: float | None = None

    @classmethod
    def by_policy(
        cls,
        adapter: Adapter,
        policy: Policy | ModuleType,
        model: PreTrainedModel | None,
        batches: Batches | None,
        *,
        options: Any = None,
        autocast: Autocast = nullcontext,
        seed: int = 0,
    ) -> Order:
        """Turn the components into the basis that the policy judges, and score them.

        Args:
            adapter: trained.
            policy: a file of policies/.
            model: the base, for policies that look at data.
            batches: gives the rows to look at, anew at each call.
            options: the policy's own settings, as in the section `pruning` of a recipe.
            autocast: makes the context of the forward pass.
            seed: of what is random.

        Raises:
            UsageError: the policy needs data and there is none, or cannot judge this adapter.
            MeasureError: what it saw is not finite.
        """
        observer = observer_of(policy, options, training=False)
        if adapter.schedule is not None:
            if observer is not None:
                raise UsageError(
                    f"{adapter.folder} uses fewer components where there is more noise, so it is cut from the end",
                    "use --policy magnitude or prefix",
                )
            return cls(adapter, _scores(policy, adapter, None, seed))
        own_basis = observer is not None and observer.own_basis
        if observer is not None:
            if model is None or batches is None:
                raise UsageError(
                    "this policy looks at data, and there is none", "name rows with --data, or use magnitude"
                )
            if own_basis and adapter.multiplies:
                raise UsageError(
                    f"{adapter.folder} is a HiRA, through whose factors nothing flows that this policy could look at",
                    "use --policy fisher or magnitude",
                )
        if not own_basis and not getattr(policy, "as_they_stand", False):
            adapter = _turned(adapter, lambda _, a_CI, b_OC: svd_factors(a_CI, b_OC))
        loss = None
        if observer is not None and model is not None and batches is not None:
            loss = _show(observer, adapter, model, batches, autocast)
        if observer is not None and own_basis:
            try:
                adapter = _turned(adapter, observer.turn)
            except torch.linalg.LinAlgError:
                raise MeasureError(
                    f"what the rows send through {adapter.folder}, or back, is not finite",
                    "look at the adapter and at the rows; --policy magnitude looks at no rows",
                ) from None
        return cls(adapter, _scores(policy, adapter, observer, seed), loss)

    @property
    def costs_K(self) -> Tensor:
        """Numbers of each component."""
        return self._per_component([factors.cost for factors in self.adapter.layers.values()])

    def _per_component(self, per_layer: list[int]) -> Tensor:
        return torch.tensor(per_layer).repeat_interleave(torch.tensor(list(self.adapter.ranks.values())))

    @property
    def least(self) -> int:
        """Parameters below which nothing can be cut: one component, or one in each layer that must keep one."""
        costs = [factors.cost for factors in self.adapter.layers.values()]
        return self._terms * (sum(costs) if self.adapter.keeps_one else max(costs))

    @property
    def _terms(self) -> int:
        """Products b aᵀ that make one component, and stay or go together."""
        return self.adapter.schedule.terms if self.adapter.schedule else 1

    def keep(self, parameters: int) -> tuple[Tensor, float]:
        """The components that stay where at most `parameters` may, and the highest score that goes. [K], boolean"""
        layers = self._per_component(list(range(len(self.adapter.layers))))
        each = slice(None, None, self._terms)  # what is cut together has one score
        costs_K = self._terms * self.costs_K[each]
        keep_K, threshold = select_K(self.scores_K[each], costs_K, layers[each], parameters, capped=False)
        return keep_K.repeat_interleave(self._terms), threshold

    def split(self, of_K: Tensor) -> dict[str, Tensor]:
        """A tensor over all components, by layer."""
        return dict(zip(self.adapter.layers, of_K.split(list(self.adapter.ranks.values())), strict=True))

    def cut(self, keep_K: Tensor) -> Adapter:
        """The adapter with only these components."""
        layers = {
            name: factors.keep(kept)
            for (name, factors), kept in zip(self.adapter.layers.items(), self.split(keep_K).values(), strict=True)
        }
        return self.adapter.with_layers(layers)

    def energy_kept(self, keep_K: Tensor) -> float:
        """‖ΔW'‖² / ‖ΔW‖², summed over layers; exact also in a basis that is not orthogonal."""
        total = sum(factors.energy() ** 2 for factors in self.adapter.layers.values())
        lost = sum(factors.energy() ** 2 for factors in self.cut(~keep_K).layers.values())
        return 1.0 - lost / total if total else 1.0


def parameters_of(budget: Budget, adapters: Sequence[Adapter]) -> int:
    """A budget as a number of parameters: a share of what the adapters hold, or a rank in all layers that training had.

    Raises:
        UsageError: it allows not even one component of the largest layer.
    """
    if budget.kind == "share":
        return math.floor(budget.value * sum(adapter.parameters for adapter in adapters))
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        recorded = adapter.record.get("layers") or {}
        shapes |= {name: (layer["d_in"], layer["d_out"]) for name, layer in recorded.items()}
        shapes |= {name: (f.a_CI.shape[1], f.b_OC.shape[0]) for name, f in adapter.layers.items()}
    return plan_start(shapes, budget, "auto").budget


def _turned(adapter: Adapter, turn: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Adapter:
    """The adapter in another basis, each birth by itself; `turn` makes it from name, a_CI and b_OC."""
    return adapter.with_layers({name: f.turned(partial(turn, name)) for name, f in adapter.layers.items()})


def _loose_pool(adapter: Adapter) -> Pool:
    """The components as a pool whose layers belong to no model."""
    if adapter.schedule and adapter.schedule.terms == 2:
        return _loose_pairs(adapter)
    layers: dict[str, ComponentLinear] = {
        name: ComponentLinear(nn.Linear(f.a_CI.shape[1], f.b_OC.shape[0], device="meta"), 1.0)
        for name, f in adapter.layers.items()
    }
    pool = Pool(layers, adapter.ranks)
    with torch.no_grad():
        for factors, (a, b) in zip(adapter.layers.values(), pool.views(pool.values.detach()), strict=True):
            a.copy_(factors.a_CI)
            b.copy_(factors.b_OC)
    return pool


def _loose_pairs(adapter: Adapter) -> Pool:
    """The same where a component is what it has become less what it was at the start."""
    layers = {
        name: RelativeLinear(nn.Linear(f.a_CI.shape[1], f.b_OC.shape[0], device="meta"), 1.0)
        for name, f in adapter.layers.items()
    }
    pool = Pool(layers, {name: rank // 2 for name, rank in adapter.ranks.items()})
    with torch.no_grad():
        for f, (a, b) in zip(adapter.layers.values(), pool.views(pool.values.detach()), strict=True):
            a.copy_(torch.cat([f.a_CI[::2], f.a_CI[1::2]], 1))
            b.copy_(torch.cat([f.b_OC[:, ::2], -f.b_OC[:, 1::2]]))
    return pool


def _scores(policy: Policy | ModuleType, adapter: Adapter, observer: Observer | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pool = _loose_pool(adapter)
    scores_K = scores_of(policy, pool, observer, generator).double().cpu()
    if adapter.schedule:
        parts = scores_K.split(list(pool.counts.values()))
        scores_K = torch.cat([from_the_end(part) for part in parts]).repeat_interleave(adapter.schedule.terms)
    if adapter.keeps_one:  # magnitudes and biases are not stored without components: each layer's best one stays
        for part in scores_K.split(list(adapter.ranks.values())):
            part[part.argmax()] = math.inf
    return scores_K


def _refuse_others(adapter: Adapter, pool: Pool) -> None:
    """Refuse components of embeddings and routers: a backward pass says nothing about them."""
    others = [name for name in adapter.layers if name not in pool.layers]
    if others:
        raise UsageError(f"{others[0]} is no linear layer, which only --policy magnitude can judge", "use that")


def _show(
    observer: Observer, adapter: Adapter, model: PreTrainedModel, batches: Batches, autocast: Autocast
) -> float | None:
    """Let the observer see the forward and backward passes over all rows; what it keeps is on the CPU afterwards.

    Returns:
        The mean loss per target, or None where a judge says how good rows are, whose numbers are others.
    """
    total, targets, judged = 0.0, 0, False
    with attached(model, adapter) as pool:
        _refuse_others(adapter, pool)
        for batch in (batch.in_one() for batch in batches()):
            with observer.watching(pool, batch, real_BT=_real(batch, model)):
                with autocast():
                    loss = summed_loss(model, batch)
                loss.backward()  # of the sum: gradients of the mean would be too small for fp16
            assert pool.values.grad is not None
            pool.values.grad.div_(batch.supervised)
            observer.observe(pool, batch.supervised)
            pool.values.grad.zero_()
            total, targets, judged = total + loss.item(), targets + batch.supervised, judged or batch.judge is not None
            del loss
    observer.load_state_dict({key: tensor.cpu() for key, tensor in observer.state_dict().items()})
    return total / targets if targets and not judged and math.isfinite(total) else None


def _real(batch: Batch, model: PreTrainedModel) -> Tensor | None:
    """Which tokens are no padding, [B, T]; None where no mask says it, or an encoder and a decoder have one each."""
    mask = batch.inputs.get("attention_mask")
    plain = mask is not None and mask.ndim == 2 and not model.config.is_encoder_decoder
    return mask.bool() if plain and mask is not None else None


def smallest_within(
    loss_of: Callable[[int], float], least: int, most: int, limit: float, bisections: int = BISECTIONS
) -> int:
    """The fewest parameters at which the loss is at most `limit`, by bisection of their logarithm.

    Args:
        loss_of: measures the loss at so many parameters.
        least, most: between which to look; at `most` the loss is within the limit.
        limit: highest loss that is allowed.
        bisections: measurements at most, beyond the first.
    """
    if loss_of(least) <= limit:
        return least
    low, high = least, most
    for _ in range(bisections):
        middle = round(math.sqrt(low * high))
        if middle in (low, high):
            break
        if loss_of(middle) <= limit:
            high = middle
        else:
            low = middle
    return high
