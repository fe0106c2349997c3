"""All settings of a run as one frozen tree.

    Recipe ── model  dataset  adapter  rank  pruning  train  eval  output_dir  seed

The sentence under a field is its description in `dynlora schema`. Reading a file is in recipe.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dynlora_cli import drawers
from dynlora_cli.budget import MAX_RANK, Budget, parse_budget
from dynlora_cli.recipe_types import Count, Drawer, NotForeign, Positive, Section, Share, Text, whole


def _budget(value: object) -> object:
    parse_budget(value)
    return whole(value)


def _only_after_training(policy: str) -> str | None:
    if drawers.declared("policies", policy, "needs") == "covariances":
        return f"which works on a trained adapter: `dynlora prune --policy {policy}`"
    return None


class Model(Section):
    """The base model, which stays frozen."""

    name_or_path: Text
    """A hub id, a folder, or `builtin:tiny`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    task: Literal["causal-lm", "seq2seq-lm", "sequence-classification"] = "causal-lm"
    """What the model is trained to do; seq2seq-lm: an encoder reads the prompt, a decoder writes the completion."""
    num_labels: Annotated[int, Field(ge=2), BeforeValidator(whole)] | None = None
    """Number of classes, for sequence-classification; null counts them in the data."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto: float32 on the CPU, bfloat16 on a GPU that has it; adapters are float32."""
    load_in_4bit: bool = False
    """Load the base in 4 bits, as QLoRA does."""
    load_in_8bit: bool = False
    """Load the base in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of a 4-bit base."""
    bnb_4bit_use_double_quant: bool = True
    """Also quantize the scales of a 4-bit base."""
    attn_implementation: Annotated[Text, AfterValidator(NotForeign("attn_implementation"))] | None = None
    """Attention kernel by its name in transformers, such as sdpa or flash_attention_2; null: transformers chooses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Source(Section):
    """A file, folder or hub data set."""

    path: Text
    """A file (JSONL, JSON, CSV, Parquet, text), a folder, a hub id, or `builtin:stdlib-docs`."""
    format: Annotated[str, Drawer("formats", also=("auto",))] = "auto"
    """How a row becomes an example; auto decides by the columns and says what it chose."""
    split: Text = "train"
    """Split of a hub data set."""
    name: Text | None = None
    """Configuration of a hub data set."""
    columns: dict[str, Text] = {}
    """Our field name to the data's column, such as `{prompt: question}`."""


class Dataset(Section):
    """Rows to train on and rows to measure on."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources to train on; an item may be just a path."""
    val: list[Source] = []
    """Sources to measure on; where there are any, `val_size` is not used."""
    val_size: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training rows held out to measure on; rows with the same prompt stay together."""
    max_length: Annotated[int, Field(ge=8), BeforeValidator(whole)] = 1024
    """Longest example, in tokens."""
    packing: bool = False
    """Put several examples in one row, none of which sees another."""
    train_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that carry loss; auto chooses by format."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to an example longer than `max_length`."""
    chat_template: Text | None = None
    """A Jinja template or its file; null: the tokenizer's own."""


class Adapter(Section):
    """Where the components sit and how they act."""

    variant: Annotated[str, Drawer("variants")] = "lora"
    """How a layer uses its components: a file name in dynlora_cli/variants."""
    target_modules: (
        Annotated[Text, AfterValidator(NotForeign("target_modules"))] | Annotated[list[Text], Field(min_length=1)]
    ) = "all-linear"
    """all-linear (every linear layer but the output head), attention, qv, experts, or module names and globs."""
    scaling: Literal["lora", "rslora"] = "lora"
    """lora: alpha / r; rslora: alpha / sqrt(r); r is the budget's average rank, constant for the run."""
    alpha: Positive | Literal["auto"] = "auto"
    """Numerator of the scale; auto: so that the scale is 2, which for lora is the customary alpha = 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    freeze_a: bool = False
    """Train B alone (LoRA-FA): layers keep no inputs for the backward pass, which saves memory."""
    penalty: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Weight of the variant's own penalty (adalora: orthogonality, sora: threshold, ard: L1); others have none."""
    init_weights: Literal["default", "orthogonal", "eva", "pissa", "loftq"] = "default"
    """Start of the factors; default: B = 0, A kaiming_uniform(a=sqrt 5), as PEFT; the others: dynlora_cli/starts.py."""

    @property
    def names_experts(self) -> bool:
        """Whether every expert of a mixture gets components of its own."""
        wanted = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        return any(re.search(r"(^|\W)experts(\W|$)", pattern) for pattern in wanted)


class Rank(Section):
    """How many components there are, at the start and at the end."""

    init: Literal["auto"] | Count = "auto"
    """Components per layer at the start; auto: twice the budget, 32 where the budget is a share or auto."""
    allocation: Literal["uniform", "eva", "gora", "sensitivity"] = "uniform"
    """How they are shared out among layers: alike, by variance of inputs, or by gradients (importance, sensitivity)."""
    budget: Annotated[
        int | float | str,
        BeforeValidator(_budget),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 1, "maximum": MAX_RANK},
                    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                    {"type": "string", "pattern": r"^\d+(\.\d+)?[kKmMbB]$|^auto$"},
                ]
            }
        ),
    ] = 8
    """What may live at the end: an average rank (8), a share of the start (0.5), a parameter count (2M), or auto."""

    def parsed_budget(self) -> Budget:
        """The budget as its kind and value."""
        return parse_budget(self.budget)


class Pruning(Section):
    """Which components go, and when; times are shares of all optimizer steps."""

    policy: Annotated[str, Drawer("policies", refuse=_only_after_training)] = "fisher"
    """What scores the components: a file name in dynlora_cli/policies."""
    start: Share | Literal["auto"] = "auto"
    """When pruning begins; auto: after a quarter of the run, with budget auto after half of it."""
    end: Share | Literal["auto"] = "auto"
    """When the budget is met; auto: after half of the run, with budget auto after 0.95 of it."""
    lr_coupling: Share = 0.5
    """The learning rate is multiplied by (start parameters / alive parameters) to this power."""
    events: Literal["auto"] | Count = "auto"
    """Number of pruning events; auto: one per 10 steps from start to end, 1 to 20 (open budget: per 5, to 14)."""
    gauge: bool = True
    """Turn the factors of each layer into their SVD basis after each event."""
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """With budget auto: nats that all events may add to the held-out loss; null: 1 %, or one standard error."""


class Train(Section):
    """The training loop."""

    epochs: Count = 1
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Optimizer steps; where set, it decides instead of `epochs`."""
    micro_batch_size: Count = 8
    """Examples per forward pass and device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Highest learning rate, before `pruning.lr_coupling` raises it; auto: found by short trials on the data."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of all optimizer steps over which the learning rate rises from 0."""
    lora_plus_ratio: Positive | None = None
    """B learns at this multiple of A's rate (LoRA+; its authors advise 16); null: at the same."""
    weight_decay: Share = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Positive | None = 1.0
    """Norm to which the gradient is clipped; null: no clipping."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations in the backward pass: less memory, more time; offload: and keep the rest on the host."""
    fused: bool = True
    """Layers and loss, and without compile norms, gates and rotary positions, as fused functions; false: as ordinary
    operations, equal up to rounding, to compare with."""
    compile: bool = False
    """Compile the model's blocks with torch.compile: the first steps take a minute, the others less time on a GPU."""
    cuda_graphs: bool = False
    """Record the passes through the model's blocks as CUDA graphs, for small models or batches; variant lora."""
    shard_base: bool = False
    """With `--devices N`: each device holds an N-th of the frozen base (FSDP2); variant lora, base not quantized."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """8bit: moments in a quarter of the memory; paged: in memory that moves to the host where the GPU is full."""
    log_steps: Count = 10
    """Optimizer steps between log lines."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints; null: every 10 minutes and at each evaluation."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that also receive the metrics."""


class Eval(Section):
    """Measuring while training."""

    steps: Count | None = None
    """Optimizer steps between evaluations; null: after every epoch. Always at the start and at the end as well."""
    max_samples: Count | None = None
    """Held-out examples used at most; null: all."""
    early_stopping_patience: Count | None = None
    """Evaluations without a lower held-out loss after which training stops; null: never."""


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
    output_dir: Text = "out/run"
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
    """Settings that the variant has no use for: it names those that it takes, see variants/_variant.py."""
    adapter, variant = recipe.adapter, recipe.adapter.variant
    takes = drawers.declared("variants", variant, "takes") or ()
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
    """What needs a weight of the base outside of its block's passes, or in another form than torch's own."""
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
    """What is not the same kernels on the same memory in every pass."""
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
    if recipe.rank.allocation != "uniform" and not drawers.declared("variants", variant, "has_components"):
        yield Conflict("rank.allocation", "adapter.variant", f"variant {variant} has no components to share out")
    if recipe.model.task == "seq2seq-lm":
        for key, value in (("adapter.init_weights", start), ("rank.allocation", recipe.rank.allocation)):
            if value == "eva":
                yield Conflict(key, "model.task", "eva looks at the tokens that carry loss, and an encoder has none")
    if start not in ("default", *(drawers.declared("variants", variant, "starts") or ())):
        text = f"variant {variant} does not start as {start}; write `init_weights: default`, or `variant: lora`"
        yield Conflict("adapter.init_weights", "adapter.variant", text)
    elif start == "loftq" and not recipe.model.load_in_4bit:
        text = "loftq makes up for what 4 bits lose; set `model.load_in_4bit: true`, or choose another start"
        yield Conflict("adapter.init_weights", "model.load_in_4bit", text)
