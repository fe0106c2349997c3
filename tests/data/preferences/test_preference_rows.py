"""Rows of compared and judged answers: their tokens, against TRL's own, and what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_templates as templates
import pytest
import torch
from data_helpers import BARE, CHATML, LLAMA3, byte_tokenizer, dataset, source, space_tokenizer, task_named
from transformers import PreTrainedTokenizerFast

from dynlora_cli.data.batches import Batches
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.preferences.examples import Compared, Rated
from dynlora_cli.errors import DataError

USER = {"role": "user", "content": "what is a fox"}
DOG, CAT = ({"role": "assistant", "content": text} for text in ("a quick dog", "a cat, i think"))
TEXTS = {"prompt": "what is a fox? ", "chosen": "a quick dog", "rejected": "the cat"}
WHOLE = {"chosen": "what is a fox? a quick dog", "rejected": "what is a fox? a lazy cat"}
TALK = {"prompt": [USER], "chosen": [DOG], "rejected": [CAT]}
WHOLE_TALK = {"chosen": [USER, DOG], "rejected": [USER, CAT]}
CALLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
LONGER = {"chosen": [USER, DOG], "rejected": [USER, DOG, USER, CAT]}


def read(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    objective: str = "dpo",
    **settings: Any,
) -> Data:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = task_named()
    task.objective, task.forms = objective, ("Judged", "Preference") if objective == "kto" else ("Preference",)
    named = {key: settings.pop(key) for key in ("columns", "ignore", "format") if key in settings}
    return load_data(dataset(source(path, **named), **settings), tokenizer, task=task, seed=0)


def lines(example: Compared | Rated) -> tuple[list[int], ...]:
    """The prompt and its answers."""
    return (list(example.input_ids[: example.start]), *(list(answer) for answer in example.answers))


def trl_tokens(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, objective: str = "dpo") -> list[Any]:
    """What TRL's trainer makes of the rows."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    trainer = trl.KTOTrainer if objective == "kto" else trl.DPOTrainer
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=512, truncation_mode="keep_start", per_device_train_batch_size=len(rows) * 2
    )
    own = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    table = datasets.Dataset.from_list(rows)
    return list(trainer._prepare_dataset(own, table, tokenizer, args, "eval"))


SHAPES = [
    pytest.param(TEXTS, None, id="text"),
    pytest.param({**TEXTS, "prompt": "what is a f"}, None, id="text that joins"),
    pytest.param(WHOLE, None, id="text, prompt in both"),
    pytest.param({"chosen": "the cat sat", "rejected": "the cat"}, None, id="text, one longer"),
    *(
        pytest.param(row, template, id=f"{shape}, {name}")
        for name, template in [("chatml", CHATML), ("llama3", LLAMA3), ("qwen3", templates.QWEN3)]
        for shape, row in [("talk", TALK), ("talk, prompt in both", WHOLE_TALK), ("talk, one longer", LONGER)]
    ),
    pytest.param({**TALK, "tools": CALLS}, templates.QWEN3, id="tools"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "template"), SHAPES)
def test_the_tokens_are_trls(tmp_path: Path, row: dict[str, Any], template: str | None) -> None:
    tokenizer = byte_tokenizer(template)
    other = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    data = read(tmp_path, [row, other], tokenizer, max_length=512)
    theirs = trl_tokens([row, other], tokenizer)
    assert [lines(example) for example in data.train] == [
        (each["prompt_ids"], each["chosen_ids"], each["rejected_ids"]) for each in theirs
    ]


def test_a_tokenizer_that_puts_a_space_before_texts(tmp_path: Path) -> None:
    tokenizer = space_tokenizer()
    theirs = trl_tokens([TEXTS, WHOLE | {"prompt": ""}], tokenizer)
    data = read(tmp_path, [TEXTS], tokenizer)
    assert lines(data.train[0]) == tuple(theirs[0][f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))


JUDGED = [
    {"prompt": "what is a fox? ", "completion": "a quick dog", "label": True},
    {"prompt": "and a cat? ", "completion": "the lazy mat", "label": False},
    {"prompt": "and the mat? ", "completion": "think", "label": True},
]


@pytest.mark.parametrize("talks", [False, True])
def test_judged_rows_are_trls_with_their_mismatched_answers(tmp_path: Path, talks: bool) -> None:
    def said(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if talks else text

    rows = [
        {"prompt": said("user", r["prompt"]), "completion": said("assistant", r["completion"]), "label": r["label"]}
        for r in JUDGED
    ]
    tokenizer = byte_tokenizer(CHATML if talks else None)
    data, theirs = read(tmp_path, rows, tokenizer, "kto"), trl_tokens(rows, tokenizer, "kto")
    assert [lines(example) for example in data.train] == [
        (each["prompt_ids"], each["completion_ids"], each["KL_completion_ids"]) for each in theirs
    ]
    assert [example.desirable for example in data.train] == [True, False, True]


def test_a_pair_is_two_judged_answers_for_kto(tmp_path: Path) -> None:
    rows = [TEXTS, {**TEXTS, "prompt": "and a cat? "}]
    tokenizer = byte_tokenizer()
    data, theirs = read(tmp_path, rows, tokenizer, "kto"), trl_tokens(rows, tokenizer, "kto")
    found = {(*map(tuple, lines(example)[:2]), example.desirable) for example in data.train}
    assert found == {(tuple(each["prompt_ids"]), tuple(each["completion_ids"]), each["label"]) for each in theirs}


def test_the_mismatched_answer_is_of_another_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"{word} ", "chosen": f"yes {word}", "rejected": f"no {word}"} for word in ("fox", "cat", "mat")]
    tokenizer = byte_tokenizer()
    for example in read(tmp_path, rows, tokenizer, "kto").train:
        word = tokenizer.decode(example.input_ids[: example.start], skip_special_tokens=True).strip()
        assert word not in tokenizer.decode(example.answers[1])


def test_a_batch_has_the_chosen_lines_first(tmp_path: Path) -> None:
    data = read(tmp_path, [TEXTS, {**TEXTS, "prompt": "and? "}], byte_tokenizer())
    batch = Batches.in_order(data.train, micro_batch_size=2, max_length=128, pad_id=1).step(0, 0)[0]
    first, second = data.train
    assert (batch.columns, batch.rows, batch.supervised) == ([2, 2], [0, 1], 2)
    expected = [first.input_ids, second.input_ids, first.rejected_ids, second.rejected_ids]
    for line, ids in enumerate(expected):
        assert batch.inputs["input_ids"][line, : len(ids)].tolist() == list(ids)
        assert batch.inputs["attention_mask"][line].sum() == len(ids)
        start = (first, second)[line % 2].start
        wanted = [-100] * (start - 1) + list(ids[start:])
        assert batch.labels[line].tolist() == wanted + [-100] * (batch.labels.shape[1] - len(wanted))
    assert len(set(batch.line_keys)) == 4
    again = Batches.in_order(data.train[1:], micro_batch_size=1, max_length=128, pad_id=1).step(0, 0)[0]
    assert list(again.line_keys) == [batch.line_keys[1], batch.line_keys[3]]


def test_judged_rows_of_a_batch_say_which_are_good(tmp_path: Path) -> None:
    data = read(tmp_path, JUDGED, byte_tokenizer(), "kto")
    batch = Batches.in_order(data.train, micro_batch_size=3, max_length=128, pad_id=1).step(0, 0)[0]
    assert batch.columns == [3, 3]
    assert torch.equal(batch.extra["desirable_B"], torch.tensor([True, False, True]))
    assert batch.supervised == 3


LOST = [
    ({**TEXTS, "rejected": "a quick dog"}, "whose chosen and rejected answers are the same"),
    ({**TEXTS, "rejected": ""}, "with an empty chosen or rejected answer"),
    ({**TEXTS, "prompt": "the cat " * 200}, "with an answer that begins after max_length 128"),
    (
        {**TEXTS, "chosen": "the cat " * 200 + "a", "rejected": "the cat " * 200 + "b"},
        "whose chosen and rejected answers are the same up to max_length 128",
    ),
]


@pytest.mark.parametrize(("row", "reason"), LOST)
def test_rows_that_teach_nothing_are_named_and_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    data = read(tmp_path, [TEXTS, row], byte_tokenizer())
    assert data.counts["train"]["rows"] == 1
    assert f"train: 1 row dropped: 1 row {reason}" in data.notes


def test_answers_that_are_cut_are_counted(tmp_path: Path) -> None:
    data = read(tmp_path, [TEXTS, {**TEXTS, "rejected": "the cat " * 200}], byte_tokenizer(), max_length=64)
    assert data.counts["train"] | {"tokens": 0} == {
        "rows": 2, "tokens": 0, "supervised": 2, "truncated": 1, "cut_answers": 1, "dropped": 0
    }  # fmt: skip
    assert max(map(len, data.train[1].lines)) == 64
    with pytest.raises(DataError, match="longer than max_length 64"):
        read(tmp_path, [{**TEXTS, "rejected": "the cat " * 200}], byte_tokenizer(), max_length=64, overlong="error")
    left = read(tmp_path, [TEXTS, {**TEXTS, "chosen": "x" * 200}], byte_tokenizer(), max_length=64, overlong="drop")
    assert left.counts["train"]["dropped"] == 1


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        pytest.param(
            {**TALK, "prompt": "what is a fox", "chosen": [USER, DOG], "rejected": [USER, CAT]}, 0, id="whole"
        ),
        pytest.param({"prompt": "what is a fox", "chosen": [DOG], "rejected": [CAT]}, 0, id="text, then messages"),
        pytest.param({**TALK, "chosen": DOG, "rejected": CAT}, 0, id="one message"),
        pytest.param({**TALK, "chosen": DOG["content"], "rejected": CAT["content"]}, 0, id="messages, then text"),
        pytest.param(
            {"question": "what is a fox", "chosen": "a quick dog", "rejected": CAT["content"]}, 0, id="question"
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "what is a fox"}],
                "chosen": {"from": "gpt", "value": "a quick dog"},
                "rejected": {"from": "gpt", "value": CAT["content"]},
            },
            0,
            id="ShareGPT",
        ),
    ],
)
def test_what_others_write_is_the_same_row(tmp_path: Path, row: dict[str, Any], chosen: int) -> None:
    tokenizer = byte_tokenizer(CHATML)
    same, other = (read(tmp_path, [each], tokenizer).train[0] for each in (TALK, row))
    assert lines(same) == lines(other)


def test_a_system_message_stands_before_the_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    row = {"system": "think", "instruction": "look", "input": "a fox", "chosen": "the cat", "rejected": "the dog"}
    shown = show_example(read(tmp_path, [row], tokenizer).train[0], tokenizer)
    assert shown[0] == (
        "<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\nlook\n\na fox<|im_end|>\n<|im_start|>assistant\n", False
    )  # fmt: skip
    assert shown[1:] == [
        ("\n  chosen: ", False), ("the cat<|im_end|>\n", True), ("\n  rejected: ", False), ("the dog<|im_end|>\n", True)
    ]  # fmt: skip


def test_a_template_without_an_end_of_turn_gets_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(BARE)
    example = read(tmp_path, [TALK], tokenizer).train[0]
    assert [tokenizer.decode(answer) for answer in example.answers] == ["a quick dog</s>", "a cat, i think</s>"]


def test_a_prompt_that_spells_the_opening_token_has_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    example = read(tmp_path, [{**TEXTS, "prompt": "<s>what is a fox? "}], tokenizer).train[0]
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1


def test_answers_without_a_common_letter_have_no_prompt(tmp_path: Path) -> None:
    """TRL's own function looks at the last letter there, and takes nearly all of the answer for the prompt."""
    tokenizer = byte_tokenizer()
    example = read(tmp_path, [{"chosen": "a cat ", "rejected": "the dog "}], tokenizer).train[0]
    assert [tokenizer.decode(part) for part in lines(example)] == ["<s>", "a cat </s>", "the dog </s>"]


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"chosen": "a", "rejected": [CAT]}, CHATML, "must both be texts"),
        (TALK, None, "need a chat template"),
        ({"chosen": [DOG], "rejected": [CAT]}, CHATML, "share no message"),
        ({**TEXTS, "system": "think"}, None, "'system' needs a chat template"),
        ({"prompt": [USER], "chosen": [{**DOG, "weight": 0}], "rejected": [CAT]}, CHATML, "marked not to train"),
        ({"prompt": "a", "completion": "b"}, None, "no format fits the columns completion, prompt; for causal-lm with"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, Any], template: str | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(tmp_path, [row], byte_tokenizer(template))


@pytest.mark.parametrize("label", ["good", 2, None])
def test_a_label_is_true_or_false(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match="good \\(true\\) or bad \\(false\\)"):
        read(tmp_path, [{**JUDGED[0], "label": label}], byte_tokenizer(), "kto")


def test_a_judged_conversation_ends_with_its_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows = [{"messages": [USER, DOG], "kto_tag": "false"}, {"messages": [USER, CAT], "kto_tag": 1}]
    bad, good = read(tmp_path, rows, tokenizer, "kto").train
    assert (bad.desirable, good.desirable) == (False, True)
    assert tokenizer.decode(bad.answers[0]) == "a quick dog<|im_end|>\n"


def test_rows_of_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{**TEXTS, "prompt": f"{at % 10} ", "rejected": f"no {at}"} for at in range(30)]
    data = read(tmp_path, rows, byte_tokenizer(), val_size=0.2)
    prompts = [{tuple(lines(example)[0]) for example in part} for part in (data.train, data.val)]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


def test_columns_have_other_names(tmp_path: Path) -> None:
    row = {"query": TEXTS["prompt"], "better": TEXTS["chosen"], "worse": TEXTS["rejected"]}
    columns = {"prompt": "query", "chosen": "better", "rejected": "worse"}
    tokenizer = byte_tokenizer()
    assert lines(read(tmp_path, [row], tokenizer, columns=columns).train[0]) == lines(
        read(tmp_path, [TEXTS], tokenizer).train[0]
    )


def test_names_that_others_use_are_shown_in_the_refusal(tmp_path: Path) -> None:
    row = {"question": "what is a fox", "chosen_response": "a dog", "rejected_response": "a cat"}
    with pytest.raises(DataError, match="no format fits the columns") as caught:
        read(tmp_path, [row], byte_tokenizer())
    assert "columns: {chosen: chosen_response, rejected: rejected_response, prompt: question}" in str(caught.value.hint)


def test_text_whose_prompt_is_in_both_answers_stays_text(tmp_path: Path) -> None:
    """As HH-RLHF has it, for a model with a chat template too."""
    row = {"chosen": "Human: a fox?\n\nAssistant: a dog", "rejected": "Human: a fox?\n\nAssistant: the cat"}
    tokenizer = byte_tokenizer(CHATML)
    data = read(tmp_path, [row], tokenizer)
    assert tokenizer.decode(data.train[0].input_ids) == "<s>Human: a fox?\n\nAssistant: a dog</s>"
    assert data.writing.turned == {"preference": False}


@pytest.mark.parametrize("label", [True, False])
def test_answers_of_one_kind_are_told(tmp_path: Path, label: bool) -> None:
    rows = [{"prompt": f"what is {n} ", "completion": f"dog {n}", "label": label} for n in range(4)]
    told = f"all 4 answers are {'good' if label else 'bad'}"
    assert any(told in note for note in read(tmp_path, rows, byte_tokenizer(), "kto").notes)
    rows[2]["label"] = not label
    assert not any("answers are" in note for note in read(tmp_path, rows, byte_tokenizer(), "kto").notes)


def test_messages_that_hold_the_prompt_are_named_in_the_refusal(tmp_path: Path) -> None:
    row = {"messages": [USER], "chosen": DOG, "rejected": CAT}
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(DataError, match=r"write `columns: \{prompt: messages\}`"):
        read(tmp_path, [row], tokenizer)
    (example,) = read(tmp_path, [row], tokenizer, columns={"prompt": "messages"}).train
    assert isinstance(example, Compared)
