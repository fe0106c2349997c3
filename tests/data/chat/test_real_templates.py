"""The loss of conversations under the templates of published models, against two references that do not use our code.

What a server asks: the prompt that transformers renders for a turn, and the trained text behind it, are the
conversation up to that turn. What TRL trains on: its templates with {% generation %} blocks, of which a server writes
the beginning itself.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from data_helpers import FIXTURES, byte_tokenizer, dataset, task_named

from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError

trl = pytest.importorskip("trl")
THEIRS, OURS = Path(trl.__file__).parent / "chat_templates", FIXTURES / "chat_templates"
_MARKS = re.compile(r"<[|｜][^<>\s]{1,30}[|｜]>|<(?:start|end)_of_turn>|<\|?turn\|?>|\[/?[A-Z_]{4,}\]")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "which"}},
                "required": ["city"],
            },
        },
    }
]
ASK = {"role": "user", "content": "Weather in Paris?"}
ARGUMENTS = json.dumps({"city": "Paris"})
FUNCTION = {"name": "weather", "arguments": ARGUMENTS}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_abcdef", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "tool_call_id": "call_abcdef", "name": "weather", "content": "18 C"}
ANSWER = {"role": "assistant", "content": "It is 18 C."}
HM = {"reasoning_content": "hmm"}


def tokenizer_of(name: str) -> Any:
    path = next(path for path in (THEIRS / f"{name}.jinja", OURS / f"{name}.jinja") if path.is_file())
    tokenizer = byte_tokenizer(path.read_text("utf-8"))
    marks = sorted(set(_MARKS.findall(str(tokenizer.chat_template))))
    tokenizer.add_tokens([mark for mark in marks if mark not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def read(tmp_path: Path, tokenizer: Any, messages: list[Any], tools: Any = None, **settings: Any) -> Data:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n", "utf-8")
    return load_data(dataset(path, max_length=8192, **settings), tokenizer, task=task_named(), seed=0)


def trained(data: Data, tokenizer: Any) -> list[str]:
    return [text for row in data.train for text, in_loss in show_example(row, tokenizer) if in_loss]


# -- tools ------------------------------------------------------------------------------------------------------------

FORMS = {  # as people read them on the models' cards
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "hermes3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "llama3_1": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "llama3_2": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "mistral_nemo": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "call00001"}]</s>',
    "gptoss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
    "qwen3_6": (
        "\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>"
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["tools", "tools as text"])
def test_calls_have_the_form_of_their_model(tmp_path: Path, name: str, tools: Any) -> None:
    tokenizer = tokenizer_of(name)
    data = read(tmp_path, tokenizer, [ASK, CALL, RESULT, ANSWER], tools)
    call, answer = trained(data, tokenizer)
    assert call == FORMS[name]
    assert "It is 18 C." in answer
    text = "".join(piece for piece, _ in show_example(data.train[0], tokenizer))
    assert "Weather of a city" in text
    assert "18 C" in text.partition(call)[2]
    assert not any("leaves out" in note for note in data.notes)


def test_call_and_result_as_sharegpt_has_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    turns = [
        ("human", "Weather in Paris?"),
        ("function_call", json.dumps({"name": "weather", "arguments": {"city": "Paris"}})),
    ]
    turns += [("observation", "18 C"), ("gpt", "It is 18 C.")]
    path = tmp_path / "rows.json"
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps(TOOLS)}
    path.write_text(json.dumps([row]))
    data = load_data(dataset(path, max_length=8192), tokenizer, task=task_named(), seed=0)
    assert data.train[0].input_ids == read(tmp_path, tokenizer, [ASK, CALL, RESULT, ANSWER], TOOLS).train[0].input_ids


def test_several_calls_at_once_are_written_or_refused(tmp_path: Path) -> None:
    both = CALL | {"tool_calls": [CALL["tool_calls"][0], {"id": "b", "type": "function", "function": FUNCTION}]}
    talk = [ASK, both, RESULT, RESULT | {"tool_call_id": "b"}, ANSWER]
    assert trained(read(tmp_path, (one := tokenizer_of("qwen3")), talk, TOOLS), one)[0].count("<tool_call>") == 2
    with pytest.raises(DataError, match="only supports single tool-calls"):
        read(tmp_path, tokenizer_of("llama3_1"), talk, TOOLS)
    with pytest.raises(DataError, match="fewer calls of 'weather' in one turn than the row has"):
        read(tmp_path, tokenizer_of("gptoss"), talk, TOOLS)


def test_a_developer_is_the_system_where_the_template_knows_no_other(tmp_path: Path) -> None:
    told = {"role": "developer", "content": "Be brief."}
    for name, renamed in (("qwen3", True), ("gptoss", False)):
        tokenizer = tokenizer_of(name)
        data = read(tmp_path, tokenizer, [told, ASK, ANSWER])
        assert "Be brief." in show_example(data.train[0], tokenizer)[0][0]
        assert any("does not know the role developer" in note for note in data.notes) == renamed


def test_an_empty_list_of_calls_is_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama3_1")
    assert trained(read(tmp_path, tokenizer, [ASK, ANSWER | {"tool_calls": []}]), tokenizer) == [
        "It is 18 C.<|eot_id|>"
    ]


def test_a_result_among_the_words_beside_its_call_is_refused(tmp_path: Path) -> None:
    talk = [ASK, CALL | {"content": "Let me look."}, RESULT, ANSWER]
    with pytest.raises(DataError, match="message 2: the chat template writes the result of its call among"):
        read(tmp_path, tokenizer_of("gemma4_v5"), talk, TOOLS)
    read(tmp_path, tokenizer_of("gemma4_v5"), [ASK, CALL, RESULT, ANSWER], TOOLS)
    read(tmp_path, tokenizer_of("qwen3"), talk, TOOLS)


def test_templates_for_talk_with_tools_and_without(tmp_path: Path) -> None:
    """Hermes has two: transformers takes `tool_use` for rows with tools."""
    plain = tokenizer_of("qwen2_5").chat_template
    tokenizer = tokenizer_of("hermes3")
    tokenizer.chat_template = {"default": plain, "tool_use": str(tokenizer.chat_template)}
    assert trained(read(tmp_path, tokenizer, [ASK, CALL, RESULT, ANSWER], TOOLS), tokenizer)[0] == FORMS["hermes3"]
    assert trained(read(tmp_path, tokenizer, [ASK, ANSWER]), tokenizer) == ["It is 18 C.<|im_end|>"]


# -- what a server asks, and what TRL trains on -----------------------------------------------------------------------

TALKS = {
    "one": [ASK, ANSWER],
    "one with thoughts": [ASK, ANSWER | HM],
    "two": [ASK, ANSWER, ASK, ANSWER],
    "two with thoughts": [ASK, ANSWER | HM, ASK, ANSWER | HM],
    "tools": [ASK, CALL, RESULT, ANSWER],
    "tools with thoughts": [ASK, CALL | HM, RESULT, ANSWER | HM],
}
# Templates that read a field of reasoning, templates that read none, and what the latter cannot write.
THINKS = ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "gptoss", "glm4moe", "nemotron_3_nano"]
NOTHING = ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2", "llama3", "phi3", "gemma3", "hermes3", "lfm2_v2"]
NOTHING += ["mistral_nemo"]
REFUSED = {
    "tools": ("llama3", "phi3", "gemma3"),
    "tools with thoughts": ("llama3", "phi3", "gemma3", "llama3_1", "llama3_2", "mistral_nemo", "hermes3"),
    **dict.fromkeys(("one", "two", "one with thoughts", "two with thoughts"), ("hermes3",)),
}
# Its prompts open a thought, and turns without one are written with an empty one.
UNLIKE = {(name, talk) for name in ("nemotron_3_nano",) for talk in ("one", "two", "tools")}
CASES = [(name, talk) for name in THINKS + NOTHING for talk in TALKS if name not in REFUSED.get(talk, ())]


def as_templates_want(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Written out by hand: arguments as objects, ids of nine letters, thoughts where the template has them."""
    done = []
    for message in messages:
        message = {"content": "", **{key: value for key, value in message.items() if value is not None}}
        if "tool_calls" in message:
            function = {"name": "weather", "arguments": json.loads(ARGUMENTS)}
            message["tool_calls"] = [{"id": "call00001", "type": "function", "function": function}]
        if "tool_call_id" in message:
            message["tool_call_id"] = "call00001"
        if "reasoning_content" in message and name == "gptoss":
            message["thinking"] = message.pop("reasoning_content")
        elif "reasoning_content" in message and name in NOTHING:
            said, block = message["content"], f"<think>\n{message.pop('reasoning_content')}\n</think>"
            message["content"] = f"{block}\n\n{said}" if said else block
        done.append(message)
    return done


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_what_is_trained_is_what_a_server_asks_for(tmp_path: Path, name: str, talk: str) -> None:
    """A row up to its last answer is the very prompt that transformers renders for one of the turns."""
    tokenizer, tools = tokenizer_of(name), TOOLS if talk.startswith("tools") else None
    data = read(tmp_path, tokenizer, TALKS[talk], tools)
    if (name, talk) in UNLIKE:
        assert any("the model is asked in another form than it learns from" in note for note in data.notes)
        return
    messages = as_templates_want(TALKS[talk], name)
    asked = [
        str(
            tokenizer.apply_chat_template(
                messages[:end], tools=tools, tokenize=False, add_generation_prompt=True
            )
        )
        for end in range(1, len(messages))
        if messages[end]["role"] == "assistant"
    ]  # fmt: skip
    prompts = []
    for row in data.train:
        pieces = show_example(row, tokenizer)
        last = max(number for number, (_, in_loss) in enumerate(pieces) if in_loss)
        prompts.append("".join(text for text, _ in pieces[:last]))
    shows_more_than_it_keeps = (name, talk) == ("hermes3", "tools")  # a newline behind the last result
    assert set(prompts) <= set(asked) or shows_more_than_it_keeps
    assert len(trained(data, tokenizer)) == len(asked)


@pytest.mark.parametrize(("talk", "name"), [(talk, name) for talk, names in REFUSED.items() for name in names])
def test_what_a_template_cannot_write_is_refused_with_the_row(tmp_path: Path, talk: str, name: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*the chat template"):
        read(tmp_path, tokenizer_of(name), TALKS[talk], TOOLS if talk.startswith("tools") else None)


@pytest.mark.parametrize(
    ("name", "talk"),
    [
        (name, talk)
        for name, talk in CASES
        if (THEIRS / f"{name}_training.jinja").is_file() and (name, talk) not in UNLIKE and name != "glm4moe"
    ],
)
def test_trl_trains_on_the_same(tmp_path: Path, name: str, talk: str) -> None:
    """TRL's blocks hold the same words. Some begin with what the generation prompt has, and end with a newline more.

    Compared where its template writes the text that the model's does: it keeps thoughts that the model's leaves out. It
    ends GLM's turns with the mark of the next one.
    """
    tokenizer, tools = tokenizer_of(name), TOOLS if talk.startswith("tools") else None
    data, messages = read(tmp_path, tokenizer, TALKS[talk], tools), as_templates_want(TALKS[talk], name)
    other = tokenizer_of(name)
    other.chat_template = (THEIRS / f"{name}_training.jinja").read_text("utf-8")
    coded = other.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    whole = "".join(text for text, _ in show_example(data.train[0], tokenizer)).removesuffix("</s>")
    if len(data.train) > 1 or not other.decode(coded["input_ids"]).startswith(whole):
        pytest.skip("its template writes another text than the model's")
    pairs = zip(coded["input_ids"], coded["assistant_masks"], strict=True)
    groups = groupby(pairs, lambda pair: pair[1])
    blocks = [other.decode([token for token, _ in group]) for in_loss, group in groups if in_loss]
    blocks = [text.removesuffix("</s>").rstrip("\n") for text in blocks]
    prompt = str(tokenizer.apply_chat_template([ASK], tools=tools, tokenize=False, add_generation_prompt=True))
    found = [text.removesuffix("</s>").rstrip("\n") for text in trained(data, tokenizer)]
    assert len(found) == len(blocks)
    for ours, theirs in zip(found, blocks, strict=True):
        assert theirs.endswith(ours)
        assert prompt.endswith(theirs.removesuffix(ours))
