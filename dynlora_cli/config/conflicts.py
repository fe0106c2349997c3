"""Which settings, each valid alone, do not go together.

What concerns all recipes stands here. What concerns one plug-in stands in its file, as a literal that is read without
importing it:

    CONFLICTS = [
        {"with": "train.compile", "why": "compiled blocks keep their inputs", "hint": "set one of the two to false"},
        {"with": "adapter.variant", "is_not": "lora", "why": "variant lora alone is recorded"},
    ]

with          a setting that the plug-in does not go with, where it is on: true, a number but 0, a text
is, is_not    only with this value, or any of a list; with any other
contains      only with a text in which this stands
while         further settings and their values, all of which must hold as well
at            the setting that the message names; `with` where it is left out
why, hint     the message: the reason, and what to do
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dynlora_cli import plugins
from dynlora_cli.config.adapter_section import LIBRARY_ROWS
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.config.options import misdeclared, options
from dynlora_cli.config.sections import Settings
from dynlora_cli.config.stream_conflicts import stream_conflicts
from dynlora_cli.config.variant_conflicts import Conflict, variant_conflicts
from dynlora_cli.files.foreign import first_fault


class Rule(BaseModel):
    """One entry of a plug-in's CONFLICTS."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    with_: Annotated[str, Field(alias="with")]
    is_: Annotated[Any, Field(alias="is")] = None
    is_not: Any = None
    contains: str | None = None
    while_: Annotated[dict[str, Any], Field(alias="while")] = {}
    at: str | None = None
    why: str
    hint: str | None = None

    @property
    def text(self) -> str:
        return f"{self.why}; {self.hint}" if self.hint else self.why

    def broken(self, recipe: Settings) -> bool:
        """Whether a recipe, in which the plug-in is chosen, breaks this rule.

        Raises:
            AttributeError: the rule names a setting that does not exist.
        """
        met = all(_value(recipe, key) in _any_of(values) for key, values in self.while_.items())
        value = _value(recipe, self.with_)
        if "is_" in self.model_fields_set:
            return met and value in _any_of(self.is_)
        if "is_not" in self.model_fields_set:
            return met and value not in _any_of(self.is_not)
        return met and (self.contains in (value or "") if self.contains else bool(value))


def _value(recipe: Settings, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


def _any_of(values: Any) -> Any:
    return values if isinstance(values, (list, tuple)) else [values]


@cache
def _reader() -> TypeAdapter[list[Rule]]:
    return TypeAdapter(list[Rule])


def rules(kind: str, name: str) -> list[Rule]:
    """The CONFLICTS of a plug-in; most have none.

    Raises:
        UsageError: its declaration is wrong; the message is for whoever wrote the plug-in.
    """
    try:
        return _reader().validate_python(plugins.declared(kind, name, "CONFLICTS", []))
    except ValidationError as error:
        raise misdeclared(kind, name, "CONFLICTS", first_fault(error)) from None


def conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Settings, each valid alone, that do not go together."""
    model, data, rank, pruning = recipe.model, recipe.dataset, recipe.rank, recipe.pruning
    if model.load_in_4bit and model.load_in_8bit:
        yield Conflict("model.load_in_8bit", "model.load_in_4bit", "4 and 8 bits exclude each other; set one to false")
    yield from _declared_conflicts(recipe, "variants")
    yield from variant_conflicts(recipe)
    yield from _token_conflicts(recipe)
    yield from _library_rows_conflicts(recipe)
    yield from _mode_conflicts(recipe)
    if model.num_labels is not None and not plugins.declared("tasks", model.task, "HAS_CLASSES"):
        yield Conflict("model.num_labels", "model.task", "only `model.task: sequence-classification` has labels")
    if data.packing and not plugins.declared("tasks", model.task, "PACKS"):
        yield Conflict("dataset.packing", "model.task", f"packing does not go with {model.task}")
    if data.chat is True and "Turns" not in plugins.declared("tasks", model.task, "FORMS", ()):
        yield Conflict("dataset.chat", "model.task", f"{model.task} knows no turns; leave it at auto")
    if data.reasoning == "mask" and recipe.train.objective != plugins.OBJECTIVE:
        text = f"{recipe.train.objective} compares whole answers, thoughts and all; keep or drop the reasoning"
        yield Conflict("dataset.reasoning", "train.objective", text)
    if data.reasoning == "mask" and data.train_on == "all":
        yield Conflict("dataset.reasoning", "dataset.train_on", "`all` has loss on every token, thoughts as well")
    if data.packing and not data.shuffle:
        text = "packing puts rows together by their lengths, which leaves no order; set one of the two to its default"
        yield Conflict("dataset.shuffle", "dataset.packing", text)
    if data.replay and data.replay.origin is None and recipe.adapter.origin is None:
        text = "of which run? write `from: FOLDER` under it, or name one as `adapter.from`"
        yield Conflict("dataset.replay.from", "adapter.from", text)
    yield from stream_conflicts(recipe)
    yield from _retrieve_conflicts(recipe)
    of_task = list(_declared_conflicts(recipe, "tasks"))
    of_data = [conflict for conflict in of_task if conflict.key.startswith(("model.", "dataset."))]
    yield from of_data
    if not data.val and not data.val_size:
        for key in ("steps", "early_stopping_patience"):
            if getattr(recipe.eval, key) is not None:
                yield Conflict(f"eval.{key}", "dataset.val_size", "needs `dataset.val`, or `dataset.val_size` above 0")
    yield from _origin_conflicts(recipe)
    yield from _start_conflicts(recipe, [conflict for conflict in of_task if conflict not in of_data])
    yield from _elastic_conflicts(recipe)
    yield from _rounding_conflicts(recipe)
    budget = rank.parsed_budget()
    counts_from_start = recipe.adapter.init_weights == "pissa" or getattr(recipe.adapter, "start", "") == "orthogonal"
    saved = 2 if counts_from_start else 1  # rank of a component in the files
    short = isinstance(rank.init, int) and budget.kind == "rank" and saved * rank.init < budget.value
    if short and recipe.adapter.origin is None:  # whose components may be more than rank.init
        yield Conflict(
            "rank.init", "rank.budget", f"got {rank.init}, below the budget {budget.value}; pruning only removes"
        )
    if budget.kind == "bytes":
        yield from _bytes_conflicts(recipe)
    if pruning.tolerance is not None and budget.kind != "auto":
        yield Conflict("pruning.tolerance", "rank.budget", "only `rank.budget: auto` measures what its events add")
    start, end = recipe.pruning_window
    if start >= end:
        yield Conflict("pruning.end", "pruning.start", f"got {end}, must be above `pruning.start` ({start})")
    yield from _declared_conflicts(recipe, "policies")
    yield from _declared_conflicts(recipe, "objectives")


def _declared_conflicts(recipe: Settings, kind: str) -> Iterator[Conflict]:
    """What the chosen plug-in of a kind says that it does not go with."""
    section, key = plugins.CHOSEN[kind]
    name = getattr(getattr(recipe, section), key, plugins.OBJECTIVE)
    if name in plugins.names(kind):
        yield from _broken(recipe, kind, name, f"{section}.{key}")


def _mode_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What the modes that are on say that they do not go with, and keys of modes that are off."""
    for name in sorted(plugins.names("modes"), key=lambda name: plugins.declared("modes", name, "ORDER", 100)):
        switch = plugins.switch(name)
        if getattr(recipe.train, switch):
            yield from _broken(recipe, "modes", name, f"train.{switch}")
            continue
        for key, option in options("modes", name).items():
            if key != switch and getattr(recipe.train, key) != option.default:
                yield Conflict(f"train.{key}", f"train.{switch}", f"only mode {name} has a use for it, and it is off")


def _broken(recipe: Settings, kind: str, name: str, own_key: str) -> Iterator[Conflict]:
    """Those of a plug-in's rules that the recipe breaks."""
    for rule in rules(kind, name):
        try:
            broken = rule.broken(recipe)
        except AttributeError as error:
            raise misdeclared(kind, name, "CONFLICTS", f"recipes have no such key: {error}") from None
        if broken:
            key = rule.at or rule.with_
            yield Conflict(key, rule.with_ if key == own_key else own_key, rule.text)


def _token_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What new tokens do not go with."""
    adapter, variant = recipe.adapter, recipe.adapter.variant
    if not adapter.new_tokens:
        if adapter.new_tokens_init != "mean":
            yield Conflict("adapter.new_tokens_init", "adapter.new_tokens", "there are none; name them there")
        return
    key, by_itself = "adapter.new_tokens", "add them to the base's tokenizer and table beforehand, or leave them out"
    if not plugins.declared("tasks", recipe.model.task, "NEW_TOKENS"):
        text = f"{recipe.model.task} has no rows of single tokens; {by_itself}"
        yield Conflict(key, "model.task", text)
    if not plugins.declared("variants", variant, "has_components"):
        yield Conflict(key, "adapter.variant", f"variant {variant} has no adapter to keep their rows in; {by_itself}")
    elif (form := plugins.declared("variants", variant, "saved_as")) not in (None, "lora", "dora"):
        text = f"PEFT has no rows of single tokens beside a {form}; write `variant: lora`, or leave them out"
        yield Conflict(key, "adapter.variant", text)
    for mode, why in (("shard_base", "a table in parts"), ("cuda_graphs", "a recorded pass")):
        if getattr(recipe.train, mode, False):
            yield Conflict(key, f"train.{mode}", f"{why} has no rows of single tokens yet; set it to false")
    objective = getattr(recipe.train, "objective", plugins.OBJECTIVE)
    if plugins.declared("objectives", objective, "FORMS"):  # those compare answers with a model's that starts alike
        text = f"{objective} compares with a start whose rows of them mean nothing yet; train on texts with them first"
        yield Conflict(key, "train.objective", text)


def _library_rows_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What does not go with the rows that the adapters of a library were trained on."""
    data = recipe.dataset
    if not any(source.path == LIBRARY_ROWS for source in data.train):
        return
    if recipe.adapter.library is None:
        yield Conflict("dataset.train", "adapter.library", f"{LIBRARY_ROWS} stands for rows of adapters named there")
    if len(data.train) > 1:
        yield Conflict("dataset.train", "adapter.library", f"{LIBRARY_ROWS} stands alone; leave the other sources out")
    for key, field in type(data).model_fields.items():
        if key not in ("train", "packing", "shuffle", "cache", "workers") and getattr(data, key) != field.default:
            text = f"the rows of {LIBRARY_ROWS} are read, and held out, as their own runs did; leave it out"
            yield Conflict(f"dataset.{key}", "dataset.train", text)


def _elastic_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What does not go with components in an order of their own."""
    adapter = recipe.adapter
    if not recipe.rank.elastic:
        return
    if adapter.variant != "lora":
        in_order = {"dylora": "is elastic already", "t-lora": "has an order of its own"}
        is_so = in_order.get(adapter.variant, "has components without an order")
        yield Conflict("rank.elastic", "adapter.variant", f"variant {adapter.variant} {is_so}; write `elastic: false`")
    if adapter.origin is not None:
        text = "old components stand before new ones, whatever they are worth; leave one of the two out"
        yield Conflict("rank.elastic", "adapter.from", text)
    if adapter.init_weights == "pissa":
        text = "PiSSA's start is subtracted whole, so a part of it is no adapter; write `init_weights: default`"
        yield Conflict("adapter.init_weights", "rank.elastic", text)


def _rounding_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What cannot be saved in fewer bits."""
    adapter, key = recipe.adapter, "adapter.save_dtype"
    if adapter.save_dtype == FULL:
        return
    afterwards = f"save it in float32, then `dynlora export --to peft --dtype {adapter.save_dtype}`"
    if not plugins.declared("variants", adapter.variant, "rounds"):
        has = plugins.declared("variants", adapter.variant, "has_components") and adapter.variant != "vera"
        text = "trains numbers that its factors are made of" if has else "has no factors of its own to round"
        hint = f"; {afterwards}" if has else "; leave it out"
        yield Conflict(key, "adapter.variant", f"variant {adapter.variant} {text}{hint}")
    if adapter.init_weights == "pissa":
        yield Conflict(key, "adapter.init_weights", f"a component and PiSSA's start are saved together; {afterwards}")
    if adapter.old != "tune":
        text = "old components stay as they are, and rounding changes them; write `old: tune`, or leave it out"
        yield Conflict(key, "adapter.old", text)
    if recipe.rank.elastic:
        yield Conflict(key, "rank.elastic", f"elastic components are made of what trains; {afterwards}")


def _bytes_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Adapters whose files have other sizes than their components say."""
    adapter, hint = (
        recipe.adapter,
        "write an average rank, or parameters (2M), and `dynlora prune --budget 200kB` after",
    )
    if not plugins.declared("variants", adapter.variant, "rounds"):
        text = f"a file of variant {adapter.variant} is not as large as what it trains; {hint}"
        yield Conflict("rank.budget", "adapter.variant", text)
    if adapter.names_experts:
        text = f"PEFT fills the experts of a block up to one rank, so bytes are not known before the end; {hint}"
        yield Conflict("rank.budget", "adapter.target_modules", text)


def _origin_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What does not go with components that are there already, or with none."""
    adapter = recipe.adapter
    if adapter.origin is None and adapter.variant != "lora":  # variant_conflicts.py says so of these
        return
    if adapter.origin is None:
        if adapter.old != "tune":
            yield Conflict("adapter.old", "adapter.from", "there are none; name their adapter in `adapter.from`")
        if adapter.orthogonality:
            text = "there are no old components to be orthogonal to; name their adapter in `adapter.from`"
            yield Conflict("adapter.orthogonality", "adapter.from", text)
        if adapter.init_weights == "inflora":
            text = "inflora begins beside old components; name their adapter in `adapter.from`, or choose another start"
            yield Conflict("adapter.init_weights", "adapter.from", text)
        return
    if adapter.variant != "lora":
        text = f"variant {adapter.variant} cannot begin with components of a LoRA; write `variant: lora`"
        yield Conflict("adapter.variant", "adapter.from", text)
    if adapter.old == "magnitudes" and adapter.freeze_a:
        text = "the magnitudes of old components are kept in A; write `old: freeze`, or leave freeze_a out"
        yield Conflict("adapter.freeze_a", "adapter.old", text)
    if adapter.init_weights in ("pissa", "loftq"):
        text = f"{adapter.init_weights} is a start from the base alone; write `default`, `orthogonal` or `eva`"
        yield Conflict("adapter.init_weights", "adapter.from", text)
    if adapter.orthogonality and adapter.freeze_a:
        text = "the penalty turns A, which does not train; set one of the two to 0 or false"
        yield Conflict("adapter.orthogonality", "adapter.freeze_a", text)
    if adapter.init_weights == "inflora" and not adapter.freeze_a:
        text = "inflora keeps A as it begins, or new components would hear earlier rows again; write `freeze_a: true`"
        yield Conflict("adapter.freeze_a", "adapter.init_weights", text)
    if recipe.rank.allocation != "uniform":
        text = "the layers have components already, which say where they are needed; write `allocation: uniform`"
        yield Conflict("rank.allocation", "adapter.from", text)


def _retrieve_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What passages in prompts do not go with."""
    retrieve, task = recipe.dataset.retrieve, recipe.model.task
    if retrieve is None:
        return
    if "Pair" not in plugins.declared("tasks", task, "FORMS", ()):
        yield Conflict("dataset.retrieve", "model.task", f"passages are put into prompts, and {task} has none")
    if retrieve.retriever == "bm25" and retrieve.encoder != "minilm":
        yield Conflict(
            "dataset.retrieve.encoder", "dataset.retrieve.retriever", "bm25 has no encoder; write `retriever: dense`"
        )
    if retrieve.encoder == "base":
        text = "rows are read before the base is there; write minilm, or the folder of an encoder"
        yield Conflict("dataset.retrieve.encoder", "model.name_or_path", text)


def _start_conflicts(recipe: Settings, of_task: list[Conflict]) -> Iterator[Conflict]:
    """Starts that the variant, the layers, the task (what it says itself is given) or the base do not allow."""
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
    yield from of_task
    if start not in ("default", *(plugins.declared("variants", variant, "starts") or ())):
        text = f"variant {variant} does not start as {start}; write `init_weights: default`, or `variant: lora`"
        yield Conflict("adapter.init_weights", "adapter.variant", text)
    elif start == "loftq" and not recipe.model.load_in_4bit:
        text = "loftq makes up for what 4 bits lose; set `model.load_in_4bit: true`, or choose another start"
        yield Conflict("adapter.init_weights", "model.load_in_4bit", text)
