"""What a key of a recipe may hold: kinds of text and number, names of plug-ins, and the strict section."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, core_schema

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names
from dynlora_cli.text import show


def whole(value: object) -> object:
    """1e3 and 8.0 are whole numbers too. From 2^53 on, nothing is counted: torch takes no number beyond 2^63."""
    if isinstance(value, int | float) and 2**53 <= value < float("inf"):
        raise ValueError(f"got {show(value)}, must be a whole number below 2^53")
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class NotForeign:
    """Refuses a free text that other tools use for something which has another name here."""

    key: str

    def __call__(self, value: Any) -> Any:
        hint = foreign_names.value_hint(self.key, value)
        if hint:
            raise ValueError(f"got {show(value)}; {hint}")
        return value


# What the call takes that has a template rendered, and what is said for each conversation.
RESERVED_KWARGS = frozenset({
    "messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "self",
})  # fmt: skip


def text_for_a_truth(kwargs: Mapping[str, Any]) -> str:
    """A sentence about a variable that is the text 'false', which a template takes for true; empty where none is."""
    for name, value in kwargs.items():
        if isinstance(value, str) and value.strip().casefold() in ("true", "false"):
            truth = value.strip().lower()
            return f"{name} is the text {value!r}, which templates do not take for {truth}: leave the quotes out"
    return ""


def _template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses variables that are set for every conversation, and values that no JSON holds."""
    if said := text_for_a_truth(value):
        raise ValueError(said)
    if taken := sorted(RESERVED_KWARGS & set(value)):
        raise ValueError(f"{taken[0]} is no variable to be set here: dynlora says it for each conversation")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"got {show(value)}, must hold what JSON can: text, numbers, true, false, lists") from None
    return value


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_template_kwargs)]


def path_text(value: str) -> str:
    """Refuses what no path can be: another character than a file system takes, or the home of a user unknown here."""
    if "\0" in value:
        raise ValueError(f"got {show(value)}, which no path can be: it holds a character of number 0")
    if value.startswith("~") and not Path(value).exists():
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"got {show(value)}, but this machine has no such user; write the path out") from None
    return value


def at_home(value: str) -> str:
    """~ is the home folder, and ~name that of another user."""
    return str(Path(path_text(value)).expanduser()) if value.startswith("~") else path_text(value)


@dataclass(frozen=True)
class PlugIn:
    """A text that must be the name of a plug-in, or one of `also`; `refuse` says why a plug-in is no choice here."""

    kind: str
    also: tuple[str, ...] = ()
    refuse: Callable[[str], str | None] = lambda name: None  # noqa: ARG005

    def choices(self) -> list[str]:
        plug_ins = [name for name in plugins.names(self.kind) if not self.refuse(name)]
        return list(dict.fromkeys([*self.also, *plug_ins]))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "enum": self.choices()}

    def __call__(self, value: str) -> str:
        if value in plugins.names(self.kind) and (reason := self.refuse(value)):
            raise ValueError(f"got {value}, {reason}")
        if value not in self.choices():
            *most, last = map(repr, self.choices())
            allowed = f"{', '.join(most)} or {last}" if most else last
            raise PydanticCustomError("choice", "Input should be {allowed}", {"allowed": allowed})  # as of a Literal
        return value


class OneAlone:
    """A list of words, of which one alone may be written without brackets."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(
            lambda value: [value] if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        several = handler(core)
        return {"anyOf": [several, several["items"]]}


def part(value: object) -> object:
    """A share that is neither nothing nor all, also as `5%`."""
    number = value
    if isinstance(value, str) and (percent := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?%", value)):
        number = float(percent[1]) / 100
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1:
        raise ValueError(f"got {show(value)}, must be a share above 0 and below 1, such as 5% or 0.05")
    return number


# What `part` takes, for a schema.
PART = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "string", "pattern": r"^(\d+(\.\d+)?|\.\d+) ?%$"},
    ]
}
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(path_text)]  # where it is used, ~ is the home folder
HomePath = Annotated[Text, AfterValidator(at_home)]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Frozen and strict: unknown keys, wrong types and NaN are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
