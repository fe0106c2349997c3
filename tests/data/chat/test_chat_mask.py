"""The loss of a conversation: what the assistant said and its end-of-turn token, under templates of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
from data_helpers import (
    BARE,
    CHATML,
    FIXTURES,
    LLAMA3,
    MISTRAL,
    ROLE_TOKENS,
    THINKING,
    byte_tokenizer,
    dataset,
    source,
    task_named,
)
from data_helpers import space_tokenizer as make_space_tokenizer

from dynlora_cli.data.chat.fit import Fit
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.formats.chat import to_example
from dynlora_cli.data.forms import BadRowError, Turns
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import DataError

THOUGHT = "<think>\nhmm\n</think>\n\n"
TALK = [
    {"role": "user", "content": "what is a fox"},
    {"role": "assistant", "content": THOUGHT + "a quick brown fox"},
    {"role": "user", "content": "and a dog"},
    {"role": "assistant", "content": "the lazy dog 🐕"},
]


def trained(tmp_path: Path, messages: list[dict[str, Any]], template: str | None, **settings: Any) -> list[str]:
    """The pieces of a conversation that are in the loss."""
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    tokenizer = settings.pop("tokenizer", None) or byte_tokenizer(template)
    data = load_data(dataset(path, **settings), tokenizer, task=task_named(), seed=0)
    return [text for row in data.train for text, in_loss in show_example(row, tokenizer) if in_loss]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [THOUGHT + "a quick brown fox<|im_end|>", "the lazy dog 🐕<|im_end|>"]),
        (LLAMA3, [THOUGHT + "a quick brown fox<|eot|>", "the lazy dog 🐕<|eot|>"]),
        (MISTRAL, [" " + THOUGHT + "a quick brown fox</s>", " the lazy dog 🐕</s>"]),
        (ROLE_TOKENS, [THOUGHT + "a quick brown fox</s>", "the lazy dog 🐕</s>"]),
        (THINKING, [THOUGHT + "a quick brown fox<|im_end|>", "<think>\n\n</think>\n\nthe lazy dog 🐕<|im_end|>"]),
    ],
    ids=["chatml", "llama3", "mistral", "role tokens", "drops old thinking: two rows"],
)
def test_every_assistant_turn_and_its_end_token_are_trained(tmp_path: Path, template: str, expected: list[str]) -> None:
    assert trained(tmp_path, TALK, template) == expected


def test_completion_trains_on_the_last_turn_only(tmp_path: Path) -> None:
    assert trained(tmp_path, TALK, CHATML, train_on="completion") == ["the lazy dog 🐕<|im_end|>"]


def test_all_trains_on_the_whole_text(tmp_path: Path) -> None:
    (text,) = trained(tmp_path, TALK, CHATML, train_on="all")
    assert text.startswith("<|im_start|>user\nwhat is a fox")
    assert text.endswith("🐕<|im_end|>\n")


def test_stripped_white_space_is_no_fault(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "\n the cat \n"}]
    assert trained(tmp_path, talk, LLAMA3) == ["the cat<|eot|>"]


def test_a_question_that_repeats_the_answer_is_not_trained(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the cat"}]
    assert trained(tmp_path, [*talk, *talk], CHATML) == ["the cat<|im_end|>"] * 2


def test_an_assistant_that_begins(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "the mat"}, {"role": "user", "content": "a fox"}]
    assert trained(tmp_path, talk, CHATML) == ["the mat<|im_end|>"]


def test_system_message_and_tool_calls(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.name }}{% endfor %}"
    )
    talk = [
        {"role": "system", "content": "think"},
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "jump"}]},
        {"role": "tool", "content": "over"},
        {"role": "assistant", "content": "the dog"},
    ]
    assert trained(tmp_path, talk, template) == ["!jump<|im_end|>", "the dog<|im_end|>"]


def test_sharegpt_rows_keep_their_system_and_train_on_calls(tmp_path: Path) -> None:
    """As LLaMA-Factory writes them: `tools` is text, and a call is a turn of its own."""
    template = CHATML.replace("{% for m", "{% for t in tools or [] %}#{{ t.name }} {% endfor %}{% for m", 1)
    talk = [("human", "a fox"), ("function_call", "jump()"), ("observation", "over"), ("gpt", "the dog")]
    row = {"conversations": [{"from": role, "value": text} for role, text in talk], "system": "think"}
    row["tools"] = json.dumps([{"name": "jump"}])
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    tokenizer = byte_tokenizer(template)
    pieces = show_example(load_data(dataset(path), tokenizer, task=task_named(), seed=0).train[0], tokenizer)
    assert pieces[0][0].startswith("#jump <|im_start|>system\nthink<|im_end|>\n<|im_start|>user\na fox")
    assert [text for text, flag in pieces if flag] == ["jump()<|im_end|>", "the dog<|im_end|>"]


@pytest.mark.parametrize(
    ("column", "turns", "expected"),
    [("think", 0, ["think"]), ("", 0, []), (None, 0, []), ("think", 1, ["the cat"])],
)
def test_a_system_turn_is_put_first_where_there_is_none(column: str | None, turns: int, expected: list[str]) -> None:
    talk = [{"role": "system", "content": "the cat"}] * turns + TALK
    form = to_example({"messages": talk, "system": column}, has_template=True)
    assert [message["content"] for message in form.messages if message["role"] == "system"] == expected
    assert form.messages[len(expected) :] == TALK


def test_tools_that_are_no_json() -> None:
    with pytest.raises(BadRowError, match="'tools' is text and not valid JSON"):
        to_example({"messages": TALK, "tools": "jump"}, has_template=True)


def test_a_template_without_end_token_gets_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    tokenizer = byte_tokenizer(BARE)
    data = load_data(dataset(path), tokenizer, task=task_named(), seed=0)
    pieces = show_example(data.train[0], tokenizer)
    assert pieces[-1] == (" the lazy dog 🐕\n</s>", True)  # the space belongs to the answer's first token
    assert any("without a special token" in note for note in data.notes)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_hides_question_or_answer_is_refused(tmp_path: Path, role: str) -> None:
    template = "{% for m in messages %}{{ m.role }}{% if m.role != 'ROLE' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=f"leaves out what the {role} says"):
        trained(tmp_path, TALK, template.replace("ROLE", role))


def test_a_template_that_changes_the_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talk\.jsonl:1: the chat template changes what the assistant says"):
        trained(tmp_path, TALK, CHATML.replace("m.content", "m.content | upper"))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talk\.jsonl:1: the chat template refuses.*roles must alternate"):
        trained(tmp_path, TALK[1:], MISTRAL)


def test_a_system_message_that_the_template_refuses(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"no system\); it takes no system message: put those words into"):
        trained(tmp_path, [{"role": "system", "content": "think"}, *TALK], refusing)


def test_no_template_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set dataset\.chat_template"):
        trained(tmp_path, TALK, None)


def test_template_from_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    for setting in (CHATML, str(file)):
        assert trained(tmp_path, TALK, None, chat_template=setting)[1] == "the lazy dog 🐕<|im_end|>"


def test_tokenizer_that_puts_a_space_before_texts(tmp_path: Path) -> None:
    tokenizer = make_space_tokenizer()
    tokenizer.chat_template = CHATML
    talk = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "the dog."}]
    assert "".join(trained(tmp_path, talk, None, tokenizer=tokenizer)).replace(" ", "") == "thedog.<|im_end|>"


def test_sharegpt_reads_as_messages() -> None:
    tokenizer = byte_tokenizer(CHATML)
    data = load_data(dataset(FIXTURES / "sharegpt.json"), tokenizer, task=task_named(), seed=0)
    assert show_example(data.train[1], tokenizer) == [
        ("<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
        ("on the mat<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "missing, null or empty"),
        (["hi"], "message 1 is of type str"),
        ([{"content": "hi"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1: content is missing or null"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: content holds a part of type 'image'"),
    ],
)
def test_broken_conversations(tmp_path: Path, messages: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        trained(tmp_path, messages, CHATML)


def test_builtin_tokenizer() -> None:
    from transformers import AutoTokenizer

    import dynlora_cli

    folder = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_data(dataset(source(FIXTURES / "chat.jsonl")), tokenizer, task=task_named(), seed=0)
    assert show_example(data.train[0], tokenizer) == [
        ("<s><|user|>hello</s><|assistant|>", False),
        ("the cat sat</s>", True),
    ]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "c12345678", "function": function}],
    }


# Two equal questions and answers around a call, and thinking that some templates take out of earlier turns.
LONG = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
    {"role": "user", "content": "a"},
    call("a", city="a"),
    {"role": "tool", "content": "7", "tool_call_id": "c12345678"},
    {"role": "assistant", "content": "a"},
]
TOOLS = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}]
TAGGED = '<tool_call>\n{"name": "a", "arguments": {"city": "a"}}\n</tool_call><|im_end|>'
THOUGHT_A = "<think>\nhm\n</think>\n\na"


def marked_tokenizer(template: str) -> Any:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(templates.MARKS, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("QWEN25", [THOUGHT_A + "<|im_end|>", TAGGED, "a<|im_end|>"]),
        ("QWEN3", [THOUGHT_A + "<|im_end|>", TAGGED, "<think>\n\n</think>\n\na<|im_end|>"]),
        ("LLAMA31", [THOUGHT_A + "<|eot|>", '{"name": "a", "parameters": {"city": "a"}}<|eot|>', "a<|eot|>"]),
        (
            "MISTRAL3",
            [
                f" {THOUGHT_A}</s>",
                '[TOOL_CALLS] [{"name": "a", "arguments": {"city": "a"}, "id": "c12345678"}]</s>',
                " a</s>",
            ],
        ),
        (
            "GPT_OSS",
            [
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
                ' to=functions.a<|channel|>commentary json<|message|>{"city": "a"}<|call|>',
                "<|channel|>final<|message|>a<|return|>",
            ],
        ),
    ],
)
@pytest.mark.parametrize("ending", [6, 4, 2], ids=["answer", "call", "question"])
def test_calls_and_turns_that_the_template_rewrites_are_found(
    tmp_path: Path, template: str, expected: list[str], ending: int
) -> None:
    tokenizer = marked_tokenizer(getattr(templates, template))
    rows = [{"messages": LONG[:ending], "tools": TOOLS}]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_data(dataset(path, max_length=1024), tokenizer, task=task_named(), seed=0)
    turns = {6: 3, 4: 2, 2: 1}[ending]
    found = [text for row in data.train for text, in_loss in show_example(row, tokenizer) if in_loss]
    if ending == 6:
        assert found == expected
    assert len(found) == turns
    # What is trained last is what a server asks for.
    fitted = Fit(tokenizer).wanted(Turns(LONG[:ending], TOOLS)).messages
    asked = tokenizer.apply_chat_template(fitted[:-1], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    written = tokenizer.apply_chat_template(fitted, tools=TOOLS, tokenize=False)
    assert asked + found[-1] == written.rstrip("\n")


def test_a_prompt_that_no_row_shows_is_said(tmp_path: Path) -> None:
    tokenizer = marked_tokenizer(templates.DEEPSEEK_R1)
    with pytest.raises(DataError, match=r"talk\.jsonl:1: message 2: the chat template never writes what the assistant"):
        trained(tmp_path, TALK, None, tokenizer=tokenizer)
    answers = ["a quick brown fox</s>", "the lazy dog 🐕</s>"]
    assert trained(tmp_path, TALK, None, tokenizer=tokenizer, reasoning="drop") == answers
    data = load_data(dataset(tmp_path / "talk.jsonl", reasoning="drop"), tokenizer, task=task_named(), seed=0)
    assert [note for note in data.notes if "asks for an answer with '<|Assistant|><think>\\n'" in note]


def test_system_words_in_the_first_question(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "think"}, *TALK]
    found = trained(tmp_path, talk, None, tokenizer=marked_tokenizer(templates.GEMMA3))
    assert found == [THOUGHT + "a quick brown fox<end_of_turn>", "the lazy dog 🐕<end_of_turn>"]


def test_a_mark_behind_the_conversation(tmp_path: Path) -> None:
    found = trained(tmp_path, TALK, None, tokenizer=marked_tokenizer(templates.PHI))
    assert found == [THOUGHT + "a quick brown fox<|end|>", "the lazy dog 🐕<|end|><|endoftext|>"]


def test_the_template_s_own_blocks(tmp_path: Path) -> None:
    """They hold the turn's opening here, which a server writes, and not its end, which the model must."""
    assert trained(tmp_path, TALK, templates.GENERATION) == [
        THOUGHT + "a quick brown fox<|im_end|>",
        "the lazy dog 🐕<|im_end|>",
    ]
