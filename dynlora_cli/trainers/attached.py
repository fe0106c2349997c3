"""Components on a model that somebody else trains, and off it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.adapters.write import write_pool
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.start import Start, plan_start
from dynlora_cli.models.experts import join, split
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.peft_types import ends_in, taken_for_experts
from dynlora_cli.models.targets import find_targets, inside
from dynlora_cli.text import counted
from dynlora_cli.trainers.heads import sharing, task_of, whole_modules
from dynlora_cli.trainers.leaves import settle
from dynlora_cli.trainers.reference import reference, share
from dynlora_cli.trainers.settings import checked, refuse_unknown
from dynlora_cli.trainers.state import Saved

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.lora.pool import Pool
    from dynlora_cli.lora.variant import Variant

KEPT = "_dynlora_attached"  # the attribute of a model that knows its components


class Attached:
    """Components on a model.

    Attributes:
        model: the transformers model that holds them.
        pool: all components.
        recipe: what they were attached with, as the sections of a recipe.
        start: how many there were at first, and the budget.
        whole: modules that train whole, such as a new head.
        saved: writes and reads checkpoints of a trainer.
    """

    def __init__(
        self, model: PreTrainedModel, outer: nn.Module, pool: Pool, recipe: Recipe, start: Start, undo: _Undo
    ) -> None:
        self.model, self.outer, self.pool, self.recipe, self.start = model, outer, pool, recipe, start
        self.whole = undo.whole
        self._undo = undo
        self.saved = Saved(model, pool, self.settings)
        self.training: Any = None  # the callback of a trainer that is at work

    def settings(self) -> dict[str, Any]:
        """The sections that a run must have in common with the one whose checkpoint it goes on with."""
        return {name: getattr(self.recipe, name).model_dump(mode="json") for name in ("adapter", "rank", "pruning")}

    @property
    def rank_map(self) -> dict[str, int]:
        """Components alive in each layer."""
        return dict(self.pool.counts)

    @property
    def parameters(self) -> int:
        """Numbers in all components that are alive."""
        return self.pool.parameters

    @property
    def components(self) -> int:
        """Components that are alive."""
        return self.pool.components

    def save(self, folder: str | Path) -> Path:
        """Write adapter_config.json and adapter_model.safetensors, which stock PEFT loads.

        Raises:
            MeasureError: a number is not finite.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        model, adapter = self.model, self.recipe.adapter
        write_pool(
            self.pool,
            path,
            kind=getattr(plugins.load("variants", adapter.variant), "saved_as", PLAIN),
            model_type=model.config.model_type,
            base_model=getattr(model.config, "_name_or_path", "") or "",
            revision=None,
            task=task_of(model),
            whole={name: model.get_submodule(name) for name in (*self.whole, *sharing(model, self.whole))},
        )
        return path

    def reference(self) -> nn.Module:
        """The model without components, for losses that compare with it; shares every tensor of the base."""
        return reference(self.model, self.pool, self)

    def share(self, other: nn.Module) -> int:
        """Let another model of the same base, which a trainer loaded, hold this one's tensors; the bytes given back.

        Raises:
            UsageError: it is not the same base.
        """
        return share(other, self.model, self.pool)

    def detach(self) -> nn.Module:
        """Take the components off; the model is what it was, and so are the modules that were trained whole.

        Raises:
            UsageError: a trainer is at work, or it is done already.
        """
        if self.training is not None:
            raise UsageError(
                "detach: a trainer is at work on these components",
                "wait until it is done; after one that ended in an error call `release()` of its callback first",
            )
        if getattr(self.model, KEPT, None) is not self:
            raise UsageError("detach: these components are off the model already", "attach new ones")
        self.saved.end()
        self._undo.run(self.model, self.outer, self.pool)
        return self.outer

    def __repr__(self) -> str:
        ranks = sorted(self.rank_map.values())
        return (
            f"Attached({counted(self.components, 'component')} in {counted(len(ranks), 'layer')}, "
            f"{counted(self.parameters, 'number')}, ranks {ranks[0]} to {ranks[-1]}, "
            f"budget {self.start.budget:,}, policy {self.recipe.pruning.policy})"
        )


class _Undo:
    """What a model was like before components were attached."""

    def __init__(self, model: PreTrainedModel, whole: Sequence[str]) -> None:
        self.whole = tuple(whole)
        self.trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.heads: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if inside(name, whole)
        }
        self.claimed = model.__dict__.get("_hf_peft_config_loaded")
        self.splits = False

    @torch.no_grad()
    def run(self, model: PreTrainedModel, outer: nn.Module, pool: Pool) -> None:
        """Make it that again."""
        for hook in pool.hooks:
            hook.remove()
        for name, layer in pool.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
        if self.splits:
            join(model)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in self.heads:
                parameter.data = self.heads[name].to(parameter.device)
            parameter.requires_grad_(self.trained.get(name, True))
        vars(model).pop("save_pretrained", None)
        vars(model).pop("_hf_peft_config_loaded", None)
        if self.claimed is not None:
            model._hf_peft_config_loaded = self.claimed
        for each in {model, outer}:
            delattr(each, KEPT)


def attach(
    model: nn.Module,
    budget: int | float | str = 8,
    policy: str = "fisher",
    *,
    init: int | str = "auto",
    target_modules: str | Sequence[str] = "all-linear",
    variant: str = "lora",
    scaling: str = "lora",
    alpha: float | str = "auto",
    dropout: float = 0.0,
    freeze_a: bool = False,
    init_weights: str = "default",
    modules_to_save: str | Sequence[str] | None = None,
    seed: int = 0,
    **others: Any,
) -> Attached:
    """Put components on a model, in place, for a trainer of somebody else; the model's output stays the same.

    The base is frozen. `model.save_pretrained`, and with it a trainer's `save_model`, writes a plain PEFT adapter from
    now on. Components go where a `DynamicRankCallback` is among the trainer's callbacks; without it all of them stay.

    Args:
        model: a transformers model, in 4 or 8 bits too, or a module that holds one, such as a SentenceTransformer.
        budget: what may be alive in the end: an average rank (8), a share of the start (0.5) or a count ("2M").
        policy: what components are scored by; a file name in dynlora_cli/pruning/policies.
        init: components of each layer at the start; "auto": twice the budget, 32 where that is a share.
        target_modules, variant, scaling, alpha, dropout, freeze_a, init_weights: as in the section `adapter` of a
            recipe.
        modules_to_save: modules that train whole and are saved beside the components; None: a classifier's head.
        seed: of the components' values, and of a policy that draws lots.
        others: refused in words.

    Raises:
        UsageError: a value is wrong, or the model cannot have components: it has some, or is PEFT's, or has no linear
            layer.
    """
    given: dict[str, Any] = {
        "variant": variant, "target_modules": target_modules, "scaling": scaling, "alpha": alpha, "dropout": dropout,
        "freeze_a": freeze_a, "init_weights": init_weights,
    }  # fmt: skip
    refuse_unknown(others, (*given, "init", "modules_to_save", "seed"), "attach")
    base = _model_in(model)
    task = task_of(base)
    rank = {"budget": budget, "init": init}
    sections: dict[str, dict[str, Any]] = {"adapter": given, "rank": rank, "pruning": {"policy": policy}}
    recipe = checked(sections, task=task, seed=seed, where="attach")
    kind = cast("Variant", plugins.load("variants", variant))
    _refuse_variant(variant, kind.Layer)
    undo = _Undo(base, whole_modules(base, modules_to_save))
    pool, start = _put(base, kind, recipe, undo, seed)
    attached = Attached(base, model, pool, recipe, start, undo)
    _dress(attached)
    return attached


def _dress(attached: Attached) -> None:
    """Let the heads train, and the model be taken for one that can be trained and saved as an adapter."""
    base = attached.model
    for name, parameter in base.named_parameters():
        if inside(name, attached.whole):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    settle(attached.pool)
    for each in (base, attached.outer):
        object.__setattr__(each, KEPT, attached)
    # What transformers asks before it trains a quantized model, and before it checkpoints activations.
    base._hf_peft_config_loaded = True
    object.__setattr__(base, "save_pretrained", MethodType(_save_pretrained, base))


def _put(base: PreTrainedModel, kind: Variant, recipe: Recipe, undo: _Undo, seed: int) -> tuple[Pool, Start]:
    """Freeze the model and replace its target layers."""
    options = recipe.adapter
    if options.names_experts:
        if hasattr(kind, "saved_as"):
            raise UsageError(
                f"attach: variant {options.variant} is no LoRA when it is saved, which is all that PEFT takes for "
                "experts",
                "write `variant='lora'`, or leave experts out of target_modules",
            )
        split(base)
        undo.splits = True
    targets = find_targets(base, options.target_modules, whole=undo.whole)
    taken = ends_in(targets, taken_for_experts(base.config.model_type))
    if taken and getattr(kind, "in_modules_only", False):
        raise UsageError(
            f"attach: PEFT has no {options.variant} for {min(taken)}, which it takes for one of the experts in a "
            f"model of type {base.config.model_type}",
            "write target_modules='attention', or variant='lora'",
        )
    if not targets:
        raise UsageError("attach: the model has no linear layer that could get components", "is it the right one?")
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    start = plan_start(shapes, recipe.rank.parsed_budget(), recipe.rank.init, kind.Layer)
    base.requires_grad_(False)
    training = base.training
    pool = kind.attach(base, targets, start, options, seed)
    if options.init_weights == "orthogonal":
        _orthogonal(pool, seed)
    base.train(training)
    return pool, start


@torch.no_grad()
def _orthogonal(pool: Pool, seed: int) -> None:
    from dynlora_cli.lora.directions import orthogonal_start

    generator = torch.Generator().manual_seed(seed)
    for layer in pool.layers.values():
        layer.a_CI[:, : layer.in_features].copy_(orthogonal_start(layer.count, layer.in_features, generator))


def attached_to(model: object) -> Attached:
    """The components on a model.

    Raises:
        UsageError: it has none.
    """
    if isinstance(model, Attached):
        return model
    found = vars(model).get(KEPT) if isinstance(model, nn.Module) else None
    if found is None:
        raise UsageError(
            f"DynamicRankCallback: {type(model).__name__} has no components",
            "call `attached = attach(model, budget=8)` first and pass what it returns",
        )
    return found


def _model_in(model: nn.Module) -> PreTrainedModel:
    """The one transformers model in a module.

    Raises:
        UsageError: there is none, or it has an adapter already.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach: needs a model, and got {type(model).__name__}", "load it with from_pretrained")
    for part in model.modules():
        if KEPT in vars(part):
            raise UsageError("attach: the model has components already", "call `detach()` on them first")
        if type(part).__module__.startswith("peft."):
            raise UsageError(
                "attach: the model has an adapter of PEFT, which dynlora would train on top of",
                "attach to the base model; or merge the adapter first: `model = model.merge_and_unload()`",
            )
    if isinstance(model, PreTrainedModel):
        return model
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    outermost = [
        part for part in found if not any(part is not other and part in set(other.modules()) for other in found)
    ]
    if len(outermost) != 1:
        raise UsageError(
            f"attach: {type(model).__name__} holds {counted(len(outermost), 'transformers model')}",
            "pass the one that is to be adapted",
        )
    return outermost[0]


def _refuse_variant(name: str, layer: type[ComponentLinear]) -> None:
    """
    Raises:
        UsageError: the variant asks for something in the step that a callback cannot do.
    """
    for method, what in (("penalty", "adds to the loss"), ("settle_gradient", "changes the gradient before clipping")):
        if getattr(layer, method) is not getattr(ComponentLinear, method):
            raise UsageError(
                f"attach: variant {name} {what}, which the trainer computes",
                "choose another, such as lora or dora, or train with `dynlora train`",
            )


def _save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: object = None,  # noqa: ARG001 - of the whole model, which is not what is saved
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """In the place of a model's own: writes the adapter, and in a trainer's checkpoints the exact state beside it."""
    if push_to_hub:
        raise UsageError("save_pretrained: push_to_hub is not done here", "call `model.push_to_hub(...)`")
    if is_main_process:
        attached = vars(self)[KEPT]
        attached.saved.write(attached.save(save_directory))
