"""What recipe, source and row say of how conversations are written, put into their neutral forms."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dynlora_cli.config.types import RESERVED_KWARGS, text_for_a_truth
from dynlora_cli.data.forms import BadRowError, Form, Grounded, Judged, Pair, Preference, Told, Turns
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Dataset, Source

COLUMN = "chat_template_kwargs"  # of a row, over what the recipe says
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Ways:
    """How the conversations of one source are written.

    Args:
        kwargs: variables of the chat template.
        system: the system message of those that have none.
        reasoning: keep, mask or drop.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    reasoning: str = "keep"

    @classmethod
    def of(cls, dataset: Dataset, source: Source) -> Ways:
        """As a recipe says, and one of its sources over it."""
        kwargs = {**dataset.chat_template_kwargs, **source.chat_template_kwargs}
        return cls(kwargs, dataset.system if source.system is None else source.system, dataset.reasoning)

    def applied(self, form: Form, row: Mapping[str, Any]) -> Form:
        """A row that is written so, if it is a conversation; any other as it is.

        Raises:
            BadRowError: its own variables are no object.
        """
        told = Told({**self.kwargs, **own_kwargs(row)}, self.reasoning)
        if isinstance(form, Grounded):
            said = self.applied(form.said, row)
            assert isinstance(said, (Turns, Pair))
            return replace(form, said=said)
        if isinstance(form, Turns):
            opens = self._opening(form.messages)
            untrained = frozenset(number + len(opens) for number in form.untrained)
            return replace(form, messages=[*opens, *form.messages], untrained=untrained, told=told)
        if isinstance(form, (Preference, Judged)) and isinstance(form.prompt, list):
            return replace(form, prompt=[*self._opening(form.prompt), *form.prompt], told=told)
        return form

    def _opening(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        has_one = bool(messages) and messages[0].get("role") in _SYSTEM
        return [] if has_one or not self.system else [{"role": "system", "content": self.system}]


def own_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables that a row brings, as an object or its JSON.

    Raises:
        BadRowError: they are no object.
    """
    value = row.get(COLUMN)
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except ValueError:
            raise BadRowError(f"column {COLUMN!r} is text and not valid JSON") from None
    if not isinstance(value, (Mapping, type(None))):
        raise BadRowError(f"column {COLUMN!r} is of type {type(value).__name__}, expected an object")
    # Parquet fills variables that other rows have with null.
    found = {str(name): one for name, one in (value or {}).items() if one is not None}
    if taken := sorted(RESERVED_KWARGS & set(found)):
        raise BadRowError(f"column {COLUMN!r}: {taken[0]} is no variable of a template: it is set by dynlora")
    if said := text_for_a_truth(found):
        raise BadRowError(f"column {COLUMN!r}: {said}")
    return found


def variables_of(template: str) -> set[str]:
    """The variables that a chat template reads and does not make itself; a template that cannot be read has none."""
    from jinja2 import Environment, TemplateError, meta

    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text))
    except (TemplateError, RecursionError):
        return set()


def _all_variables(template: object) -> set[str]:
    texts = template.values() if isinstance(template, Mapping) else [template]
    return set().union(*(variables_of(str(text)) for text in texts))


def reads(template: object, name: str) -> bool:
    """Whether a chat template reads a variable."""
    return name in _all_variables(template)


def unread(template: object, names: Collection[str]) -> str:
    """A sentence about variables that a chat template never reads; empty where it reads all."""
    there = _all_variables(template)
    lost = sorted(set(names) - there)
    if not lost:
        return ""
    reads = sorted(there - RESERVED_KWARGS - {"raise_exception", "strftime_now", "bos_token", "eos_token"})
    near = did_you_mean(lost[0], reads)
    return f"the chat template never reads {', '.join(map(repr, lost))} of chat_template_kwargs{near}"
