"""Two answers to a prompt, of which one is preferred.

What it does
    For `train.objective: dpo` and `orpo`; for `kto` each pair is taken as one good and one bad answer. Prompts and
    answers that are bare text become turns where the model has a chat template (`dataset.chat`). Rows without a prompt
    have it where the two answers begin alike: the messages that they share, or the letters.

When to use it
    For sets of compared answers, such as UltraFeedback, Orca DPO pairs or HH-RLHF.

Columns
    `chosen`, `rejected`: two texts, two lists of messages, or two messages, in the roles of OpenAI or ShareGPT. The
    prompt: `prompt`, text or messages; or `question`, or `instruction` with `input`, or `conversations`, as others call
    it. OpenAI's `input`, `preferred_output` and `non_preferred_output` are named by `columns`. Optional `system`, and
    `tools` or `functions` for conversations.

Reference
    TRL's preference format, https://huggingface.co/docs/trl/dataset_formats; Rafailov et al., Direct Preference
    Optimization, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.data.forms import BadRowError, Preference, Turns, optional_text, text_of

COLUMNS = "chosen, rejected [prompt, question, instruction, input, conversations, system, tools, functions]"
FORMS = ("Preference",)
PRECEDENCE = 0

_ASKS = ("prompt", "question", "instruction", "conversations")  # the first that is there is the prompt


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as compared answers."""
    return {"chosen", "rejected"} <= columns


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Preference:
    """The prompt of a row and its two answers.

    Args:
        row: the row, columns already renamed.
        has_template: whether prompts and answers that are bare text become turns; lists of messages need it.

    Raises:
        BadRowError: an answer is missing or of another kind than the other one, or there is no template for messages.
    """
    name = next((name for name in _ASKS if row.get(name) not in (None, "", [])), "prompt")
    prompt = row.get(name)
    if isinstance(prompt, Mapping) and isinstance(prompt.get("messages"), list):  # OpenAI's `input`
        row = {**{key: prompt[key] for key in ("tools", "functions") if prompt.get(key)}, **row}
        prompt = prompt["messages"]
    chosen, rejected = (_answer(row, column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise BadRowError("'chosen' and 'rejected' must both be texts, or both lists of messages")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _texts(row, name, chosen, rejected, has_template)
    return _conversation(row, prompt, _said(chosen), _said(rejected), has_template)


def _answer(row: Mapping[str, Any], column: str) -> str | list[Any]:
    """A text, or messages; a single message is a list of one."""
    value = row.get(column)
    if isinstance(value, Mapping):
        return [value]
    if value == "":
        return ""
    return value if isinstance(value, list) else text_of(row, column)


def _said(answer: str | list[Any]) -> list[Any]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _texts(row: Mapping[str, Any], name: str, chosen: str, rejected: str, has_template: bool) -> Preference:
    """Two texts, and a prompt that is one or is what they share."""
    system = optional_text(row, "system")
    if row.get(name) in (None, ""):
        if system:
            raise BadRowError("there is a 'system' and no prompt; name its column, as `columns: {prompt: ...}`")
        prompt, chosen, rejected = _common(chosen, rejected)
        return Preference(prompt, chosen, rejected)
    prompt = text_of(row, name)
    if name == "instruction" and (context := optional_text(row, "input")):
        prompt = f"{prompt}\n\n{context}"
    again = "" not in (chosen, rejected) and chosen.startswith(prompt) and rejected.startswith(prompt)
    remarks = (f"chosen and rejected answers begin with their {name!r} again, and are taken as they are",) * again
    if not has_template:
        if system:
            raise BadRowError("a 'system' needs a chat template; set dataset.chat_template, and no dataset.chat: false")
        return Preference(prompt, chosen, rejected, remarks=remarks)
    opening = [{"role": "system", "content": system}] if system else []
    asked = [*opening, {"role": "user", "content": prompt}]
    return Preference(asked, _said(chosen), _said(rejected), remarks=remarks)


def _common(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What two texts share at their beginning, as TRL's `extract_prompt` has it, and the rest of each.

    The space before the first difference belongs to the answers, and each of them keeps a letter at least.
    """
    shortest = min(len(chosen), len(rejected))
    end = next((at for at in range(shortest) if chosen[at] != rejected[at]), max(0, shortest - 1))
    if end and end < shortest and chosen[end] != rejected[end] and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _conversation(
    row: Mapping[str, Any], prompt: Any, chosen: list[Any], rejected: list[Any], has_template: bool
) -> Preference:
    """Messages, with a prompt of its own or at the beginning of both answers."""
    if not has_template:
        raise BadRowError(
            "'prompt', 'chosen' or 'rejected' are lists of messages, which need a chat template; "
            "set dataset.chat_template, and no dataset.chat: false"
        )
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt or []
    remarks: tuple[str, ...] = ()
    if asked and (whole := _repeats(asked, chosen, rejected)):
        remarks = whole
        asked = []
    better, worse = _turns(row, [*asked, *chosen]), _turns(row, [*asked, *rejected])
    if asked:
        end = len(better.messages) - len(chosen)
    else:
        shortest = min(len(better.messages), len(worse.messages))
        pairs = zip(better.messages, worse.messages, strict=False)
        end = next((at for at, (one, other) in enumerate(pairs) if one != other), shortest - 1)
    if not end:
        named = "; if it is in 'messages', write `columns: {prompt: messages}` beside the path" * ("messages" in row)
        raise BadRowError(
            f"'chosen' and 'rejected' share no message, so nothing is asked; is there no 'prompt'?{named}"
        )
    answers = better.messages[end:], worse.messages[end:]
    return Preference(better.messages[:end], *answers, tools=better.tools, remarks=remarks + better.remarks)


def _repeats(asked: Sequence[Any], chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[str, ...]:
    """A remark where the answers hold the whole conversation, prompt included; empty where they do not."""
    first = chosen[0] if chosen else None
    opens = isinstance(first, Mapping) and str(first.get("role") or first.get("from")).lower() in ("user", "human")
    again = list(chosen[: len(asked)]) == list(asked) and list(rejected[: len(asked)]) == list(asked)
    system = isinstance(first, Mapping) and (first.get("role") or first.get("from")) == "system"
    if not (again or ((opens or system) and chosen[:1] == rejected[:1])):
        return ()
    return ("chosen and rejected hold whole conversations: the prompt is what they share, and 'prompt' is not read",)


def _turns(row: Mapping[str, Any], messages: list[Any]) -> Turns:
    """Messages as templates take them.

    Raises:
        BadRowError: they cannot be read, or some are marked not to train.
    """
    read = {key: row[key] for key in ("system", "tools", "functions") if key in row}
    turns: Turns = plugins.load("formats", "chat").to_example({"messages": messages, **read}, has_template=True)
    if turns.untrained:
        raise BadRowError("a message is marked not to train; of compared answers all is learned from")
    return turns
