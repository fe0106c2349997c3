"""`dynlora merge` of several adapters: against dense arithmetic and PEFT; and inputs that are never touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from numeric import assert_close_to_truth, rounding
from peft import PeftModel
from peft_adapters import TERMS, exact_delta, ids, load, make, peft_logits
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.config.budget import Budget
from dynlora_cli.errors import Interrupted, MeasureError
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way

RANK = 8  # of the largest sum


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and two adapters on it, whose ranks and layers differ."""
    base, first = make("patterns", tmp_path)
    first = first.rename(tmp_path / "one")
    (tmp_path / "b").mkdir()
    _, second = make("lora", tmp_path / "b")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return base, first, second


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: exact_delta(factors) for name, factors in read_adapter(folder).layers.items()}


def test_exact_is_the_weighted_sum_and_peft_computes_it(pair, tmp_path: Path, dynlora: Dynlora):
    base, first, second = pair
    answer = dynlora(
        "merge", "--adapter", first, "--adapter", second, "--weights", "0.5,2", "--out", tmp_path / "sum", "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["energy_kept"] == pytest.approx(1.0)
    one, two, found = deltas(first), deltas(second), deltas(tmp_path / "sum")
    assert found.keys() == one.keys() | two.keys()
    for name, delta in found.items():
        expected = 0.5 * one.get(name, torch.zeros(())) + 2 * two.get(name, torch.zeros(()))
        assert_close_to_truth(delta, expected.expand_as(delta), terms=2 * RANK, dtype=torch.float32)
    dense = load(base).double()
    with torch.no_grad():
        for name, delta in found.items():
            dense.get_submodule(name).weight += delta
        both = peft_logits(base, tmp_path / "sum"), dense(ids()).logits
        assert_close_to_truth(*both, terms=TERMS, dtype=torch.float32)


def test_peft_concatenates_to_the_same(pair, tmp_path: Path):
    base, first, second = pair
    way = Way("exact", weights=[1.0, 1.0])
    (tmp_path / "sum").mkdir()
    save(combine([read_adapter(first), read_adapter(second)], way).adapter, tmp_path / "sum")
    model = PeftModel.from_pretrained(load(base), second, adapter_name="two")
    model.load_adapter(second, adapter_name="three")
    model.add_weighted_adapter(["two", "three"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    model.double()
    (tmp_path / "both").mkdir()
    save(combine([read_adapter(second), read_adapter(second)], way).adapter, tmp_path / "both")
    with torch.no_grad():
        both = peft_logits(base, tmp_path / "both"), model(ids()).logits
        assert_close_to_truth(*both, terms=TERMS, dtype=torch.float32)


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare"])
def test_a_budget_is_met_with_the_best_of_the_wanted_update(method: str, pair):
    _, first, second = pair
    adapters = [read_adapter(first), read_adapter(second)]
    budget = adapters[1].parameters // 2
    found = combine(adapters, Way(method, weights=[1.0, 1.0], budget=Budget("parameters", budget), density=0.7))
    assert found.adapter.parameters <= budget
    assert 0.2 < found.energy_kept < 1
    whole = combine(adapters, Way(method, weights=[1.0, 1.0], budget=Budget("parameters", 10**9), density=0.7))
    lost = sum(
        (exact_delta(whole.adapter.layers[name]) - (exact_delta(found.adapter.layers[name]) if name in found.adapter.layers else 0))
        .square().sum().item()
        for name in whole.adapter.layers
    )  # fmt: skip
    total = sum(factors.energy() ** 2 for factors in whole.adapter.layers.values())
    if method in ("svd", "linear"):
        # The factors are fp32, and so are the shares of what they hold.
        assert whole.energy_kept == pytest.approx(1.0, abs=rounding(torch.float32, 2 * RANK))
        assert 1 - lost / total == pytest.approx(found.energy_kept, abs=rounding(torch.float32, 2 * RANK))


def test_ties_is_trim_elect_and_disjoint_mean(pair):
    _, first, second = pair
    one, two = deltas(first), deltas(second)
    way = Way("ties", weights=[1.0, 1.0], budget=Budget("parameters", 10**9), density=0.5)
    found = combine([read_adapter(first), read_adapter(second)], way).adapter
    name = "model.layers.0.self_attn.q_proj"
    trimmed = []
    for delta in (one[name], two[name]):
        threshold = delta.abs().flatten().sort(descending=True).values[delta.numel() // 2 - 1]
        trimmed.append(torch.where(delta.abs() >= threshold, delta, 0))
    sign = (trimmed[0] + trimmed[1]).sign()
    kept = torch.stack([torch.where((t.sign() == sign), t, 0) for t in trimmed])
    expected = kept.sum(0) / (kept != 0).sum(0).clamp_min(1)
    assert_close_to_truth(exact_delta(found.layers[name]), expected, terms=32, dtype=torch.float32)


@pytest.mark.slow
def test_dare_is_right_on_average(pair):
    _, first, second = pair
    adapters = [read_adapter(first), read_adapter(second)]
    name, total = "model.layers.0.self_attn.q_proj", 0.0
    for seed in range(60):
        way = Way("dare", weights=[1.0, 1.0], budget=Budget("parameters", 10**9), density=0.5, seed=seed)
        total = total + combine(adapters, way).adapter.layers[name].delta_OI()
    expected = deltas(first)[name] + deltas(second)[name]
    assert (total / 60 - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("weights", [(1.0, -0.5), (1.0, 0.0), (-1.0, 1.0)])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_any_weight_gives_numbers_and_a_lone_layer_its_weighted_update(weights, method: str, pair):
    _, first, second = pair
    way = Way(method, weights=list(weights), budget=Budget("parameters", 10**9), density=1.0)
    found = combine([read_adapter(first), read_adapter(second)], way).adapter
    one, two = deltas(first), deltas(second)
    (name, *_) = two.keys() - one.keys()
    share = weights[1] if method == "dare" else (weights[1] > 0) - (weights[1] < 0)
    lone = exact_delta(found.layers[name]) if name in found.layers else torch.zeros_like(two[name])
    assert_close_to_truth(lone, share * two[name], terms=32, dtype=torch.float32)
    assert all(factors.delta_OI().isfinite().all() for factors in found.layers.values())


def test_a_layer_of_zeros_takes_no_place_of_others(pair, tmp_path: Path, dynlora: Dynlora):
    _, first, second = pair
    options = ("--method", "ties", "--weights", "1,0", "--budget", "3", "--out", tmp_path / "m", "--json")
    answer = dynlora("merge", "--adapter", first, "--adapter", second, *options)
    assert answer.code == 0, answer.err
    assert set(answer.json["ranks"]) <= set(deltas(first)), "the second weighs nothing"
    assert all(delta.isfinite().all() for delta in deltas(tmp_path / "m").values())


def test_nothing_that_is_not_a_number_is_written(pair, tmp_path: Path):
    broken = read_adapter(pair[1])
    next(iter(broken.layers.values())).b_OC[0, 0] = float("nan")
    with pytest.raises(MeasureError, match="holds NaN or infinity"):
        save(broken, tmp_path)


@pytest.mark.parametrize("command_line", ["merge", "export", "combine", "prune", "base"])
def test_what_is_read_is_never_replaced(command_line: str, pair, tmp_path: Path, dynlora: Dynlora):
    base, first, second = pair
    for folder in (base, first):
        (folder / "dynlora.json").write_text(json.dumps({"schema_version": 1, "dynlora_version": "0.1"}))
    options = {
        "merge": ("merge", "--adapter", first, "--out", first),
        "export": ("export", "--adapter", first, "--to", "peft", "--out", first),
        "combine": ("merge", "--adapter", second, "--adapter", first, "--into", "base", "--out", first),
        "prune": ("prune", "--adapter", first, "--budget", "0.5", "--out", first),
        "base": ("merge", "--adapter", first, "--out", base),
    }
    before = contents(base), contents(first)
    answer = dynlora(*options[command_line], "--overwrite")
    assert answer.code == 2
    assert "which is read and never changed" in answer.err
    assert (contents(base), contents(first)) == before


def test_a_run_that_is_not_finished_is_not_replaced_by_its_own_pruning(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=5)
    out = Path(recipe.output_dir)
    before = contents(out)
    answer = dynlora("prune", "--adapter", out, "--budget", "0.5", "--out", out, "--overwrite")
    assert (answer.code, contents(out)) == (2, before)


@pytest.mark.slow
def test_a_run_of_ours_and_an_adapter_of_peft_on_one_base(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path)
    train(recipe)
    ours = Path(recipe.output_dir)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ours / name, theirs)
    answer = dynlora("merge", "--adapter", ours, "--adapter", theirs, "--out", tmp_path / "sum", "--json")
    assert answer.code == 0, answer.err
    for name, delta in deltas(tmp_path / "sum").items():
        assert_close_to_truth(delta, 2 * deltas(ours)[name], terms=2 * RANK, dtype=torch.float32)


@pytest.mark.slow
def test_two_fine_tunes_of_one_model_are_two_bases(tmp_path: Path, dynlora: Dynlora):
    first = make_recipe(tmp_path / "a")
    train(first)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    model = Path(first.model.name_or_path)
    other = tmp_path / "b" / model.relative_to(tmp_path / "a")
    tuned = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    tuned.save_pretrained(other)
    second = make_recipe(tmp_path / "b", f"model.name_or_path={other}", out="again")
    train(second)
    answer = dynlora(
        "merge", "--adapter", first.output_dir, "--adapter", second.output_dir, "--out", tmp_path / "sum", "--json"
    )
    assert answer.code == 2
    assert "are of different bases or tasks" in answer.err


def test_several_adapters_into_the_base(pair, tmp_path: Path, dynlora: Dynlora):
    base, first, second = pair
    answer = dynlora(
        "merge", "--adapter", first, "--adapter", second, "--into", "base", "--out", tmp_path / "merged", "--json"
    )
    assert answer.code == 0, answer.err
    dense = load(base).double()
    with torch.no_grad():
        for folder in (first, second):
            for name, delta in deltas(folder).items():
                dense.get_submodule(name).weight += delta
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close_to_truth(merged(ids()).logits, dense(ids()).logits, terms=TERMS)
