"""Answers while a model trains: the same prompts each time, and a run that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import byte_tokenizer
from tiny_architectures import write_model
from tiny_run import assembled, lines, make_recipe, train, write_rows

from dynlora_cli.config.recipe import Recipe
from dynlora_cli.evaluation.generation import Prompt
from dynlora_cli.execution.mode import plan
from dynlora_cli.runs.log import read_run
from dynlora_cli.training import samples
from dynlora_cli.training.samples import choose

WAYS = {
    "plain": [],
    "dropout": ["adapter.dropout=0.1"],
    "packing": ["dataset.packing=true", "train.micro_batch_size=1"],
    "checkpointing": ["train.gradient_checkpointing=true", "adapter.dropout=0.1"],
    "unfused": ["train.fused=false"],
    "every row": ["train.micro_batch_size=1", "eval.steps=1"],
}


def looks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "samples"]


def notes(events: list[dict[str, Any]]) -> str:
    told = [event["text"] for event in events if event["event"] == "note"]
    return "\n".join(told + [note for event in events for note in event.get("notes") or ()])


@pytest.mark.parametrize(
    "way", ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "plain")]
)
def test_a_run_is_the_same_to_the_bit_with_and_without_answers(tmp_path: Path, way: str):
    weights, records = [], []
    for count in (0, 3):
        summary, events = train(make_recipe(tmp_path, *WAYS[way], f"eval.samples={count}", out=f"out{count}"))
        folder = Path(summary["output_dir"])
        weights.append((folder / "adapter_model.safetensors").read_bytes())
        metrics = [line for line in lines(folder / "metrics.jsonl") if line["event"] != "samples"]
        records.append((metrics, lines(folder / "rank_events.jsonl")))
        assert bool(looks(events)) == bool(count)
    assert weights[0] == weights[1]
    assert records[0] == records[1]


def test_the_same_prompts_are_answered_at_each_evaluation(tmp_path: Path):
    summary, events = train(make_recipe(tmp_path))
    found = looks(events)
    assert [event["step"] for event in found] == [0, 4, 8, 12] == [e["step"] for e in events if e["event"] == "eval"]
    asked = [[(one["prompt"], one["expected"]) for one in event["samples"]] for event in found]
    assert len(asked[0]) == 2
    assert all(prompts == asked[0] for prompts in asked)
    assert all(prompt.endswith("->") and expected for prompt, expected in asked[0])
    # Untrained, the toy says anything; in twelve steps it comes to say something else.
    assert found[0]["samples"][0]["answer"] != found[-1]["samples"][0]["answer"]
    folder = Path(summary["output_dir"])
    assert read_run(folder).samples == found
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Answers while it trained" in page
    assert asked[0][0][1] in page


def test_no_random_number_is_drawn_and_the_model_is_as_before(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, "adapter.dropout=0.1"))
    events: list[dict[str, Any]] = []
    run.emit = events.append
    random, config = torch.get_rng_state(), run.model.generation_config
    modes = [module.training for module in run.model.modules()]
    samples.show(run)
    assert len(looks(events)) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in run.model.modules()] == modes
    assert run.model.generation_config is config
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in run.parameters)


def test_a_model_that_cannot_answer_trains_on_and_that_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no cache for this one")

    monkeypatch.setattr(samples, "generate", fail)
    summary, events = train(make_recipe(tmp_path))
    assert summary["ok"]
    assert not looks(events)
    assert notes(events).count("no answers are shown while training (eval.samples): RuntimeError: no cache") == 1


def test_long_prompts_and_answers_are_cut_in_the_log(tmp_path: Path):
    run = assembled(make_recipe(tmp_path))
    long = "x" * 400 + "end"
    run.samples = [Prompt(tuple(run.samples[0].ids), long, ["begin" + "y" * 400], longest=4)]
    events: list[dict[str, Any]] = []
    run.emit = events.append
    samples.show(run)
    (one,) = looks(events)[0]["samples"]
    assert one["prompt"] == "…" + long[1 - samples.KEPT :]
    assert len(one["expected"]) == samples.KEPT
    assert one["expected"].startswith("beginy")
    assert one["expected"].endswith("…")


# -- where there are none --------------------------------------------------------------------------------------------


def chosen(recipe: Recipe, held_out: Any = None) -> tuple[list[Prompt], list[str]]:
    told: list[str] = []
    rows = assembled(recipe).data.val if held_out is None else held_out
    return choose(recipe, byte_tokenizer(), rows, plan(recipe.train), told), told


@pytest.mark.parametrize(("setting", "said"), [((), False), (("eval.samples=1",), True)])
def test_a_classifier_has_none_and_says_so_where_asked(tmp_path: Path, setting: tuple[str, ...], said: bool):
    _, events = train(make_recipe(tmp_path, "train.max_steps=2", *setting, kind="bert"))
    assert not looks(events)
    assert ("writes no text: it names classes" in notes(events)) == said


@pytest.mark.parametrize("key", ["compile", "cuda_graphs", "shard_base"])
def test_ways_of_running_that_leave_no_model_to_ask_are_named(tmp_path: Path, key: str):
    recipe = make_recipe(tmp_path)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={key: True})})
    prompts, told = chosen(other, held_out=assembled(recipe).data.val)
    assert not prompts
    (note,) = told
    assert note.startswith("no answers are shown while training (eval.samples): ")
    assert f"train.{key}" in note


def test_without_held_out_rows_there_is_nothing_to_ask(tmp_path: Path):
    assert chosen(make_recipe(tmp_path), held_out=[]) == ([], [])
    asked = chosen(make_recipe(tmp_path, "eval.samples=2"), held_out=[])
    assert asked == ([], ["no answers are shown while training (eval.samples): no rows are held out"])
    assert chosen(make_recipe(tmp_path, "eval.samples=0"), held_out=[]) == ([], [])


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_plain_texts_are_gone_on_with(tmp_path: Path):
    rows = tmp_path / "texts.jsonl"
    text = "it was a dark and stormy night and the rain fell"
    rows.write_text("".join(json.dumps({"text": f"{n}: {text}"}) + "\n" for n in range(30)), encoding="utf-8")
    recipe = make_recipe(tmp_path, f"dataset.train=[{{path: {rows}, format: text}}]", "train.max_steps=2")
    _, events = train(recipe)
    first = looks(events)[0]["samples"][0]
    opening, rest = first["prompt"], first["expected"]
    assert " ".join(f"{opening} {rest}".split()).replace(" ", "").endswith(text.replace(" ", ""))
    assert opening
    assert rest


@pytest.mark.slow
def test_an_encoder_and_a_decoder_answer(tmp_path: Path):
    write_model(tmp_path / "t5", "t5")
    rows = write_rows(tmp_path / "pairs.jsonl")
    settings = [f"model.name_or_path={tmp_path / 't5'}", "model.task=seq2seq-lm", "train.max_steps=2"]
    _, events = train(make_recipe(tmp_path, *settings, f"dataset.train=[{{path: {rows}}}]"))
    assert [event["step"] for event in looks(events)] == [0, 2]
