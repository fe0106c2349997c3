"""Rows with a context: what is read of them, and what becomes of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import Dynlora
from data_helpers import CHATML, byte_tokenizer, dataset, source
from tiny_run import MARK, grounded_recipe, grounded_rows, make_recipe, model_folder, train

from dynlora_cli.config.sections import Model
from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.tasks import task as tasks

ROW = {"context": "the cat is a fox", "prompt": "what is it? ", "completion": "a fox"}


def read(
    folder: Path, *rows: Any, template: str | None = None, objective: str = "context-distillation", **more
) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = {"objective": objective, **({"context_layout": more.pop("layout")} if "layout" in more else {})}
    task = tasks.of(Model(name_or_path="builtin:tiny"), SimpleNamespace(**said))
    named = {key: more.pop(key) for key in ("columns", "format") if key in more}
    reads = more.pop("reads", None)
    data = dataset(source(path, **named), **more)
    return load_data(data, byte_tokenizer(template), task=task, seed=0, max_length=reads)


@pytest.mark.parametrize("template", [None, CHATML])
def test_without_its_context_a_row_is_one_of_prompt_and_completion(tmp_path, template):
    tokenizer = byte_tokenizer()
    (one,) = read(tmp_path, ROW, template=template).train
    (other,) = read(tmp_path, {k: ROW[k] for k in ("prompt", "completion")}, template=template, objective="sft").train
    assert type(one) is GroundedText
    assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
    assert tokenizer.decode(one.context_ids) == ROW["context"]
    asked = f"{ROW['context']}\n\n{ROW['prompt']}"
    whole = tokenizer.decode(one.teacher_ids)
    assert whole == (f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" if template else f"<s>{asked}")


@pytest.mark.parametrize("template", [None, CHATML])
def test_any_other_objective_reads_the_rows_as_it_always_did(tmp_path, template):
    with_it = read(tmp_path, ROW, template=template, objective="sft")
    without = read(tmp_path, {k: ROW[k] for k in ("prompt", "completion")}, template=template, objective="sft")
    assert with_it.sha256 == without.sha256
    assert [note for note in with_it.notes if "not read: context" in note]


def test_messages_are_read_as_well_and_the_context_goes_into_the_last_question(tmp_path):
    system, first, said, last = (
        {"role": role, "content": text}
        for role, text in (("system", "be"), ("user", "a cat?"), ("assistant", "a fox"), ("user", "why?"))
    )
    answer = [{"role": "assistant", "content": "think"}]
    row = {"context": f"{MARK} mat", "prompt": [system, first, said, last], "completion": answer}
    (example,) = read(tmp_path, row, template=CHATML).train
    decode = byte_tokenizer().decode
    student = decode([i for i, label in zip(example.input_ids, example.labels, strict=True) if label == -100])
    assert decode(example.teacher_ids) == student.replace("why?", f"{MARK} mat\n\nwhy?").rstrip("\n") + "\n"
    with pytest.raises(DataError, match="no turn of the user before the answer"):
        read(tmp_path, {**row, "prompt": [system]}, template=CHATML)


def test_an_empty_context_leaves_the_prompt_as_it_is(tmp_path):
    rows = read(tmp_path, {**ROW, "context": ""}, {**ROW, "context": None, "prompt": "why? "}).train
    for example in rows:
        assert list(example.teacher_ids) == [i for i, x in zip(example.input_ids, example.labels, strict=True) if x < 0]
        assert len(example.context_ids) == 0


def test_the_layout_is_what_the_recipe_says(tmp_path):
    (example,) = read(tmp_path, {**ROW, "prompt": "{context}? "}, layout="Q: {prompt}\nfrom: {context}").train
    assert byte_tokenizer().decode(example.teacher_ids) == f"<s>Q: {{context}}? \nfrom: {ROW['context']}"
    for wrong in ("{prompt}", "{context}", "{context}{context}{prompt}"):
        with pytest.raises(UsageError, match=r"train\.context_layout: must hold"):
            read(tmp_path, ROW, layout=wrong)


def test_a_separator_stands_behind_the_prompt_of_both(tmp_path):
    (example,) = read(tmp_path, {**ROW, "prompt": "why?"}, separator="\n").train
    decode = byte_tokenizer().decode
    assert decode(example.teacher_ids).endswith("why?\n")
    assert decode(example.input_ids).startswith("<s>why?\na fox")


def test_what_a_model_cannot_read_with_its_context_is_dropped_and_counted(tmp_path):
    """By what the model reads; max_length is for what is trained."""
    long = {**ROW, "context": "cat " * 40, "prompt": "why? "}
    data = read(tmp_path, ROW, long, reads=40, max_length=32)
    assert len(data.train) == 1
    assert data.counts["train"]["dropped"] == 1
    expected = "train: 1 row dropped: 1 row longer with the context than the model reads, 40 tokens"
    assert expected in data.notes
    assert len(read(tmp_path, ROW, long, max_length=32).train) == 2
    with pytest.raises(DataError) as refused:
        read(tmp_path, long, reads=40, max_length=32)
    assert "dynlora adapt" in refused.value.hint


def test_a_cut_answer_is_cut_for_the_teacher_too(tmp_path):
    (example,) = read(tmp_path, {**ROW, "completion": "fox " * 40}, max_length=24).train
    lesson = example.lesson()
    assert len(example.input_ids) == 24
    assert [x for x in lesson.labels if x >= 0] == [x for x in example.labels if x >= 0]
    assert list(lesson.input_ids[-10:]) == list(example.input_ids[-10:])


@pytest.mark.parametrize("missing", [{}, {"completion": None}, {"completion": ""}])
def test_rows_without_answers_name_the_command_that_writes_them(tmp_path, missing):
    row = {k: ROW[k] for k in ("context", "prompt")} | missing
    with pytest.raises(DataError, match=r"rows\.jsonl:1: there is no 'completion'; `dynlora adapt"):
        read(tmp_path, row)


def test_other_names_of_the_columns_are_known(tmp_path):
    row = {"passage": "the cat", "question": "what? ", "answer": "a cat"}
    with pytest.raises(DataError) as refused:
        read(tmp_path, row)
    assert "columns: {context: passage, prompt: question, completion: answer}" in refused.value.hint
    named = {"context": "passage", "prompt": "question", "completion": "answer"}
    assert read(tmp_path, row, columns=named).sha256 == read(tmp_path, {k: row[n] for k, n in named.items()}).sha256


def test_contexts_are_part_of_what_a_run_is_known_by(tmp_path):
    assert read(tmp_path, ROW).sha256 != read(tmp_path, {**ROW, "context": "the cat is a dog"}).sha256


def test_a_format_that_the_objective_does_not_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError) as refused:
        read(tmp_path, ROW, format="grounded", objective="sft")
    assert refused.value.hint == "its rows are for train.objective context-distillation"


def test_a_recipe_for_such_rows_learns_their_answers(tmp_path, dynlora: Dynlora):
    """A context beside prompt and completion says nothing of what its owner wants."""
    rows, out = grounded_rows(tmp_path), tmp_path / "recipe.yaml"
    answer = dynlora("init", rows, "--model", model_folder(tmp_path), "--out", out)
    assert answer.code == 0, answer.err
    assert "context-distillation" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["dataset.train_on=all"], "the teacher speaks of answers"),
        (["train.cuda_graphs=true"], "are not captured"),
        (["train.kept_tokens=0"], "at least 1"),
        (["train.answer_share=1.5"], "train.answer_share"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path, settings, problem):
    with pytest.raises(UsageError, match=problem):
        grounded_recipe(tmp_path, *settings)


def test_a_run_is_measured_and_added_and_replayed(tmp_path, dynlora: Dynlora):
    train(grounded_recipe(tmp_path, "train.max_steps=2"))
    answer = dynlora("eval", "--adapter", tmp_path / "out", "--samples", "2", "--json")
    assert answer.code == 0, answer.err
    assert {"loss", "perplexity", "token_accuracy"} <= answer.json["adapters"][0].keys()
    plain = dynlora("eval", "--adapter", tmp_path / "out", "--data", model_rows(tmp_path), "--json")
    assert plain.code == 0, plain.err
    assert "measured is the loss of their answers" in plain.err
    shown = dynlora("inspect", "--adapter", tmp_path / "out", "--json")
    assert shown.code == 0, shown.err
    added = dynlora("library", "add", tmp_path / "lib", "--adapter", tmp_path / "out", "--json")
    assert added.code == 0, added.err
    (held_out,) = (tmp_path / "lib" / "held_out").glob("*.jsonl")
    assert '"kind": "OneText"' in held_out.read_text(encoding="utf-8")
    again = grounded_recipe(tmp_path, f"adapter.from={tmp_path / 'out'}", "dataset.replay={share: 0.2}", out="again")
    summary, events = train(again.model_copy(update={"train": again.train.model_copy(update={"max_steps": 2})}))
    assert any("replay: " in str(event) for event in events)
    assert summary["forgetting"] is not None
    sft = make_recipe(tmp_path, f"adapter.from={tmp_path / 'out'}", "dataset.replay={share: 0.2}", out="sft")
    with pytest.raises(UsageError, match="questions about contexts"):
        train(sft)


def model_rows(folder: Path) -> Path:
    path = folder / "plain.jsonl"
    path.write_text('{"prompt": "what? ", "completion": "a cat"}\n', encoding="utf-8")
    return path
