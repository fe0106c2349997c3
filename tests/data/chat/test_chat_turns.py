"""Rows of prompt and answer as turns of user and assistant: `dataset.chat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
from data_helpers import BARE, CHATML, LLAMA3, MISTRAL, byte_tokenizer, dataset, task_named
from eval_helpers import Run
from pico import pico_recipe
from tiny_run import make_recipe, train

from dynlora_cli.commands import evaluate
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, Interrupted, RecipeError
from dynlora_cli.evaluation import options as options_module

PAIR = {"prompt": "what is a fox ", "completion": " a quick dog"}
ORDER = {"instruction": "think", "output": "the cat"}


def read(tmp_path: Path, rows: list[dict[str, Any]], template: str | None, **settings: Any) -> tuple[Data, list[Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = byte_tokenizer(template)
    writing = settings.pop("writing", None)
    data = load_data(dataset(path, **settings), tokenizer, task=task_named(), seed=0, writing=writing)
    return data, show_example(data.train[0], tokenizer)


TURNS = [
    ("<|im_start|>user\nwhat is a fox <|im_end|>\n<|im_start|>assistant\n", False),
    (" a quick dog<|im_end|>", True),
    ("\n", False),
]
TEXT = [("<s>what is a fox ", False), (" a quick dog</s>", True)]


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (CHATML, "auto", TURNS),
        (CHATML, True, TURNS),
        (CHATML, False, TEXT),
        (None, "auto", TEXT),
        ("", "auto", TEXT),
        (None, False, TEXT),
    ],
)
def test_what_a_pair_becomes(tmp_path: Path, template: str | None, chat: Any, expected: list[Any]) -> None:
    data, pieces = read(tmp_path, [PAIR], template, chat=chat)
    assert pieces == expected
    says = [note for note in data.notes if "dataset.chat" in note]
    assert len(says) == (chat == "auto" and bool(template))
    assert data.writing.turned == ({"completion": expected == TURNS} if template else {})


def test_turns_without_a_template_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a chat template") as refused:
        read(tmp_path, [PAIR], None, chat=True)
    assert "dataset.chat_template" in str(refused.value.hint)


def test_orders_without_turns_have_the_classic_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, [ORDER], CHATML)[1][1] == ("the cat<|im_end|>", True)
    _, pieces = read(tmp_path, [ORDER], CHATML, chat=False)
    assert pieces[0][0].endswith("### Instruction:\nthink\n\n### Response:\n")


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        (CHATML, "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n", "the dog"),
        (LLAMA3, "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n", "the dog"),  # another model's
        (LLAMA3, "<|head|>user<|tail|>\n\na fox<|eot|><|head|>assistant<|tail|>\n\n", "the dog"),  # only this model's
        (MISTRAL, "[INST] a fox [/INST]", "the dog"),
        (templates.GEMMA3, "<start_of_turn>user\na fox<end_of_turn>\n<start_of_turn>model\n", "the dog"),
        (BARE, "user: a fox\nassistant: ", "the dog"),
        (CHATML, "Below is an order.\n\n### Response:\n", "the dog"),
        (CHATML, "a fox", "the dog</s>"),
    ],
)
def test_rows_in_a_template_s_form_already_stay(tmp_path: Path, template: str, prompt: str, completion: str) -> None:
    rows = [{"prompt": prompt, "completion": completion}] * 3 + [PAIR]
    data, pieces = read(tmp_path, rows, template)
    assert "".join(text for text, _ in pieces).endswith(prompt + completion.removesuffix("</s>") + "</s>")
    assert [note for note in data.notes if "stay as they are, for they have" in note]
    assert data.writing.turned == {"completion": False}


def test_a_mark_in_few_rows_is_said(tmp_path: Path) -> None:
    odd = PAIR | {"prompt": "what does <|im_start|> mean"}
    data, pieces = read(tmp_path, [PAIR, odd, PAIR, PAIR], CHATML)
    assert pieces == TURNS
    assert [note for note in data.notes if note.endswith("1 of the first 4 have a template's marks in them already")]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"text": "a fox"}, True),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, False),
    ],
)
def test_what_is_always_turns_or_never(tmp_path: Path, row: dict[str, Any], chat: bool) -> None:
    assert [note for note in read(tmp_path, [row], CHATML, chat=chat)[0].notes if "dataset.chat is not used" in note]


def test_another_run_s_choice_holds(tmp_path: Path) -> None:
    old = Writing.of({"recipe": {"dataset": {}, "x": 1}, "started": "2026-01-02T03:04:05+0000"})
    assert old.turned == {}
    old = Writing.of({"recipe": {"dataset": {"train": []}}, "started": "2026-01-02T03:04:05+0000"})
    assert read(tmp_path, [PAIR], CHATML, writing=old)[1] == TEXT
    assert read(tmp_path, [ORDER], CHATML, writing=old)[1][1] == ("the cat<|im_end|>", True)
    assert read(tmp_path, [ORDER], None, writing=old)[1][1] == ("the cat</s>", True)


def test_a_decoder_knows_no_turns(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dataset\.chat"):
        make_recipe(tmp_path, "dataset.chat=true", "model.task=seq2seq-lm")


def chat_pairs(tmp_path: Path, **settings: Any) -> Run:
    """A run on pairs, with a model that has a chat template."""
    rows = [{"prompt": f"sort {number} ", "completion": f"done {number}"} for number in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(tmp_path / "pairs.jsonl")], "val_size": 0.2, "max_length": 96, "chat_template": CHATML}
    path = pico_recipe(tmp_path, dataset=data | settings)
    return Run(tmp_path / "out", path, {})


def measured(run: Run, data: Path | None = None) -> dict[str, Any]:
    options = options_module.Options(generate=0, samples=1)
    return evaluate.run([run.folder], data, options, lambda line: None)


@pytest.mark.parametrize("chat", ["auto", False])
def test_eval_and_its_samples_ask_as_training_did(tmp_path: Path, chat: Any) -> None:
    run = chat_pairs(tmp_path, chat=chat)
    train(load_recipe(run.recipe))
    opened = "<|im_start|>user\nsort " if chat == "auto" else "sort "
    for data in (None, run.recipe, tmp_path / "pairs.jsonl"):
        assert measured(run, data)["samples"][0]["prompt"].startswith(opened)


def test_a_run_of_version_0_1_goes_on_with_bare_text(tmp_path: Path) -> None:
    run = chat_pairs(tmp_path, chat=False)
    plain = load_recipe(run.recipe)
    with pytest.raises(Interrupted):
        train(plain, interrupt_at=2)
    record = json.loads((run.folder / "dynlora.json").read_text())
    del record["recipe"]["dataset"]["chat"], record["data"]["date"], record["data"]["turned"]
    (run.folder / "dynlora.json").write_text(json.dumps(record))
    chat_pairs(tmp_path)
    train(load_recipe(run.recipe), resume=True)
    after = json.loads((run.folder / "dynlora.json").read_text())
    assert after["data"]["sha256"] == record["data"]["sha256"]
    assert measured(run)["samples"][0]["prompt"].startswith("sort ")


def test_the_form_is_said_where_it_matters(tmp_path: Path) -> None:
    """On the card, and where an adapter is asked in a form that it did not learn."""
    folders = []
    for name, chat in (("one", "auto"), ("two", False)):
        (tmp_path / name).mkdir()
        run = chat_pairs(tmp_path / name, chat=chat)
        train(load_recipe(run.recipe))
        folders.append(run.folder)
    cards = [(folder / "README.md").read_text() for folder in folders]
    assert "Ask it by turns" in cards[0]
    assert "Ask it with bare text" in cards[1]
    rows = tmp_path / "one" / "pairs.jsonl"
    report = evaluate.run(
        folders, rows, options_module.Options(base=str(tmp_path / "one" / "pico"), generate=0), lambda line: None
    )
    assert any("learned completion rows as text, and is asked with turns" in note for note in report["notes"])
