"""What becomes of columns and of the keys of messages: read, named, or refused with the way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import MISTRAL3
from data_helpers import CHATML, byte_tokenizer, dataset, source, task_named

from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.formats.chat import to_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError

CALLS = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}")
PAIR = {"prompt": "a\n", "completion": "b"}


def load(path: Path, *rows: Any, template: str | None = CHATML, task: str = "causal-lm", **settings: Any) -> Data:
    """The rows as JSON lines, read with settings of the source."""
    path = path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_data(dataset(source(path, **settings)), byte_tokenizer(template), task=task_named(task), seed=0)


def trained(path: Path, row: Any, template: str = CHATML, **settings: Any) -> list[str]:
    """The pieces of a row with a loss."""
    tokenizer = byte_tokenizer(template)
    (path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = load_data(dataset(path / "a.jsonl", **settings), tokenizer, task=task_named(), seed=0)
    return [text for text, in_loss in show_example(data.train[0], tokenizer) if in_loss]


# -- columns -------------------------------------------------------------------------------------------------------------


def test_columns_that_nobody_reads_are_named_once(tmp_path: Path) -> None:
    data = load(tmp_path, PAIR | {"id": 1}, PAIR | {"url": "x", "note": None, "a\x1b[31m": 1})
    assert [note for note in data.notes if "not read" in note] == [
        f"{tmp_path / 'a.jsonl'}: columns that are not read: a\\x1b[31m, id, url"
    ]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([{"weight": 1}, {"weight": 0}], r"a\.jsonl:2: column 'weight' \(0 here\) weighs rows"),
        ([{"weight": 0.5}], "weighs rows"),
        ([{"train": True}, {"train": False}], "says which rows train"),
        ([{"masked": True}], "says which rows do not train"),
        ([{"score": 0.1}, {"score": 0.9}], r"a\.jsonl:2: column 'score' \(0.9 here\) rates rows"),
        ([{"Rating": "5"}, {"Rating": "1"}], "rates rows"),
        ([{"split": "train"}, {"split": "test"}], "says which split a row is of"),
        ([{"label": True}, {"label": False}], "tells good answers from bad ones"),
        ([{"chosen": "b", "rejected": "c"}], "is one of a preference pair"),
        ([{"history": [["a", "b"]]}], "holds earlier turns"),
        ([{"tools": [{"name": "f"}]}], "offers tools"),
        ([{"images": ["a.png"]}], "does not see"),
        ([{"completion_mask": [0, 1]}], "says which tokens train"),
    ],
)
def test_columns_that_change_what_is_learned_are_refused_or_ignored_on_purpose(
    tmp_path: Path, more: list[dict[str, Any]], expected: str
) -> None:
    rows = [PAIR | columns for columns in more]
    with pytest.raises(DataError, match=expected) as caught:
        load(tmp_path, *rows)
    assert caught.value.hint is not None
    assert "or write `ignore: [" in caught.value.hint
    assert load(tmp_path, *rows, ignore=sorted(more[0])).counts["train"]["rows"] == len(rows)


def test_columns_that_change_nothing_are_not_refused(tmp_path: Path) -> None:
    same: dict[str, Any] = {"weight": 1.0, "train": "true", "score": 3, "label": "maths", "history": [], "images": None}
    data = load(tmp_path, PAIR | same, PAIR | same | {"label": "music"})
    assert any(note.endswith("columns that are not read: label, score, train, weight") for note in data.notes)


def test_preference_pairs_are_not_told_to_be_renamed(tmp_path: Path) -> None:
    rows = [{"prompt": "a\n", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match="preference pair") as caught:
        load(tmp_path, *rows)
    assert caught.value.hint is not None
    assert "`columns: {completion: chosen}`" in caught.value.hint
    data = load(tmp_path, *rows, columns={"completion": "chosen"}, ignore=["rejected"])
    assert data.counts["train"]["rows"] == 1


def test_a_column_to_ignore_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'scrore', which `ignore` names"):
        load(tmp_path, PAIR, ignore=["scrore"])


def test_history_comes_before_the_question(tmp_path: Path) -> None:
    row: dict[str, Any] = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    for written in (row, row | {"history": json.dumps(row["history"])}):
        tokenizer = byte_tokenizer(CHATML)
        text = tokenizer.decode(load(tmp_path, written).train[0].input_ids)
        said = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        assert text == "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in said)
    assert trained(tmp_path, row) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(DataError, match="earlier turns, which need a chat template"):
        load(tmp_path, row, template=None)
    with pytest.raises(DataError, match="expected a list of"):
        load(tmp_path, row | {"history": ["a", "b"]})


# -- marks of turns ------------------------------------------------------------------------------------------------------


def talk(**marks: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "WRONG", **marks},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "right"},
        ]
    }


@pytest.mark.parametrize(
    "marks", [{"weight": 0}, {"train": False}, {"loss": False}, {"training": 0}, {"masked": True}, {"weight": "0.0"}]
)
def test_turns_marked_not_to_train_carry_no_loss(tmp_path: Path, marks: dict[str, Any]) -> None:
    assert trained(tmp_path, talk(**marks)) == ["right<|im_end|>"]
    everything = "".join(trained(tmp_path, talk(**marks), train_on="all"))
    assert "WRONG" not in everything
    assert "right" in everything
    assert "user\na" in everything


def test_turns_marked_to_train_do(tmp_path: Path) -> None:
    assert trained(tmp_path, talk(weight=1, train=True, masked=False)) == ["WRONG<|im_end|>", "right<|im_end|>"]


def test_marks_go_to_no_template_and_stay_in_place_after_a_system_message(tmp_path: Path) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.weight }}{{ m.loss }}")
    assert trained(tmp_path, talk(weight=0) | {"system": "s"}, template) == ["right<|im_end|>"]
    assert trained(tmp_path, talk(loss=None), template) == ["WRONG<|im_end|>", "right<|im_end|>"]


def test_a_last_turn_that_does_not_train_gets_no_end_of_text(tmp_path: Path) -> None:
    row = talk()
    row["messages"][3]["weight"] = 0
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert trained(tmp_path, row, template) == ["WRONG\n"]


@pytest.mark.parametrize("marks", [{"weight": 0.5}, {"loss": "some"}, {"train_detail": [{"train": False}]}])
def test_marks_between_yes_and_no_are_refused(tmp_path: Path, marks: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: message 2: .* a turn trains \(1\) or does not \(0\)"):
        load(tmp_path, talk(**marks))


def test_rows_without_anything_to_learn_say_why(tmp_path: Path) -> None:
    row = talk(weight=0)
    row["messages"][3]["weight"] = 0
    with pytest.raises(DataError, match="1 row with turns of the assistant only that are marked not to train"):
        load(tmp_path, row)
    with pytest.raises(
        DataError, match=r"without a turn of the role assistant \(roles there: helper, user\)"
    ) as caught:
        load(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "helper", "content": "b"}]})
    assert caught.value.hint == "name the role assistant, or set dataset.train_on: all"


def test_users_marked_to_train_are_told(tmp_path: Path) -> None:
    row = talk()
    row["messages"][0]["train"] = True
    assert any("turns of others than the assistant are marked to train" in note for note in load(tmp_path, row).notes)


# -- spellings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
        {"messages": [{"role": "User", "value": "a"}, {"from": "Assistant", "content": "b"}]},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        {"messages": None, "conversations": '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'},
    ],
)
def test_conversations_in_every_spelling_give_the_same_example(tmp_path: Path, row: dict[str, Any]) -> None:
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert load(tmp_path, row).sha256 == load(tmp_path, plain).sha256


def test_messages_that_are_text_but_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'messages' is text and not valid JSON"):
        load(tmp_path, {"messages": "hello"})


# -- calls ---------------------------------------------------------------------------------------------------------------


def calling(arguments: Any, *, bare: bool = False, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    call = function if bare else {"id": "c1", "type": "function", "function": function}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]} | more
    return {"messages": [{"role": "user", "content": "a"}, answer]}


OBJECT = {"city": "Zürich", "n": [1, 2]}
TOJSON = CALLS.replace("CALL", "{% set f = c.function or c %}{{ f.name }}!{{ f.arguments | tojson }}")
PRINTED = CALLS.replace("CALL", "{% set f = c.function or c %}{{ f.name }}!{{ f.arguments }}")
JOINED = CALLS.replace("CALL", "{% set f = c.function or c %}{{ f.name + '!' + f.arguments }}")
BY_KEY = CALLS.replace(
    "CALL", "{% set f = c.function or c %}{{ f.name }}!{% for k, v in f.arguments.items() %}{{ k }}{% endfor %}"
)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("written", [OBJECT, json.dumps(OBJECT, ensure_ascii=False)])
@pytest.mark.parametrize("template", [TOJSON, PRINTED, JOINED])
def test_arguments_come_out_as_json_whatever_row_and_template(
    tmp_path: Path, template: str, written: Any, bare: bool
) -> None:
    (said,) = trained(tmp_path, calling(written, bare=bare), template)
    assert said == f"f!{json.dumps(OBJECT, ensure_ascii=False)}<|im_end|>"
    assert trained(tmp_path, calling(written, bare=bare), BY_KEY) == ["f!cityn<|im_end|>"]


def test_older_function_calls_are_calls(tmp_path: Path) -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": json.dumps(OBJECT)}}
    row = {"messages": [{"role": "user", "content": "a"}, old, {"role": "function", "name": "f", "content": "7"}]}
    new = calling(OBJECT)["messages"]
    new[1]["tool_calls"][0].pop("id")
    functions = [{"name": "f", "parameters": {}}]
    tools = [{"type": "function", "function": functions[0]}]
    template = "{{ tools | tojson }}" + TOJSON
    then = {"messages": [*new, {"role": "tool", "name": "f", "content": "7"}], "tools": tools}
    assert load(tmp_path, row | {"functions": functions}, template=template).sha256 == (
        load(tmp_path, then, template=template).sha256
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("{broken", "the arguments of f is text and not valid JSON"), ('{"a": 1, "a": 2}', "the key 'a' twice")],
)
def test_broken_arguments_are_named(tmp_path: Path, arguments: str, expected: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:1: message 2: .*{expected}"):
        load(tmp_path, calling(arguments), template=TOJSON)


# -- calls that are turns of their own, as LLaMA-Factory and ms-swift write them -------------------------------------------


def turns_of(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in said]}


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("arguments", [OBJECT, json.dumps(OBJECT)])
def test_a_turn_that_calls_is_a_call(role: str, arguments: Any) -> None:
    call = {"name": "f", "arguments": arguments}
    row = turns_of(("human", "a"), (role, json.dumps([call, call])), ("observation", "1"), ("tool_response", "2"))
    _, answer, *results = to_example(row, has_template=True).messages
    assert answer["role"] == "assistant"
    assert answer["content"] == ""
    assert [call["function"] for call in answer["tool_calls"]] == [{"name": "f", "arguments": OBJECT}] * 2
    ids = [call["id"] for call in answer["tool_calls"]]
    assert [result["tool_call_id"] for result in results] == ids
    assert [len(name) for name in ids] == [9, 9]  # as Mistral's templates want them


def test_turns_that_are_not_what_their_role_says_are_named(tmp_path: Path) -> None:
    row = turns_of(("human", "a"), ("function_call", "f()"), ("thought", "b"), ("gpt", "c")) | talk()
    del row["messages"]
    notes = load(tmp_path, row).notes
    assert any("some turns that should call hold no JSON" in note for note in notes)
    assert any(
        "turns of the role 'thought', which is not known here, are not the assistant's" in note for note in notes
    )
    notes = load(tmp_path, row | talk()).notes
    assert any("'conversations' is not read where there is 'messages'" in note for note in notes)


def test_ids_that_a_template_refuses_are_changed_and_it_is_said(tmp_path: Path) -> None:
    call = {"id": "call_abc", "type": "function", "function": {"name": "f", "arguments": OBJECT}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    data = load(tmp_path, {"messages": messages}, template=MISTRAL3)
    assert any("ids of nine letters and digits only: calls were numbered anew" in note for note in data.notes)
    call["id"] = "call00001"
    assert load(tmp_path, {"messages": messages}, template=MISTRAL3).sha256 == data.sha256


# -- hints that hold when they are followed --------------------------------------------------------------------------------


ASKED = {"role": "user", "content": "a"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "bc")


def test_a_pair_of_conversations_is_read_as_its_hint_says(tmp_path: Path) -> None:
    row = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    with pytest.raises(DataError, match="preference pair") as caught:
        load(tmp_path, row)
    assert caught.value.hint is not None
    assert "`columns: {messages: chosen}` and `ignore: [rejected]`" in caught.value.hint
    assert load(tmp_path, row, columns={"messages": "chosen"}, ignore=["rejected"]).counts["train"]["rows"] == 1
    with pytest.raises(DataError, match="preference pair") as caught:
        load(tmp_path, {"conversations": [ASKED], "chosen": GOOD, "rejected": BAD})
    assert "write 'chosen' as the last turn of `messages`" in str(caught.value.hint)


def test_names_with_spaces_are_quoted_in_hints(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no format fits") as caught:
        load(tmp_path, {"Prompt": "a", " answer": "b"})
    assert '{prompt: Prompt, completion: " answer"}' in str(caught.value.hint)
    with pytest.raises(DataError, match="no format fits") as caught:
        load(tmp_path, {"conversation": [{"human": "a", "assistant": "b"}]})
    assert "messages: conversation" not in str(caught.value.hint)


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    row = {"prompt": [ASKED, BAD, ASKED], "completion": [GOOD]}
    assert trained(tmp_path, row) == ["b<|im_end|>"]
    with pytest.raises(DataError, match="lists of messages, which need a chat template"):
        load(tmp_path, row, template=None)
    with pytest.raises(DataError, match="'completion' is none"):
        load(tmp_path, row | {"completion": "b"})


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": ""}, {"messages": [ASKED, GOOD | {"content": ""}]}])
def test_empty_answers_are_named(tmp_path: Path, row: Any) -> None:
    assert any("some answers are empty" in note for note in load(tmp_path, row).notes)
