"""Policy `retrieval`: the empirical Fisher information row by row, rows weighted by their confidence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_run import assembled, in_double, make_recipe, train, write_rows

from dynlora_cli.commands import prune
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.options import given
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.pruning.row_fisher import RowFisher
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training.step import step


def recipe_with(folder, confidence, *overrides):
    """The tiny recipe, its rows with a column `confidence`; None: without."""
    make_recipe(folder)
    path = folder / "llama.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if confidence is not None:
        rows = [row | {"confidence": confidence(number)} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_recipe(folder / "llama.yaml", ["pruning.policy=retrieval", *overrides])


def by_hand(run, rows):
    """Squared gate gradients of rows, each passed back alone. [rows, K]"""
    squares = []
    for example in rows:
        run.trained.values.grad.zero_()
        labels = torch.tensor([*example.labels[1:], -100])
        logits = run.model(input_ids=torch.tensor([list(example.input_ids)])).logits[0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        squares.append(run.trained.gate_gradient_K().detach().square())
    run.trained.values.grad.zero_()
    return torch.stack(squares)


@pytest.mark.parametrize("weigh", ["confidence", "doubt"])
def test_a_step_is_the_weighted_sum_over_its_rows(tmp_path, weigh):
    recipe = recipe_with(tmp_path, lambda n: (n % 5) / 4, f"pruning.weigh={weigh}", "pruning.start=0.0")
    run = in_double(recipe)
    batches = run.batches.step(0, 0)
    rows = [next(e for e in run.data.train if e.row == row) for batch in batches for row in batch.rows]
    squares_NK = by_hand(run, rows)
    c = torch.tensor([example.confidence for example in rows], dtype=torch.float64)
    weights = c if weigh == "confidence" else 1 - c
    assert len(set(weights.tolist())) > 1
    step(run, batches)
    found = run.control.observer.mean(run.trained)
    expected = weights @ squares_NK / weights.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8 * expected.max().item())


def test_equal_confidences_are_the_exact_fisher_information(tmp_path):
    recipe = recipe_with(tmp_path, lambda n: 0.25, "pruning.start=0.0", "dataset.packing=true")
    run = in_double(recipe)
    truth = by_hand(run, run.data.train).mean(0)
    observer = RowFisher()
    for number in range(run.batches.steps_per_epoch):
        batches = run.batches.step(0, number)
        for batch in batches:
            with observer.watching(run.trained, batch, divisor=7.0):
                (summed_loss(run.model, batch) / 7).backward()
        observer.gather(lambda tensor: tensor)
        observer.observe(run.trained, 1.0)
    torch.testing.assert_close(observer.mean(run.trained), truth, rtol=1e-5, atol=1e-8 * truth.max().item())


def test_a_process_without_rows_takes_part_in_the_sum(tmp_path):
    run, observer, asked = assembled(recipe_with(tmp_path, None)), RowFisher(), []
    (batch,) = run.batches.step(0, 0)[:1]
    with observer.watching(run.trained, replace(batch, rows=[], confidence=())):
        pass
    observer.gather(lambda tensor: asked.append(tensor) or tensor)
    assert [len(tensor) for tensor in asked] == [run.trained.components + 1], "the others would wait for it"


def test_without_confidences_it_says_that_it_is_fisher(tmp_path):
    run = assembled(recipe_with(tmp_path, None))
    assert any("counts all alike: it is fisher" in note for note in run.data.notes)
    with pytest.raises(UsageError, match="no row has a confidence below 1"):
        assembled(recipe_with(tmp_path, None, "pruning.weigh=doubt"))


def test_confidences_that_no_policy_reads_are_named(tmp_path):
    run = assembled(recipe_with(tmp_path, lambda n: 0.5, "pruning.policy=fisher"))
    assert any("have a confidence, which pruning.policy: retrieval alone reads" in note for note in run.data.notes)
    assert not any("not read" in note for note in run.data.notes)
    assert set(run.data.confidence.values()) == {0.5}


@pytest.mark.parametrize("value", [1.5, -0.1, "high", True, [0.5]])
def test_a_confidence_is_a_number_from_0_to_1(tmp_path, value):
    with pytest.raises(DataError, match=r"llama.jsonl:1: column 'confidence' is .*, and must be from 0 to 1"):
        assembled(recipe_with(tmp_path, lambda n: value))


def test_another_column_can_be_the_confidence(tmp_path):
    recipe = recipe_with(tmp_path, None)
    path = tmp_path / "llama.jsonl"
    rows = [json.loads(line) | {"score": str(number / 40)} for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = recipe.dataset.train[0].model_copy(update={"columns": {"confidence": "score"}})
    recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"train": [source]})})
    run = assembled(recipe)
    assert {example.row: example.confidence for example in run.data.train} == {
        example.row: example.row / 40 for example in run.data.train
    }


@pytest.mark.slow
def test_training_prunes_and_resumes_by_it(tmp_path):
    recipe = recipe_with(tmp_path, lambda n: (n % 3) / 2, "pruning.weigh=doubt")
    summary, events = train(recipe)
    assert [event["event"] for event in events].count("prune") == 3
    assert summary["parameters"] <= summary["budget_parameters"]


@pytest.mark.slow
def test_an_adapter_is_pruned_by_the_rows_of_a_file(tmp_path):
    train(make_recipe(tmp_path, "rank.init=4", "rank.budget=4"))
    file = write_rows(tmp_path / "more.jsonl", 12)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = {}
    for weigh in ("confidence", "doubt"):
        file.write_text("".join(json.dumps(row | {"confidence": n / 20}) + "\n" for n, row in enumerate(rows)))
        request = prune.Request(
            path=tmp_path / "out",
            budget=parse_budget(0.5),
            out=tmp_path / weigh,
            policy="retrieval",
            options=given("policies", "retrieval", [f"weigh={weigh}"]),
            data=file,
            measure=False,
        )
        kept[weigh] = prune.run(request)
    assert kept["doubt"]["parameters"] <= kept["doubt"]["budget_parameters"]
    assert kept["doubt"]["energy_kept"] != kept["confidence"]["energy_kept"]
