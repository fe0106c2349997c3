"""How a model is spoken to: through a chat template or in bare text, on which date, and at which tokens it stops.

An adapter is asked in the form that its run learned from; the record says which. Where nobody says, there is a guess,
which `notes` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dynlora_cli import plugins
from dynlora_cli.data.chat.fit import Fit, resolved
from dynlora_cli.data.chat.mask import closing_of
from dynlora_cli.data.chat.template import Unwritten, Writing, on_date, write
from dynlora_cli.data.chat.ways import Ways, unread
from dynlora_cli.data.forms import BadRowError, Turns, refuse_half_characters
from dynlora_cli.data.vocabulary import sha256_of_text, tokenizer_sha256
from dynlora_cli.errors import UsageError
from dynlora_cli.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.sections import Model
    from dynlora_cli.data.encode import Encoder

Messages = Sequence[Mapping[str, Any]]
LONGEST = 1 << 30  # tokens; what is too long is refused with its numbers, and never cut


@dataclass(frozen=True)
class Voice:
    """How one adapter, or the base, is asked.

    Attributes:
        name: of the adapter, for messages.
        tokenizer: makes tokens of prompts and text of answers.
        encoder: of bare prompts, as in training.
        chat: prompts are turns of a conversation, written by the tokenizer's chat template.
        format: of the training rows, where bare prompts are wrapped by it (alpaca); else empty.
        separator: stands behind a bare prompt.
        moment: what the template takes for now.
        ends: tokens at which an answer ends.
        notes: what was chosen by guess, and what else a person should know.
        ways: variables of the template, the system message and the reasoning, as in training.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    chat: bool
    format: str
    separator: str
    moment: datetime
    ends: frozenset[int]
    notes: tuple[str, ...] = ()
    ways: Ways = field(default_factory=Ways)

    @cached_property
    def words(self) -> str:
        """What two tokenizers must agree in for one to read the tokens of the other."""
        return tokenizer_sha256(self.tokenizer)

    @property
    def form(self) -> tuple[object, ...]:
        """What two voices must agree in to be one: then the same words become the same tokens."""
        template = str(self.tokenizer.chat_template) if self.chat else ""
        moment = self.moment if "strftime_now" in template else None
        ways = json.dumps([dict(self.ways.kwargs), self.ways.system, self.ways.reasoning], sort_keys=True, default=str)
        return self.chat, template, moment, self.format, self.separator, self.ends, ways if self.chat else ""

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, but 64 at least: an adapter's own tokenizer may have longer ones."""
        return max(64, *map(len, self.tokenizer.get_vocab()))

    def refuse_endless(self, messages: Messages, context: int) -> None:
        """Refuse what no context can hold, at once: to make tokens of megabytes takes seconds.

        Raises:
            UsageError: it would be too long if all its tokens were the longest.
        """
        contents = [message.get("content") for message in messages]
        length = sum(len(content) for content in contents if isinstance(content, str))
        if length > 64 * context and length > self.longest * context:
            raise UsageError(
                f"the prompt has {length:,} characters, and the model's context {context:,} tokens, none of which has "
                f"more than {self.longest}: no room is left for an answer",
                "shorten it",
            )

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a text as it is, whatever the run learned from."""
        _refuse_halves(text)
        return tuple(self.encoder.prompt(text))

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Tokens of a prompt that is asked for its completion, as those of the run's rows were."""
        if self.format:
            row = {"instruction": prompt, "output": ""}
            prompt = plugins.load("formats", self.format).to_example(row, has_template=False).prompt
        elif not prompt[-1:].isspace():
            prompt += self.separator
        return self.text_ids(prompt)

    def chat_ids(
        self, messages: Messages, tools: list[Any] | None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[tuple[int, ...], list[str]]:
        """Tokens of a conversation up to where the assistant's answer begins, and notes.

        Args:
            messages, tools: as the format `chat` takes them.
            kwargs: variables of the chat template, over those of training.

        Raises:
            UsageError: it is none, or the template refuses it.
        """
        _refuse_halves([dict(message) for message in messages])
        try:
            row = {"messages": [dict(message) for message in messages], "tools": tools}
            ways = replace(self.ways, kwargs=resolved({**self.ways.kwargs, **(kwargs or {})}, None))
            read = ways.applied(plugins.load("formats", "chat").to_example(row, has_template=True), {})
            assert isinstance(read, Turns)
            fit, unwritten = Fit(self.tokenizer), Unwritten(self.tokenizer)
            with on_date(self.moment):
                turns = fit.wanted(read)
                said = turns.told.kwargs
                text = write(self.tokenizer, turns.messages, turns.tools, said, answer=True)
                unwritten.look(turns, write(self.tokenizer, turns.messages, turns.tools, said))
        except BadRowError as error:
            raise UsageError(f"{self.name}: {error}") from None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        lost = unwritten.fields()
        notes = [f"{self.name}: the chat template leaves out {', '.join(lost)}"] if lost else []
        notes += [f"{self.name}: {remark}" for remark in (*turns.remarks, *fit.remarks)]
        if kwargs and (note := unread(str(self.tokenizer.get_chat_template(None, turns.tools)), kwargs)):
            notes.append(f"{self.name}: {note}")
        return tuple(ids), notes


def voice_of(
    name: str, adapter: Adapter | None, tokenizer: PreTrainedTokenizerBase, options: Model, base_ends: set[int]
) -> Voice:
    """How an adapter is asked, or the base where there is none.

    Args:
        name: for messages.
        adapter: its record says how its run wrote rows.
        tokenizer: saved with it, or the base's.
        options: of the base; its task says whether there are conversations at all.
        base_ends: where the base stops of itself.
    """
    task = tasks.of(options)
    record = adapter.record if adapter else {}
    writing, notes = Writing.of(record), list[str]()
    dataset = (record.get("recipe") or {}).get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    data = record.get("data") or {}
    known = bool(dataset) or "turned" in data  # what a hypernetwork wrote has no recipe, but says how rows were written
    chat = Turns.__name__ in task.forms and bool(tokenizer.chat_template)
    if chat and known:
        chat = _learned_turns(name, record, writing, notes)
    elif adapter is not None and not known:
        how = "through the tokenizer's chat template" if chat else "in bare text, as there is no chat template"
        notes.append(f"{name} does not say how it was trained to be asked; it is asked {how}")
    if chat and (other := _other_template(record, tokenizer)):
        notes.append(f"{name}: {other}")
    ends = base_ends | {int(end) for end in [tokenizer.eos_token_id] if end is not None}
    if chat:
        ends |= _closing_ends(tokenizer)
    separator = dataset.get("separator", data.get("separator"))
    return Voice(
        name=name,
        tokenizer=tokenizer,
        encoder=task.encoder(tokenizer, "auto", LONGEST),
        chat=chat,
        format="" if chat else _wrapping(dataset, writing),
        separator=separator if isinstance(separator, str) and not chat else "",
        moment=writing.moment,
        ends=frozenset(ends),
        notes=tuple(notes),
        ways=Ways(writing.template_kwargs, writing.system, writing.reasoning),
    )


def _learned_turns(name: str, record: Mapping[str, Any], writing: Writing, notes: list[str]) -> bool:
    """Whether a run of a model with a chat template learned from conversations."""
    if not record.get("chat_template_sha256"):
        notes.append(f"{name} was trained without a chat template, so it is asked in bare text")
        return False
    if "date" not in (record.get("data") or {}):  # version 0.1 did not say which formats there were
        return True
    turns = any(writing.turned.values())
    if turns and not all(writing.turned.values()):
        notes.append(f"{name} learned from conversations and from bare text; it is asked through its chat template")
    return turns


def _other_template(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """That the chat template in use is not that of training, if so."""
    then = record.get("chat_template_sha256")
    if not then or then == sha256_of_text(str(tokenizer.chat_template)):
        return ""
    return "the chat template in use is another than in training, by its hash"


def _closing_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token with which the chat template ends a turn of the assistant, if it does."""
    try:
        closing = closing_of(tokenizer)
    except BadRowError:  # a template that knows no such turn: it says so when it is asked
        return set()
    special = {*tokenizer.all_special_ids}
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(closing, add_special_tokens=False, verbose=False)["input_ids"] if closing else []
    return set([token for token in ids if token in special][:1])


def _wrapping(dataset: Mapping[str, Any], writing: Writing) -> str:
    """The format that wraps a bare prompt, where all rows of a run were of it."""
    sources = dataset.get("train")
    formats = (
        [source.get("format") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    )
    named = bool(formats) and all(form == "alpaca" for form in formats)
    return "alpaca" if named or set(writing.turned) == {"alpaca"} else ""


def _refuse_halves(value: Any) -> None:
    try:
        refuse_half_characters(value)
    except BadRowError as error:
        raise UsageError(f"the prompt: {error}") from None
