"""What the assistant thinks: trained, read or left out as the recipe says, and never lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
from data_helpers import CHATML, byte_tokenizer, dataset, source, task_named

from dynlora_cli.data.chat.reasoning import found_in
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError

ASK = {"role": "user", "content": "a fox"}
THOUGHT = {"role": "assistant", "content": "the dog", "reasoning_content": "hmm"}
PLAIN = {"role": "assistant", "content": "the cat"}
BLOCK = "<think>\nhmm\n</think>\n\n"
SWITCHED = templates.QWEN3.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def read(tmp_path: Path, rows: list[Any], template: str = templates.QWEN3, **settings: Any) -> tuple[list[str], Data]:
    """The pieces of all rows that are in the loss; and the data."""
    path = tmp_path / "rows.jsonl"
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(templates.MARKS, special_tokens=True)
    more = {key: settings.pop(key) for key in ("chat_template_kwargs", "system") if key in settings.get("of", ())}
    settings.pop("of", None)
    data = load_data(dataset(source(path, **more), **settings), tokenizer, task=task_named(), seed=0)
    shown = [show_example(row, tokenizer) for row in data.train]
    return [text for row in shown for text, in_loss in row if in_loss], data


IN_PARTS = (  # as Mistral's newer models have it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{% if b.type == 'thinking' %}[THINK]{{ b.thinking }}[/THINK]{% else %}{{ b.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_as_a_part_of_the_content(tmp_path: Path) -> None:
    inline = PLAIN | {"content": BLOCK + "the dog"}
    expected = "[THINK]hmm[/THINK]the dog<|im_end|>"
    assert read(tmp_path, [[ASK, THOUGHT, ASK, inline]], IN_PARTS)[0] == [expected] * 2
    assert read(tmp_path, [[ASK, THOUGHT]], IN_PARTS, reasoning="mask")[0] == ["the dog<|im_end|>"]
    assert read(tmp_path, [[ASK, THOUGHT]], IN_PARTS, reasoning="drop")[0] == ["the dog<|im_end|>"]


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning", "content"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("QWEN3", BLOCK + "the dog<|im_end|>"),
        ("GPT_OSS", "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>the dog<|return|>"),
        ("QWEN25", BLOCK + "the dog<|im_end|>"),  # which reads no field: it is written into the answer
    ],
)  # fmt: skip
def test_whatever_the_field_is_called_it_is_written_where_the_template_has_it(
    tmp_path: Path, field: str, template: str, expected: str
) -> None:
    answer = PLAIN | ({"content": BLOCK + "the dog"} if field == "content" else {"content": "the dog", field: "hmm"})
    found, data = read(tmp_path, [[ASK, answer]], getattr(templates, template))
    assert found == [expected]
    assert any("the reasoning of 1 answer in 1 row is trained on" in note for note in data.notes)
    into_answer = any("reads no field of reasoning: it is written into the answer" in note for note in data.notes)
    assert into_answer == (template == "QWEN25" and field != "content")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("QWEN3", "the dog<|im_end|>"),
        ("QWEN25", "the dog<|im_end|>"),
        ("GPT_OSS", "<|start|>assistant<|channel|>final<|message|>the dog<|return|>"),
    ],
)
def test_masked_reasoning_is_read_and_not_trained(tmp_path: Path, template: str, expected: str) -> None:
    found, data = read(tmp_path, [[ASK, THOUGHT]], getattr(templates, template), reasoning="mask")
    assert found == [expected]
    tokenizer = byte_tokenizer(getattr(templates, template))
    assert "hmm" in "".join(text for text, _ in show_example(data.train[0], tokenizer))
    assert any("is read and not trained on" in note for note in data.notes)


def test_with_mask_an_empty_block_is_not_trained_either(tmp_path: Path) -> None:
    assert read(tmp_path, [[ASK, PLAIN]], reasoning="mask")[0] == ["the cat<|im_end|>"]


@pytest.mark.parametrize("inline", [True, False])
def test_dropped_reasoning_is_nowhere(tmp_path: Path, inline: bool) -> None:
    answer = PLAIN | {"content": BLOCK + "the cat"} if inline else THOUGHT | {"content": "the cat"}
    found, data = read(tmp_path, [[ASK, answer]], templates.QWEN25, reasoning="drop")
    assert found == ["the cat<|im_end|>"]
    assert any("1 answer in 1 row is left out (dataset.reasoning: drop)" in note for note in data.notes)


def test_each_turn_is_learned_as_a_server_would_show_it(tmp_path: Path) -> None:
    """Three turns, of which two think: the first of them is a row of its own, for the third's template hides it."""
    talk = [ASK, THOUGHT, ASK, PLAIN, ASK, THOUGHT]
    found, data = read(tmp_path, [talk])
    assert found == [BLOCK + "the dog<|im_end|>", "the cat<|im_end|>", BLOCK + "the dog<|im_end|>"]
    assert len(data.train) == 2
    tokenizer = byte_tokenizer(templates.QWEN3)
    whole = "".join(text for text, _ in show_example(data.train[1], tokenizer))
    assert whole.count("hmm") == 1  # of the last turn
    assert any("1 conversation became 2 rows" in note for note in data.notes)


def test_only_the_last_turn_needs_no_rows_of_its_own(tmp_path: Path) -> None:
    found, data = read(tmp_path, [[ASK, THOUGHT, ASK, THOUGHT]], train_on="completion")
    assert (found, len(data.train)) == ([BLOCK + "the dog<|im_end|>"], 1)


def test_turns_that_do_not_train_need_no_rows_of_their_own(tmp_path: Path) -> None:
    found, data = read(tmp_path, [[ASK, THOUGHT | {"weight": 0}, ASK, THOUGHT | {"weight": 1}]])
    assert (found, len(data.train)) == ([BLOCK + "the dog<|im_end|>"], 1)


def test_with_all_text_trained_what_is_hidden_is_counted(tmp_path: Path) -> None:
    _, data = read(tmp_path, [[ASK, THOUGHT, ASK, THOUGHT]], train_on="all")
    assert any("leaves out the reasoning of 1 earlier answer" in note for note in data.notes)


@pytest.mark.parametrize("of", [("chat_template_kwargs",), ()], ids=["of the source", "of the data"])
def test_rows_with_and_without_thinking(tmp_path: Path, of: tuple[str, ...]) -> None:
    rows = [[ASK, THOUGHT], [ASK, PLAIN]]
    found, data = read(tmp_path, rows, SWITCHED)
    assert found == [BLOCK + "the dog<|im_end|>", "<think>\n\n</think>\n\nthe cat<|im_end|>"]
    assert any("1 row with reasoning, 1 row without" in note and "empty think" in note for note in data.notes)
    found, _ = read(tmp_path, rows, SWITCHED, chat_template_kwargs={"enable_thinking": "auto"}, of=of)
    assert found == [BLOCK + "the dog<|im_end|>", "the cat<|im_end|>"]
    found, data = read(tmp_path, rows[1:], SWITCHED, chat_template_kwargs={"enable_thinking": False}, of=of)
    assert found == ["the cat<|im_end|>"]
    assert any("is for their rows alone" in note for note in data.notes) == bool(of)
    assert any("any other server must be told" in note for note in data.notes) != bool(of)
    own = {"messages": rows[1], "chat_template_kwargs": json.dumps({"enable_thinking": False})}
    assert read(tmp_path, [own], SWITCHED)[0] == ["the cat<|im_end|>"]


def test_a_variable_that_no_template_reads_is_named(tmp_path: Path) -> None:
    _, data = read(tmp_path, [[ASK, PLAIN]], SWITCHED, chat_template_kwargs={"enable_thinkng": False})
    assert any(
        "never reads 'enable_thinkng' of chat_template_kwargs" in note and "'enable_thinking'" in note
        for note in data.notes
    )


def test_a_variable_of_held_out_rows_that_no_template_reads_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": [ASK, PLAIN]}) + "\n")
    held_out = source(tmp_path / "b.jsonl", chat_template_kwargs={"enable_thinkng": False})
    read = dataset(tmp_path / "a.jsonl", val=[held_out])
    data = load_data(read, byte_tokenizer(SWITCHED), task=task_named(), seed=0)
    assert any("never reads 'enable_thinkng' of chat_template_kwargs" in note for note in data.notes)


@pytest.mark.parametrize("value", ["[1]", "{", 5, {"tokenize": True}, {"enable_thinking": "False"}])
def test_variables_of_a_row_that_are_none(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'chat_template_kwargs'"):
        read(tmp_path, [{"messages": [ASK, PLAIN], "chat_template_kwargs": value}], SWITCHED)


def test_a_variable_of_one_row_that_no_template_reads_is_named(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, PLAIN]}, {"messages": [ASK, PLAIN], "chat_template_kwargs": {"enable_thinkng": False}}]
    _, data = read(tmp_path, rows, SWITCHED)
    assert any("never reads 'enable_thinkng'" in note for note in data.notes)


def test_auto_is_offered_where_the_template_knows_it(tmp_path: Path) -> None:
    rows = [[ASK, THOUGHT], [ASK, PLAIN]]
    assert any("{enable_thinking: auto}" in note for note in read(tmp_path, rows, SWITCHED)[1].notes)
    notes = read(tmp_path, rows, CHATML)[1].notes
    assert not any("auto}" in note for note in notes)
    assert any("nothing in the prompt tells the model which of the two" in note for note in notes)


def test_thoughts_that_would_be_lost_are_told_or_refused(tmp_path: Path) -> None:
    _, data = read(tmp_path, [[ASK, PLAIN | {"thinking": "one", "reasoning": "two"}]])
    assert any("several different thoughts" in note for note in data.notes)
    _, data = read(tmp_path, [[ASK, PLAIN | {"thinking": "one", "reasoning": " one"}]])
    assert not any("several different thoughts" in note for note in data.notes)
    _, data = read(tmp_path, [[ASK, {"role": "assistant", "content": "<think>\nhm, and th"}]])
    assert any("open <think> and never close it" in note for note in data.notes)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: message 2: reasoning_content is of type list, expected text"):
        read(tmp_path, [[ASK, PLAIN | {"reasoning_content": ["hmm"]}]])


@pytest.mark.parametrize(("arguments", "kind"), [('"x"', "text"), ("[1]", "of type list"), (3, "of type int")])
def test_arguments_of_a_call_are_an_object(tmp_path: Path, arguments: Any, kind: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(DataError, match=f"message 2: the arguments of f are {kind}, expected an object"):
        read(tmp_path, [[ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]])


@pytest.mark.parametrize("tools", [3, {"a": 1}, ["weather"], '"weather"'])
def test_tools_are_a_list_of_objects(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 'tools' is .*expected a list of objects"):
        read(tmp_path, [{"messages": [ASK, PLAIN], "tools": tools}])


def test_the_system_message_of_the_recipe_is_for_rows_without_one(tmp_path: Path) -> None:
    rows = [[ASK, PLAIN | {"weight": 0}, ASK, PLAIN], [{"role": "system", "content": "own"}, ASK, PLAIN]]
    found, data = read(tmp_path, rows, CHATML, system="think")
    tokenizer = byte_tokenizer(CHATML)
    texts = ["".join(text for text, _ in show_example(row, tokenizer)) for row in data.train]
    assert [text.split("\n")[1].split("<")[0] for text in texts] == ["think", "own"]
    assert found == ["the cat<|im_end|>"] * 2  # marks stay with their turns
    assert read(tmp_path, rows[:1], CHATML, system="think", of=("system",))[1].sha256 == (
        read(tmp_path, rows[:1], CHATML, system="think")[1].sha256
    )


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a fox"}\n{"text": "the dog"}\n')
    settings = {"system": "x", "chat_template_kwargs": {"a": 1}, "reasoning": "drop"}
    data = load_data(dataset(tmp_path / "a.jsonl", **settings), byte_tokenizer(CHATML), task=task_named(), seed=0)
    for key in settings:
        assert f"dataset.{key} is not used: no row is a conversation" in data.notes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nhm\n</think>\n\na", ("hm", "a")),
        ("hm\n</think>\n\na", ("hm", "a")),  # whose opening the prompt held
        ("<think>\n\n</think>\n\na", ("", "a")),
        ("the tag </think> closes it", (None, "the tag </think> closes it")),
        ("see <think>x</think>", (None, "see <think>x</think>")),
        ("<think>never ends", (None, "<think>never ends")),
    ],
)
def test_reasoning_inside_a_content(content: str, expected: tuple[str | None, str]) -> None:
    reasoning, rest = found_in({"role": "assistant", "content": content})
    assert (reasoning, rest["content"]) == expected


def test_reasoning_of_preference_rows_is_written_too(tmp_path: Path) -> None:
    from dynlora_cli.config.sections import Model, Train
    from dynlora_cli.tasks import task as tasks

    path = tmp_path / "pairs.jsonl"
    row = {"prompt": [ASK], "chosen": [THOUGHT], "rejected": [PLAIN]}
    path.write_text(json.dumps(row) + "\n")
    tokenizer = byte_tokenizer(SWITCHED)
    task = tasks.of(Model(name_or_path="builtin:tiny"), Train(objective="dpo"))
    data = load_data(dataset(path, system="think"), tokenizer, task=task, seed=0)
    text = tokenizer.decode(list(data.train[0].lines[0]))
    assert "system\nthink" in text
    assert BLOCK + "the dog" in text
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:1: message 2: the chat template never writes what the assistant"
    ):
        load_data(dataset(path), byte_tokenizer(templates.DEEPSEEK_R1), task=task, seed=0)


@pytest.mark.parametrize("thinks", [True, False])
def test_answers_that_are_compared_are_asked_for_in_one_mode(tmp_path: Path, thinks: bool) -> None:
    from dynlora_cli.config.sections import Model, Train
    from dynlora_cli.tasks import task as tasks

    path = tmp_path / "pairs.jsonl"
    other = PLAIN | {"content": "a bird"}
    path.write_text(json.dumps({"prompt": [ASK], "chosen": [THOUGHT if thinks else other], "rejected": [PLAIN]}) + "\n")
    tokenizer = byte_tokenizer(SWITCHED)
    tokenizer.add_tokens(templates.MARKS, special_tokens=True)
    task = tasks.of(Model(name_or_path="builtin:tiny"), Train(objective="dpo"))
    read = dataset(path, chat_template_kwargs={"enable_thinking": "auto"})
    (row,) = load_data(read, tokenizer, task=task, seed=0).train
    chosen, rejected = (tokenizer.decode(list(line)[row.start :]) for line in row.lines)
    empty = "<think>\n\n</think>\n\n"
    expected = (BLOCK + "the dog", empty + "the cat") if thinks else ("a bird", "the cat")
    assert (chosen, rejected) == tuple(f"{text}<|im_end|>\n" for text in expected)


PARTS = {"type": "text", "text": "the "}


@pytest.mark.parametrize(
    "thought",
    [{"type": "thinking", "thinking": "hmm"}, {"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}],
)
def test_content_in_parts(tmp_path: Path, thought: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": [thought, PARTS, {"type": "output_text", "text": "dog"}]}
    asked = {"role": "user", "content": [{"type": "input_text", "text": "a fox"}]}
    assert read(tmp_path, [[asked, answer]])[0] == [BLOCK + "the dog<|im_end|>"]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"}, {"type": "refusal"}]
)
def test_parts_that_are_no_text_are_refused_in_words(tmp_path: Path, part: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=rf"message 1: content holds a part of type '{part['type']}'.*only text is read here"
    ):
        read(tmp_path, [[{"role": "user", "content": [PARTS, part]}, PLAIN]])
