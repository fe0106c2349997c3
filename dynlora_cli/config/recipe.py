"""A whole recipe: its sections, and which settings, each valid alone, do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from dynlora_cli import plugins
from dynlora_cli.config.sections import Adapter, Dataset, Eval, Model, Pruning, Rank, Train
from dynlora_cli.config.types import HomePath, Section


class Recipe(Section):
    """All settings of a run."""

    model: Model
    """The base model; `model: NAME` stands for `model: {name_or_path: NAME}`."""
    dataset: Dataset
    """The data; `dataset: FILE` stands for `dataset: {train: [{path: FILE}]}`."""
    adapter: Adapter = Adapter()
    """What is trained: where the components sit and how they act."""
    rank: Rank = Rank()
    """The rank budget and the rank at the start."""
    pruning: Pruning = Pruning()
    """Which components are removed, and when."""
    train: Train = Train()
    """Length, batches, learning rate, checkpoints and logs."""
    eval: Eval = Eval()
    """Measuring and early stopping."""
    output_dir: HomePath = "out/run"
    """The run folder; a recipe file that names none gets out/<its own name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""

    @property
    def pruning_window(self) -> tuple[float, float]:
        """When pruning begins and ends, as shares of the run."""
        # An open budget goes by what an event does to the loss, and only what was learned can be missed.
        default = (0.5, 0.95) if self.rank.parsed_budget().kind == "auto" else (0.25, 0.5)
        start, end = self.pruning.start, self.pruning.end
        return default[0] if start == "auto" else start, default[1] if end == "auto" else end

    @model_validator(mode="after")
    def _no_conflicts(self) -> Recipe:
        found = list(conflicts(self))
        if found:
            text = "; ".join(f"{conflict.key}: {conflict.text}" for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self


class Conflict(NamedTuple):
    """A setting that does not go with another: the key to change, the other key, and why."""

    key: str
    other: str
    text: str


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Settings, each valid alone, that do not go together."""
    model, data, rank, pruning = recipe.model, recipe.dataset, recipe.rank, recipe.pruning
    classifier = model.task == "sequence-classification"
    if model.load_in_4bit and model.load_in_8bit:
        yield Conflict("model.load_in_8bit", "model.load_in_4bit", "4 and 8 bits exclude each other; set one to false")
    if recipe.adapter.variant == "full":
        for key in ("load_in_4bit", "load_in_8bit"):
            if getattr(model, key):
                text = "variant full trains the weights themselves, which a quantized base does not allow"
                yield Conflict(f"model.{key}", "adapter.variant", text)
        if model.dtype == "float16":
            text = "variant full trains the weights themselves, and steps are too small for float16"
            yield Conflict("model.dtype", "adapter.variant", text)
    yield from _variant_conflicts(recipe)
    if recipe.train.shard_base:
        yield from _sharding_conflicts(recipe)
    if recipe.train.compile and recipe.train.gradient_checkpointing == "offload":
        text = "compiled blocks keep their inputs themselves; leave one of the two out"
        yield Conflict("train.compile", "train.gradient_checkpointing", text)
    if recipe.train.cuda_graphs:
        yield from _recording_conflicts(recipe)
    if model.num_labels is not None and not classifier:
        yield Conflict("model.num_labels", "model.task", "only `model.task: sequence-classification` has labels")
    if data.packing and model.task != "causal-lm":
        yield Conflict("dataset.packing", "model.task", f"packing does not go with {model.task}")
    if data.chat is True and model.task != "causal-lm":
        yield Conflict("dataset.chat", "model.task", f"{model.task} knows no turns; leave it at auto")
    if data.train_on in ("assistant", "all") and model.task == "seq2seq-lm":
        text = f"got {data.train_on}; a decoder writes the completion and nothing else, so leave it at auto"
        yield Conflict("dataset.train_on", "model.task", text)
    if not data.val and not data.val_size:
        for key in ("steps", "early_stopping_patience"):
            if getattr(recipe.eval, key) is not None:
                yield Conflict(f"eval.{key}", "dataset.val_size", "needs `dataset.val`, or `dataset.val_size` above 0")
    yield from _start_conflicts(recipe)
    budget = rank.parsed_budget()
    saved = 2 if recipe.adapter.init_weights == "pissa" else 1  # rank of a component in the files
    if isinstance(rank.init, int) and budget.kind == "rank" and saved * rank.init < budget.value:
        yield Conflict(
            "rank.init", "rank.budget", f"got {rank.init}, below the budget {budget.value}; pruning only removes"
        )
    if pruning.tolerance is not None and budget.kind != "auto":
        yield Conflict("pruning.tolerance", "rank.budget", "only `rank.budget: auto` measures what its events add")
    start, end = recipe.pruning_window
    if start >= end:
        yield Conflict("pruning.end", "pruning.start", f"got {end}, must be above `pruning.start` ({start})")


def _variant_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Settings that the variant has no use for: it names those that it takes, see lora/variant.py."""
    adapter, variant = recipe.adapter, recipe.adapter.variant
    takes = plugins.declared("variants", variant, "takes") or ()
    given = {
        "adapter.alpha": adapter.alpha != "auto",
        "adapter.dropout": adapter.dropout > 0,
        "adapter.penalty": adapter.penalty != "auto",
        "adapter.freeze_a": adapter.freeze_a,
        "train.lora_plus_ratio": recipe.train.lora_plus_ratio is not None,
    }
    for key, is_given in given.items():
        if is_given and key.split(".")[1] not in takes:
            yield Conflict(key, "adapter.variant", f"variant {variant} has no use for it")
    if adapter.scaling == "rslora" and adapter.alpha == "auto":
        yield Conflict("adapter.scaling", "adapter.alpha", "rslora divides alpha by sqrt(r): write `alpha: 16`, say")


def _sharding_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Settings that need a weight of the base outside the passes of its block, or in another form than torch's own."""
    key = "train.shard_base"
    if recipe.adapter.variant != "lora":
        yield Conflict("adapter.variant", key, "a sharded base goes with variant lora alone; set one of the two back")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe.model, name):
            yield Conflict(f"model.{name}", key, "a quantized base lies whole on every device; set one to false")
    if recipe.train.compile:
        yield Conflict("train.compile", key, "blocks in parts are not compiled; set one of the two to false")
    if recipe.adapter.init_weights == "eva" or recipe.rank.allocation != "uniform":
        where = "adapter.init_weights" if recipe.adapter.init_weights == "eva" else "rank.allocation"
        yield Conflict(where, key, "it looks at the model before there are parts; leave one of the two out")


def _recording_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Settings that no CUDA graph can hold: with them, kernels or memory differ from pass to pass."""
    key = "train.cuda_graphs"
    if recipe.adapter.variant != "lora":
        yield Conflict("adapter.variant", key, "variant lora alone is recorded; set one of the two back")
    if recipe.adapter.names_experts:
        text = "which tokens an expert gets is another question in every pass; leave one of the two out"
        yield Conflict("adapter.target_modules", key, text)
    if recipe.model.load_in_8bit:
        yield Conflict(
            "model.load_in_8bit", key, "8 bits look for outliers in every pass; load_in_4bit can be recorded"
        )
    if "flash" in (recipe.model.attn_implementation or ""):
        yield Conflict("model.attn_implementation", key, "it looks for padding in every pass; sdpa can be recorded")
    if recipe.train.gradient_checkpointing and recipe.adapter.dropout:
        text = "checkpointing asks for the state of random numbers, which is not recorded; leave one of the three out"
        yield Conflict("adapter.dropout", key, text)
    if recipe.train.gradient_checkpointing == "offload":
        yield Conflict("train.gradient_checkpointing", key, "copies to the host are not recorded; write true instead")
    if recipe.train.shard_base:
        yield Conflict("train.shard_base", key, "blocks in parts are not recorded; set one of the two to false")


def _start_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Starts that the variant, the layers or the base do not allow."""
    variant, start = recipe.adapter.variant, recipe.adapter.init_weights
    if recipe.adapter.names_experts:
        if start not in ("default", "orthogonal"):
            text = f"experts do not start as {start}; write `init_weights: default`, or orthogonal"
            yield Conflict("adapter.init_weights", "adapter.target_modules", text)
        if recipe.rank.allocation != "uniform":
            text = "experts start alike: an expert that no token reaches has nothing to be measured by"
            yield Conflict("rank.allocation", "adapter.target_modules", text)
    if recipe.adapter.freeze_a and start == "pissa":
        yield Conflict("adapter.freeze_a", "adapter.init_weights", "PiSSA's start is subtracted, and A has to leave it")
    if recipe.rank.allocation != "uniform" and not plugins.declared("variants", variant, "has_components"):
        yield Conflict("rank.allocation", "adapter.variant", f"variant {variant} has no components to share out")
    if recipe.model.task == "seq2seq-lm":
        for key, value in (("adapter.init_weights", start), ("rank.allocation", recipe.rank.allocation)):
            if value == "eva":
                yield Conflict(key, "model.task", "eva looks at the tokens that carry loss, and an encoder has none")
    if start not in ("default", *(plugins.declared("variants", variant, "starts") or ())):
        text = f"variant {variant} does not start as {start}; write `init_weights: default`, or `variant: lora`"
        yield Conflict("adapter.init_weights", "adapter.variant", text)
    elif start == "loftq" and not recipe.model.load_in_4bit:
        text = "loftq makes up for what 4 bits lose; set `model.load_in_4bit: true`, or choose another start"
        yield Conflict("adapter.init_weights", "model.load_in_4bit", text)
