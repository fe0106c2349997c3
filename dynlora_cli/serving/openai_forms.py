"""Requests as OpenAI's clients send them, checked: nothing that would change the answer is ignored.

    read        a body as one of the forms below, or a Refusal that names the field
    UNHEARD     fields that are known and not supported, each with the values at which it says nothing
    HARMLESS    fields that change no answer; they are taken and not used
    sampling    how to write, as `dynlora generate` takes it

`top_k`, `min_p` and `repetition_penalty` stand beside OpenAI's own fields, as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynlora_cli.config.types import TemplateKwargs
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.serving.refusals import Refusal
from dynlora_cli.text import did_you_mean

CHAT_TOKENS, TEXT_TOKENS = 256, 16  # where nobody says how many: as `dynlora generate`, and as OpenAI
MOST_TOKENS = 1 << 20
MOST_STOPS, LONGEST_STOP = 16, 200
MOST_CHOICES = 128
HARMLESS = {
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
UNHEARD: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_Form = TypeVar("_Form", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # a defence of OpenAI's, for an answer that is read on its way


class _Asked(_Strict):
    """What both kinds of requests have."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with how many tokens it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def new_tokens(self) -> int:
        return self.max_tokens or TEXT_TOKENS

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The tools that may be called."""
        return ()

    @property
    def more(self) -> dict[str, Any]:
        """What else the engine is told."""
        return {}


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    refusal: None = None  # as it stands in answers, which clients send back

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        calls = self.role == "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning)
        if self.content is None and not calls:
            raise ValueError("content is missing")
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """As a chat template takes it."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)
        keys = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "name")
        more = {key: value for key in keys if (value := getattr(self, key))}
        return {"role": "system" if self.role == "developer" else self.role, "content": text} | more


class Function(BaseModel):
    """A tool's name and what belongs to it, which goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(min_length=1, max_length=200)]


class Tool(_Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class ChatBody(_Asked):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def tool_names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.tools or () if self.tool_choice != "none")

    @property
    def more(self) -> dict[str, Any]:
        tools = [tool.model_dump(exclude_unset=True) for tool in self.tools or () if self.tool_choice != "none"]
        found: dict[str, Any] = {"tools": tools, "kwargs": self.chat_template_kwargs}
        return {name: value for name, value in found.items() if value}

    @property
    def new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or CHAT_TOKENS

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [message.turn for message in self.messages]


class CompletionBody(_Asked):
    """`/v1/completions`: texts that are written on, as they are."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class LoadBody(_Strict):
    """`/v1/load_lora_adapter`, as vLLM has it."""

    lora_name: str = ""
    lora_path: str = ""


class UnloadBody(_Strict):
    """`/v1/unload_lora_adapter`, as vLLM has it; the number, which only vLLM knows, is taken and not used."""

    lora_name: str = ""
    lora_int_id: int | None = None


def read(form: type[_Form], body: bytes) -> _Form:
    """A body, checked.

    Raises:
        Refusal: it is no JSON, or a field is missing, wrong, unknown or not supported; the message names the first.
    """
    try:
        data = json.loads(body)
    except RecursionError:
        raise Refusal(400, "the JSON lies too deep inside itself") from None
    except ValueError as error:  # not UTF-8, no JSON, a number of thousands of digits
        raise Refusal(400, f"the body is no JSON: {str(error).partition(';')[0]}") from None
    if not isinstance(data, dict):
        raise Refusal(400, "the body is no JSON object")
    if issubclass(form, _Asked):
        data = _heard(data)
        _refuse_unheard(data, form)
    try:
        read = form.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error, form, data) from None
    if isinstance(read, _Asked):
        _check_stops(read.stops)
    return read


def _heard(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: `null` says nothing, as with OpenAI."""
    return {name: value for name, value in data.items() if value is not None and name not in HARMLESS}


def _refuse_unheard(data: dict[str, Any], form: type[BaseModel]) -> None:
    """Refuse what is known and not supported, and leave out where it says nothing.

    Raises:
        Refusal: a field would change the answer.
    """
    for name in [name for name in data if name in UNHEARD and name not in form.model_fields]:
        value = data.pop(name)
        if not any(value == silent and type(value) in (type(silent), float) for silent in UNHEARD[name]):
            raise Refusal(
                400,
                f"{name} is not supported by this server, and to ignore it would change the answer: leave it out",
                code="unsupported_parameter",
                param=name,
            )


def _first_fault(error: ValidationError, form: type[BaseModel], data: Any) -> Refusal:
    faults = error.errors(include_url=False, include_input=False)
    # A value that may be one of several things has a fault as each of them: the one that looks deepest knows most.
    fault = max((each for each in faults if each["loc"][:1] == faults[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    where = _path(fault["loc"], data)
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])[:100]
        near = did_you_mean(name, list(form.model_fields)) if len(fault["loc"]) == 1 else ""
        return Refusal(400, f"unknown field {name!r}{near}", code="unknown_parameter", param=where[:200])
    if fault["type"] == "missing":
        return Refusal(400, f"{where} is missing", code="missing_required_parameter", param=where)
    return Refusal(400, f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}", code="invalid_value", param=where)


def _path(steps: tuple[int | str, ...], data: Any) -> str:
    """Where in the data a fault lies; pydantic's own names for the members of a union are no part of it."""
    found = []
    for number, step in enumerate(steps):
        there = (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int))
        if there:
            data = data[step]
        if there or number == len(steps) - 1:
            found.append(str(step))
    if len(found) > 1 and not there and ("[" in found[-1] or found[-1] in ("str", "bool", "int", "float")):
        found.pop()
    return ".".join(found)


def _check_stops(stops: tuple[str, ...]) -> None:
    if any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise Refusal(400, f"stop: texts of 1 to {LONGEST_STOP} characters", code="invalid_value", param="stop")


def sampling(asked: ChatBody | CompletionBody, choice: int = 0) -> Sampling:
    """How to write: greedy where nobody asks for chance, as every command here.

    Args:
        asked: the request.
        choice: the number of this answer, of `n`; each has a seed of its own, one above that of the choice before.
    """
    greedy = asked.temperature == 0  # then there is nothing to shape
    top_k = 0 if asked.top_k == -1 else asked.top_k  # both mean all tokens, -1 in vLLM
    return Sampling.of(
        temperature=asked.temperature,
        top_p=None if greedy else asked.top_p,
        top_k=None if greedy else top_k,
        min_p=None if greedy else asked.min_p,
        max_new_tokens=asked.new_tokens,
        repetition_penalty=asked.repetition_penalty,
        seed=None if asked.seed is None else (asked.seed + choice) % (1 << 63),
        stop_strings=asked.stops,
    )
