"""A Modelfile for Ollama, with a template only where it is proven to say what the tokenizer's own template says.

Ollama's templates are Go's, a tokenizer's are Jinja's; nothing translates the one into the other. So a few families
are described here once, as the text around each role's message. Both a Python renderer and the Go template come from
that description, and a family is taken only if the renderer gives, character by character, what the tokenizer's
template gives for several conversations.

Reference: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.chat.template import Writing, on_date, write
from dynlora_cli.data.chat.ways import reads
from dynlora_cli.export.gguf.vocabulary import added_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """A way to write a conversation as one text. `{eos}` stands for the tokenizer's eos token.

    Args:
        name: for people.
        around: the text before and behind a message, by role; a role that is missing cannot be said.
        generation: the text that asks for an answer.
    """

    name: str
    around: Mapping[str, tuple[str, str]]
    generation: str

    def render(self, messages: Sequence[Message], eos: str) -> str:
        """The prompt as Ollama's engine makes it of `go`, without a bos token."""
        text = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return (text + self.generation).replace("{eos}", eos)

    def go(self, eos: str, bos: str) -> str:
        """The same in Go's template language. Ollama joins neighbours of one role before it renders."""
        turns = ""
        for index, (role, (before, behind)) in enumerate(self.around.items()):
            test = "else if" if index else "if"
            turns += f'{{{{ {test} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
        loop = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}"
        return (bos + loop + self.generation).replace("{eos}", eos)


def _same(name: str, before: str, behind: str, generation: str) -> Family:
    """A family that treats all roles alike; `{role}` stands for their names."""
    around = {role: (before.replace("{role}", role), behind) for role in ("system", "user", "assistant")}
    return Family(name, around, generation)


FAMILIES = (
    _same("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    _same(
        "Llama 3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    _same("Zephyr", "<|{role}|>\n", "{eos}\n", "<|assistant|>\n"),
    _same("role tokens", "<|{role}|>", "{eos}", "<|assistant|>"),
    Family("Mistral", {"user": ("[INST] ", " [/INST]"), "assistant": (" ", "{eos}")}, ""),
    Family("Mistral 0.1", {"user": ("[INST] ", " [/INST]"), "assistant": ("", "{eos} ")}, ""),
    Family("Mixtral", {"user": ("[INST] ", " [/INST]"), "assistant": ("", "{eos}")}, ""),
    Family("Mistral 0.3", {"user": ("[INST] ", "[/INST]"), "assistant": (" ", "{eos}")}, ""),
)  # fmt: skip

_USER = {"role": "user", "content": "How many legs has a spider?"}
_TURNS = [_USER, {"role": "assistant", "content": "Eight."}, {"role": "user", "content": "And\n\nan ant, or <b>?"}]
_SYSTEM = {"role": "system", "content": "Be brief."}
_MARK = "\x00"
# What a template may do to contents and Ollama's cannot; the note says what to do about it.
_SPECIAL_CASES = {
    "the tokenizer's template strips spaces around a message, which Ollama's cannot: send none": [
        {"role": "user", "content": "  two spaces on both sides  "}
    ],
    "the tokenizer's template takes the thinking out of earlier answers, which Ollama's cannot: send answers without": [
        _USER, {"role": "assistant", "content": "<think>\nA spider.\n</think>\n\nEight."}, _USER
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """A family that says what a tokenizer's chat template says.

    Args:
        family: of the template.
        bos: the bos token's text where Ollama's template must spell it out, else empty.
        system: the system message that the tokenizer's template puts into a conversation without one, or None.
        notes: conversations for which they differ after all.
    """

    family: Family
    bos: str
    system: str | None
    notes: list[str]


def modelfile(
    gguf_name: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Mapping[str, Any],
    writing: Writing | None = None,
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and lines for people about what it does not say.

    Args:
        gguf_name: of the model's file, in the Modelfile's folder.
        tokenizer: of the model, with or without a chat template.
        generation_config: content of generation_config.json; its `eos_token_id` tells where an answer ends.
        writing: how the rows of training were written, where that is known.

    Raises:
        UsageError: the tokenizer adds tokens to a text that are neither bos nor eos.
    """
    writing = writing or Writing()
    moment = writing.moment
    lines, notes = [f"FROM ./{gguf_name}"], []
    stops = _ends(tokenizer, generation_config)
    with on_date(moment):
        match = match_template(tokenizer)
    if not tokenizer.chat_template or writing.is_bare:
        lines.append(f"TEMPLATE {_quoted('{{ .Prompt }}')}")
        if writing.is_bare:
            notes.append("the TEMPLATE is the bare prompt, as the rows of training were, not the model's chat template")
    elif match is None:
        notes.append(f"no TEMPLATE: {_why_not(tokenizer)}; Ollama may guess one, so write your own and compare")
    else:
        eos = tokenizer.eos_token or ""
        lines.append(f"TEMPLATE {_quoted(match.family.go(eos, match.bos))}")
        system = match.system if writing.system is None or "system" not in match.family.around else writing.system
        lines += [] if system is None else [f"SYSTEM {_quoted(system)}"]
        if match.system is not None and "strftime_now" in str(tokenizer.chat_template):
            notes.append(f"the tokenizer's template writes the date; SYSTEM says {moment:%Y-%m-%d}, as in training")
        end = match.family.around["assistant"][1].replace("{eos}", eos).strip()
        stops += [end] if end not in stops and end in tokenizer.get_vocab() else []
        notes += match.notes
        if reads(tokenizer.chat_template, "tools"):
            notes.append("the TEMPLATE writes no tools, as the tokenizer's does: Ollama refuses requests with tools")
    if writing.template_kwargs:
        named = ", ".join(map(repr, writing.template_kwargs))
        notes.append(f"training set {named} of the chat template, and the TEMPLATE is the one without: compare answers")
    if added_ids(tokenizer)[1]:
        notes.append("the tokenizer puts eos behind every text, so Ollama does behind every prompt")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n", notes


def match_template(tokenizer: PreTrainedTokenizerBase) -> Match | None:
    """The family whose prompts are those of a tokenizer's chat template; None: there is none, or no template.

    Ollama puts the bos token before a prompt where the GGUF file says so, as it does if the tokenizer adds it to a
    text. Then it may not stand in Ollama's template as well, and the tokenizer's template must have it.
    """
    if not tokenizer.chat_template:
        return None
    adds_bos, bos = added_ids(tokenizer)[0], tokenizer.bos_token or ""
    for family in FAMILIES:
        for before in [bos] if adds_bos else ["", bos]:
            match = _match(tokenizer, family, before)
            if match is not None:
                return Match(family, "" if adds_bos else before, match.system, match.notes)
    return None


def _why_not(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why no family is a match."""
    for family in FAMILIES:
        if _match(tokenizer, family, "") is not None:
            return (
                f"the tokenizer's chat template is {family.name} and puts no bos token before a conversation, "
                "and Ollama puts one, as the tokenizer does before any other text"
            )
    return f"the tokenizer's chat template is none of {', '.join(known.name for known in FAMILIES)}"


def _match(tokenizer: PreTrainedTokenizerBase, family: Family, bos: str) -> Match | None:
    """A match if every conversation is rendered alike, character by character."""
    system = _default_system(tokenizer, family, bos)

    def same(messages: list[Message]) -> bool:
        given = messages if system is None else [{"role": "system", "content": system}, *messages]
        ours = bos + family.render(given, tokenizer.eos_token or "")
        return _render(tokenizer, messages) == ours

    if not same([_USER]) or not same(_TURNS):
        return None
    notes = [note for note, messages in _SPECIAL_CASES.items() if not same(messages)]
    if "system" not in family.around:
        notes.append("the TEMPLATE leaves system messages out: put instructions into the user's first message")
        return Match(family, bos, None, notes)
    with_system = ([_SYSTEM, _USER], [_SYSTEM, *_TURNS])
    ours = [bos + family.render(messages, tokenizer.eos_token or "") for messages in with_system]
    return Match(family, bos, system, notes) if [_render(tokenizer, m) for m in with_system] == ours else None


def _default_system(tokenizer: PreTrainedTokenizerBase, family: Family, bos: str) -> str | None:
    """The system message of a prompt that was made without one."""
    if "system" not in family.around:
        return None
    marked = family.render([{"role": "system", "content": _MARK}, _USER], tokenizer.eos_token or "")
    before, _, behind = (bos + marked).partition(_MARK)
    text = _render(tokenizer, [_USER]) or ""
    if text.startswith(before) and text.endswith(behind) and len(text) > len(before) + len(behind):
        return text[len(before) : len(text) - len(behind)]
    return None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The prompt of the tokenizer's own template; None where it refuses the conversation."""
    try:
        return write(tokenizer, list(messages), None, answer=True)
    except ValueError:
        return None  # as Mistral's does for a system message, and several templates without a default for everything


def _ends(tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that end a generation."""
    ends = generation_config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    texts = [str(tokenizer.convert_ids_to_tokens(index)) for index in ids if index is not None]
    return list(dict.fromkeys(texts))


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
