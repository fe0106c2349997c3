"""Whether numbers of several adapters compare: one base, one task, the same rows, the same chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from dynlora_cli.adapters.base import find_base
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.options import Options
from dynlora_cli.evaluation.rows import Rows, own_table
from dynlora_cli.models.load import resolve_dtype
from dynlora_cli.models.place import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.data.examples import Example


ONE_BASE = "evaluate them one by one; only numbers on one base compare"


def one_base(adapters: Sequence[Adapter], options: Options) -> Place:
    """The base model that all adapters share.

    Raises:
        UsageError: they do not, or its weights are stored otherwise, or they are for different tasks or classes.
    """
    places = [find_base(adapter, options.base, options.trust_remote_code) for adapter in adapters]
    first = places[0]
    for adapter, place in zip(adapters, places, strict=True):
        if place.folder != first.folder:
            raise UsageError(
                f"the adapters belong to different base models: {adapters[0].folder} to {first.folder}, "
                f"{adapter.folder} to {place.folder}",
                ONE_BASE,
            )
        if adapter.record and (differing := stored_otherwise(first, place)):
            raise UsageError(
                f"{adapters[0].folder} and {adapter.folder} were not trained on the same base model: {differing}",
                ONE_BASE,
            )
        if (adapter.task, place.labels) != (adapters[0].task, first.labels):
            raise UsageError(
                f"{adapters[0].folder} and {adapter.folder} do not answer the same question: "
                f"{_question(adapters[0], first)} and {_question(adapter, place)}",
                "evaluate them one by one",
            )
    return first


def stored_otherwise(one: Place, other: Place) -> str:
    """How the weights of two bases are stored differently in memory, as a sentence; empty if they are not.

    Another tool's adapter does not say how its base was stored, so it may be measured on any.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first, second = _stored(one, device), _stored(other, device)
    keys = [key for key in first if second.get(key, first[key]) != first[key]]
    return ", ".join(f"{key} is {first[key]} for the first and {second[key]} for the second" for key in keys)


def _stored(place: Place, device: torch.device) -> dict[str, str]:
    options = place.options
    names = ["load_in_4bit", "load_in_8bit"]
    if options.load_in_4bit:
        names += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]
    dtype = str(resolve_dtype(options.dtype, device)).removeprefix("torch.")
    return {"model.dtype": dtype} | {f"model.{name}": str(getattr(options, name)).lower() for name in names}


def _question(adapter: Adapter, place: Place) -> str:
    return f"{adapter.task} ({', '.join(place.labels)})" if place.labels else adapter.task


def strangers(
    adapters: Sequence[Adapter], names: Sequence[str], rows: Rows, read_as: Callable[[Writing], Rows], *, own: bool
) -> list[str]:
    """A note for each adapter that was trained on other rows than the run whose held-out rows these are.

    Args:
        read_as: reads these rows as another run would: on another day, pairs as turns.
        own: they are the first adapter's own, of which `held_out_rows` has said what there is to say.
    """
    if rows.is_file or not rows.examples:
        return []
    mine, notes = Writing.of(adapters[0].record), []
    for name, adapter in list(zip(names, adapters, strict=True))[int(own) :]:
        then, writing = (adapter.record.get("data") or {}).get("sha256"), Writing.of(adapter.record)
        if then != rows.sha256 and not (then and writing != mine and then == read_as(writing).sha256):
            notes.append(f"{name} was trained on other rows, or rows read otherwise: some may have been among them")
    return notes


def base_has_rows(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    place: Place,
    examples: Sequence[Example],
    pad: int,
    notes: list[str],
) -> bool:
    """Whether the base's table has a row for every token of these rows; a note where only the adapters' own have.

    Raises:
        UsageError: the table of an adapter, its own or the base's, has not.
    """
    table = place.files.table_rows
    texts = [ids for example in examples for ids in example.texts]
    needed = 1 + max((max(ids, default=0) for ids in texts), default=0)
    needed = max(needed, pad + 1) if examples else 0
    if table is None or needed <= table:
        return True
    hold = f"these texts hold tokens up to number {needed - 1}"
    for name, adapter in zip(names, adapters, strict=True):
        if (rows_there := own_table(adapter, place) or table) < needed:
            raise UsageError(f"{name}: its table of tokens has {rows_there} rows, and {hold}", ONE_BASE)
    notes.append(
        f"the base model is left out: its table has {table} rows, and {hold}; the adapter brings a larger table"
    )
    return False


def compare_templates(
    adapters: Sequence[Adapter], names: Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Rows, allowed: bool
) -> list[str]:
    """Refuse conversations that are written otherwise than in training; gives notes where that cannot be known.

    Raises:
        UsageError: the template in use is another one than an adapter was trained with.
    """
    if not rows.in_turns:
        return []
    now = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    notes = []
    for name, adapter in zip(names, adapters, strict=True):
        then = adapter.record.get("chat_template_sha256")
        if not adapter.record:
            notes.append(f"{name} does not say which chat template it was trained with; the tokenizer's own is used")
        elif then != now:
            trained = f"was trained with {then[:12]}" if then else "was trained without one"
            text = f"the chat template in use has the hash {now[:12]}, and {name} {trained}"
            if not allowed:
                raise UsageError(
                    text, "use the adapter's own tokenizer files and recipe, or add --allow-template-mismatch"
                )
            notes.append(text)
    return notes
