"""A policy with a signal and a recipe key of its own is one new file: the tutorial's, in training and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file
from tiny_run import lines, make_recipe, train
from tutorials import code_of

from dynlora_cli import plugins
from dynlora_cli.config.options import given
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.runs.folder import read_record

from toy import make

LEARNING = ("pruning.policy=learning", "pruning.decay=0.8")


@pytest.fixture(autouse=True)
def learning(plug_in: Callable[..., Path]) -> None:
    (code,) = code_of("policies").values()
    plug_in("policies", "learning", code)


def ranks(folder: Path) -> list[dict[str, int]]:
    return [event["ranks"] for event in lines(folder / "rank_events.jsonl")]


@pytest.mark.slow
def test_it_prunes_in_training_and_its_key_counts(tmp_path: Path, dynlora: Dynlora):
    for out, settings in (("a", LEARNING), ("b", (*LEARNING[:1], "pruning.decay=0.1")), ("fisher", ())):
        recipe = make_recipe(tmp_path, *settings, out=out)
        path = tmp_path / f"{out}.yaml"
        path.write_text(recipe.model_dump_json(), encoding="utf-8")
        answer = dynlora("train", path, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["parameters"] <= answer.json["budget_parameters"]
        assert answer.json["policy"] == recipe.pruning.policy
    assert read_record(tmp_path / "a")["recipe"]["pruning"]["decay"] == 0.8
    assert ranks(tmp_path / "a") != ranks(tmp_path / "fisher")
    assert ranks(tmp_path / "a") != ranks(tmp_path / "b")


@pytest.mark.slow
def test_what_it_has_seen_goes_on_with_the_run(tmp_path: Path):
    whole, _ = train(make_recipe(tmp_path, *LEARNING, out="whole"))
    cut = make_recipe(tmp_path, *LEARNING, out="cut")
    with pytest.raises(Interrupted):
        train(cut, interrupt_at=5)
    state = load_file(tmp_path / "cut" / "checkpoints" / "step-5" / "state.safetensors")
    assert state["control.observed.size"].shape == state["control.gradients.mean"].shape
    assert state["control.observed.size"].count_nonzero()
    again, _ = train(cut, resume=True)
    assert (again["ranks"], again["loss_after"]) == (whole["ranks"], whole["loss_after"])
    assert lines(tmp_path / "cut" / "rank_events.jsonl") == lines(tmp_path / "whole" / "rank_events.jsonl")


@pytest.mark.slow
def test_it_prunes_a_trained_adapter(tmp_path: Path, dynlora: Dynlora):
    train(make_recipe(tmp_path, "train.learning_rate=2e-2"))
    told = {}
    for decay in ("0.8", "0"):
        out = tmp_path / f"small-{decay}"
        answer = dynlora(
            "prune", "--adapter", tmp_path / "out", "--budget", "0.5", "--out", out, "--policy", "learning",
            "--set", f"decay={decay}", "--no-measure", "--json",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        assert read_record(out)["prune"]["options"] == {"decay": float(decay)}
        told[decay] = answer.json["ranks"]
    assert told["0.8"] != told["0"]


@pytest.mark.parametrize(
    ("policy", "setting", "words"),
    [
        ("learning", "decay=2", "got 2, must be"),
        ("learning", "decai=0.5", "did you mean 'decay'"),
        ("fisher", "decay=0.5", "policy fisher has no option 'decay'"),
    ],
)
def test_a_wrong_option_is_refused(policy: str, setting: str, words: str, tmp_path: Path, dynlora: Dynlora):
    arguments = ("--adapter", tmp_path, "--budget", "1", "--out", tmp_path / "out", "--policy", policy)
    answer = dynlora("prune", *arguments, "--set", setting)
    assert (answer.code, words in " ".join(answer.err.split())) == (2, True), answer.err


def test_the_scores_are_those_of_the_signal():
    """Against plain numbers: two steps of gradients, averaged by hand."""
    _, pool = make((2, 1, 1))
    policy = plugins.load("policies", "learning")
    observer = policy.observer(given("policies", "learning", ["decay=0.75"]), True)
    assert not policy.scores(pool, observer, torch.Generator()).any()
    expected = torch.zeros(4, dtype=torch.float64)
    for seed in range(2):
        pool.values.grad.normal_(generator=torch.Generator().manual_seed(seed))
        observer.observe(pool, 1)
        sizes = [column.double().norm() for layer in pool.layers.values() for column in layer.b_OC.grad.unbind(1)]
        expected = 0.75 * expected + 0.25 * torch.stack(sizes)
    observer.select(pool, torch.tensor([True, False, True, True]))
    torch.testing.assert_close(observer.seen["size"].double(), expected[[0, 2, 3]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", ["torch.ones(3)", "0 * pool.costs_K() / 0"])
def test_scores_must_be_one_number_for_each_component(wrong: str, tmp_path: Path, plug_in: Callable[..., Path]):
    plug_in("policies", "odd", f"import torch\n\n\ndef scores(pool, observed, generator):\n    return {wrong}\n")
    with pytest.raises(UsageError, match=r"policy odd gives no score for some of the \d+ components"):
        train(make_recipe(tmp_path, "pruning.policy=odd"))
