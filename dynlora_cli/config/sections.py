"""All settings of a run, by section; one frozen tree.

    Recipe ── model  dataset  adapter  rank  pruning  train  eval  output_dir  seed

The sentence under a field is its description in `dynlora schema`. Reading a file is in config/load.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model

from dynlora_cli import plugins
from dynlora_cli.config.adapter_section import Adapter
from dynlora_cli.config.budget import MAX_RANK, Budget, parse_budget
from dynlora_cli.config.types import (
    PART,
    Count,
    HomePath,
    NotForeign,
    OneAlone,
    PathText,
    PlugIn,
    Positive,
    Section,
    Share,
    TemplateKwargs,
    Text,
    part,
    whole,
)
from dynlora_cli.text import show


def _budget(value: object) -> object:
    parse_budget(value)
    return whole(value)


def _only_after_training(policy: str) -> str | None:
    after = plugins.declared("policies", policy, "after_training_only")
    return f"which works on a trained adapter: `dynlora prune --policy {policy}`" if after else None


class Model(Section):
    """The base model, which stays frozen."""

    name_or_path: PathText
    """A hub id, a folder, or `builtin:tiny`."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    task: Annotated[str, PlugIn("tasks")] = "causal-lm"
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


def _descriptions(texts: Any) -> Any:
    """Refuses texts that say nothing, or the same as another; a text that stands alone is the name of a file."""
    if isinstance(texts, str) and not texts.strip():
        raise ValueError(f"got {show(texts)}; write texts in a list, or name a file with one on a line")
    seen: dict[str, int] = {}
    for number, text in enumerate(texts if isinstance(texts, list) else (), 1):
        said = f"text {number} of {len(texts)}, {show(text)},"
        if not isinstance(text, str):
            raise ValueError(f"{said} must be a text")
        if not text.strip():
            raise ValueError(f"{said} says nothing; write what the task is")
        if text in seen:
            raise ValueError(f"{said} is the same as text {seen[text]}; leave one out")
        seen[text] = number
    return texts


class Source(Section):
    """A file, folder or hub data set."""

    path: PathText
    """A file (JSONL, JSON, CSV, Parquet, text), a folder, a pattern (`a/*.csv`), a hub id, `builtin:stdlib-docs`,
    `builtin:shapes` (drawings), or `builtin:library` (rows of the adapters that a router chooses from)."""
    format: Annotated[str, PlugIn("formats", also=("auto",))] = "auto"
    """How a row becomes an example; auto decides by the columns and says what it chose."""
    split: Text = "train"
    """Split of a hub data set."""
    name: Text | None = None
    """Configuration of a hub data set."""
    columns: dict[str, Text] = {}
    """Our field name to the data's column, such as `{prompt: question}`."""
    ignore: Annotated[list[Text], OneAlone()] = []
    """Columns to leave aside though they say how rows are to be learned, such as `[score]`."""
    rows: Count | None = None
    """At most so many of its rows, chosen by the seed; rows with the same prompt stay together. null: all."""
    chat_template_kwargs: TemplateKwargs = {}
    """Variables of the chat template for its rows, over those of `dataset.chat_template_kwargs`."""
    system: str | None = None
    """System message of its conversations that have none; null: that of `dataset.system`."""
    descriptions: Annotated[
        PathText | Annotated[list[Text], Field(min_length=1)] | None, BeforeValidator(_descriptions)
    ] = None
    """What its task is, in words, for variants that write adapters from texts: a list, or a file with one on a line."""


class TrainSource(Source):
    """A file, folder or hub data set to train on."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often its rows come up in an epoch: 2 is each of them twice, 0.5 one half, and the other half in the next."""


# `from` is a word of Python, so no class body can have it as a field.
_ReplayFrom = create_model(
    "_ReplayFrom",
    __base__=Section,
    **{"from": (HomePath | None, Field(default=None, description="The folder of a run; null: that of adapter.from."))},  # type: ignore[call-overload]
)


class Replay(_ReplayFrom):
    """Rows of an earlier run, and of all that it came from, which come up again so that they are not forgotten."""

    share: Annotated[float, BeforeValidator(part), Field(gt=0, lt=1), WithJsonSchema(PART)] = 0.2
    """Share of the rows of an epoch, such as 5%, evenly from each of the runs; 20 % forgot least: docs/updates.md."""

    @property
    def origin(self) -> str | None:
        """The key `from`."""
        return getattr(self, "from")


def _layout(value: str) -> str:
    """Refuses a layout in which one of the placeholders is missing, or there twice."""
    for name in ("{passages}", "{prompt}"):
        if value.count(name) != 1:
            found = f"{name} is there {value.count(name)} times"
            raise ValueError(f"must hold {{passages}} and {{prompt}}, each once; {found}")
    return value


class Retrieve(Section):
    """Passages of a corpus that are looked for and put before the prompt of every row."""

    corpus: PathText
    """A file of rows with the column `text` (and `title` and `id`), a text file, or a folder of these."""
    retriever: Literal["bm25", "dense"] = "bm25"
    """How passages are found; bm25: by common words; dense: by what an encoder makes of the texts."""
    encoder: Text = "minilm"
    """Of the retriever dense: minilm, the folder of an encoder, or its hub id."""
    top_k: Count = 3
    """Passages in the prompt of a row that is measured on, the best first."""
    distractors: Annotated[int, Field(ge=0), BeforeValidator(whole)] | None = None
    """Passages beside the right one in training; null: top_k - 1."""
    oracle_share: Share = 0.8
    """Share of the training rows that show the right passage; the others show one more distractor in its place."""
    layout: Annotated[str, AfterValidator(_layout)] = "{passages}\n\n{prompt}"
    """How a prompt is put together, of {passages} and {prompt}."""


class Dataset(Section):
    """Rows to train on and rows to measure on."""

    train: Annotated[list[TrainSource], Field(min_length=1)]
    """Sources to train on; an item may be just a path, and so may the whole list."""
    val: list[Source] = []
    """Sources to measure on; where there are any, `val_size` is not used."""
    val_size: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training rows held out to measure on; rows with the same prompt stay together."""
    max_length: Annotated[int, Field(ge=8), BeforeValidator(whole)] = 1024
    """Longest example, in tokens."""
    packing: bool = False
    """Put several examples in one row, none of which sees another."""
    shuffle: bool = True
    """Rows in an order of the seed, another one in each epoch; false: as they stand, source after source."""
    streaming: bool = False
    """Read rows while training, a part at a time, instead of all of them before; needs `train.max_steps`."""
    shuffle_buffer: Count = 10_000
    """With `streaming`: rows in memory at a time, among which the order is random; a large one mixes better."""
    replay: Replay | None = None
    """Rows of an earlier run to train on as well, against forgetting."""
    train_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that carry loss; auto chooses by format."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to an example longer than `max_length`."""
    chat: bool | Literal["auto"] = "auto"
    """Completion and alpaca rows as turns of user and assistant; auto: where the model has a chat template."""
    separator: str = ""
    """Text behind a prompt of completion rows that stay bare text and that does not end in white space; "\\n", say."""
    chat_template: Text | None = None
    """A Jinja template or its file; null: the tokenizer's own."""
    chat_template_kwargs: TemplateKwargs = {}
    """Variables of the chat template, such as `{enable_thinking: false}`; `enable_thinking: auto` is by row."""
    system: str | None = None
    """System message of conversations that have none."""
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    """What the assistant thinks before it answers: keep trains on it, mask only shows it, drop leaves it out."""
    retrieve: Retrieve | None = None
    """Passages to be looked for and put into the prompts; null: none."""
    cache: bool | Literal["auto"] = "auto"
    """Keep the rows as tokens on the disk, to be read from there row by row; auto: where their files have 32 MB."""
    workers: Literal["auto"] | Count = "auto"
    """Processes that read rows which are kept so; auto: one for each core, 16 at most."""


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
                    {"type": "string", "pattern": r"^\d+(\.\d+)?([kKmMbB]| ?[kmgKMG]i?[bB])$|^auto$"},
                ]
            }
        ),
    ] = 8
    """What may live at the end: average rank (8), share of the start (0.5), parameters (2M), bytes (200kB), or auto."""

    elastic: bool = False
    """Each step trains a first part of all components, of a length drawn anew, so that any first part is an adapter."""

    def parsed_budget(self) -> Budget:
        """The budget as its kind and value."""
        return parse_budget(self.budget)


class Pruning(Section):
    """Which components go, and when; times are shares of all optimizer steps."""

    policy: Annotated[str, PlugIn("policies", refuse=_only_after_training)] = "fisher"
    """What scores the components: a file name in dynlora_cli/pruning/policies."""
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

    objective: Annotated[str, PlugIn("objectives")] = plugins.OBJECTIVE
    """What is learned from the rows: sft from right answers, dpo and orpo from two of which one is better, kto from
    answers that are good or bad, context-distillation to answer without a text as with it."""
    epochs: Count | Literal["auto"] = "auto"
    """Passes over the training rows; auto: two, one where that makes 1,000 steps, up to four where two make fewer than
    75. Where that is more than one, the adapter is the best of those that were measured."""
    max_steps: Count | None = None
    """Optimizer steps; where set, it decides instead of `epochs`."""
    micro_batch_size: Count = 8
    """Examples per forward pass and device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Highest learning rate, before `pruning.lr_coupling` raises it; auto: a guess from model, components and steps,
    checked by the first of them, and with a short warm-up trials around it, the best of which becomes the run."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of all optimizer steps over which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0), BeforeValidator(whole)] | None = None
    """The same as a number of optimizer steps; where set, it decides instead of `warmup_ratio`."""
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
    ddp_timeout: Count = 1800
    """Of several processes: seconds that one waits for the others; then the run ends, and says which one is silent."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """8bit: moments in a quarter of the memory; paged: in memory that moves to the host where the GPU is full."""
    log_steps: Count = 10
    """Optimizer steps between log lines."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints; null: every 10 minutes and at each evaluation."""
    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], OneAlone()] = []
    """Trackers that also receive the metrics; one alone may be just a word."""


class Also(Section):
    """Held-out rows of another kind, such as what the model could do before."""

    name: Text
    """What it is called in tables."""
    path: PathText
    """A file, a folder or a hub data set; all of its rows are for measuring."""
    format: Annotated[str, PlugIn("formats", also=("auto",))] = "auto"
    """How a row becomes an example; auto: as in training where that fits, else by the columns."""
    split: Text = "train"
    """Split of a hub data set."""
    config: Text | None = None
    """Configuration of a hub data set."""
    columns: dict[str, Text] = {}
    """Our field name to the data's column."""
    ignore: Annotated[list[Text], OneAlone()] = []
    """Columns to leave aside though they say how rows are to be learned."""
    rows: Count = 256
    """Rows at most; the same ones each time, chosen by a hash of their text."""

    @property
    def source(self) -> Source:
        """The same as a source of rows."""
        same = {key: getattr(self, key) for key in ("path", "format", "split", "columns", "ignore")}
        return Source(name=self.config, **same)


def _names_differ(sets: list[Also]) -> list[Also]:
    names = [one.name for one in sets]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"two sets are called {show(twice[0])}; give each a name of its own")
    return sets


class Eval(Section):
    """Measuring while training."""

    steps: Count | None = None
    """Optimizer steps between evaluations; null: 8 of them, evenly over the run, or fewer, so that they take at most
    about an eighth of its time, but one an epoch. The start and the end are always measured."""
    max_samples: Count | None = None
    """Held-out examples used at most; null: all."""
    samples: Annotated[int, Field(ge=0), BeforeValidator(whole)] = 2
    """Held-out prompts whose answers are shown, at most 64 tokens of each: at the start, after each epoch and at the
    end, with `eval.steps` at each evaluation. 0: none."""
    early_stopping_patience: Count | None = None
    """Evaluations without a lower held-out loss after which training stops; null: never."""
    also: Annotated[list[Also], AfterValidator(_names_differ)] | None = None
    """Other rows, measured before and after: what is forgotten; null: rows of the earlier runs that this one goes on
    from or replays; []: none."""


class Settings(Section):
    """All sections, each of them valid; whether they go together, a `Recipe` checks as well (config/recipe.py)."""

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
