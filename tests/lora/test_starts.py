"""Where components start and how many each layer gets: the equations on small layers, then whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numeric import assert_close_to_truth, same_loss
from peft import PeftModel
from tiny_run import assembled, lines, make_recipe, train
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynlora_cli import plugins
from dynlora_cli.commands.dry_run import plan as plan_run
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.errors import RecipeError
from dynlora_cli.execution.mode import plan
from dynlora_cli.lora.directions import leading, orthonormal_rows
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.start import plan_start, with_counts
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.linear import dense_weight
from dynlora_cli.models.targets import find_targets
from dynlora_cli.pruning.allocation import in_proportion, share_out
from dynlora_cli.pruning.calibration import MEASURES, watch_inputs, weigh
from dynlora_cli.training.components import begin
from dynlora_cli.training.setup import make_accelerator, read_base, read_data

ALLOCATIONS = ["eva", "gora", "sensitivity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- sharing out -----------------------------------------------------------------------------------------------------

COSTS = {"small": 10, "large": 30, "middle": 20}


def total(counts):
    return sum(COSTS[name] * count for name, count in counts.items())


def test_the_best_components_are_taken_as_far_as_the_numbers_go():
    worth = {"small": [0.5, 0.4, 0.3, 0.2], "large": [0.01, 0.005], "middle": [0.6, 0.35, 0.1]}
    counts = share_out(worth, COSTS, 60 + 45)
    assert counts == {"small": 3, "large": 1, "middle": 2}
    assert total(counts) <= 105


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1e-9, 5.0, 0.3), (0.0, 0.0, 0.0), (100.0, 1.0, 1.0)])
def test_the_total_holds_within_one_component(weights):
    most = {"small": 16, "large": 20, "middle": 9}
    for parameters in (60, 200, 333, 500):
        counts = share_out(in_proportion(dict(zip(COSTS, weights, strict=True)), most), COSTS, parameters)
        assert all(1 <= counts[name] <= most[name] for name in COSTS)
        open_layers = [COSTS[name] for name in COSTS if counts[name] < most[name]]
        assert parameters - min(open_layers) < total(counts) <= parameters


def test_ranks_are_in_proportion_to_the_weights():
    weights = dict(zip(COSTS, (1.0, 2.0, 4.0), strict=True))
    counts = share_out(in_proportion(weights, dict.fromkeys(COSTS, 999)), COSTS, 15_000)
    assert counts["large"] == pytest.approx(2 * counts["small"], abs=2)
    assert counts["middle"] == pytest.approx(4 * counts["small"], abs=4)


def test_an_open_budget_follows_what_the_start_became():
    start = plan_start({"one": (64, 32), "two": (16, 16)}, parse_budget("auto"), 4)
    other = with_counts(start, {"one": 3, "two": 6})
    assert other.parameters == 3 * 96 + 6 * 32
    assert other.budget == start.budget
    assert other.rank_of(other.parameters) == pytest.approx(other.parameters / (96 + 32))


# -- what batches tell -----------------------------------------------------------------------------------------------


def base_of(recipe):
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), plan(recipe.train))
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, accelerator.device, plan(recipe.train))
    return base, data, accelerator


def batches_of(recipe, count=3):
    run = assembled(recipe)
    return [run.batches.step(0, index)[0] for index in range(count)]


@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
def test_weights_of_layers_are_those_of_dense_gradients(folder, checkpointing):
    recipe = make_recipe(folder, f"train.gradient_checkpointing={str(checkpointing).lower()}")
    base, _, _ = base_of(recipe)
    layers, batches = find_targets(base.model, "all-linear"), batches_of(recipe)
    found = {how: weigh(base.model, batches, layers, MEASURES[how]) for how in MEASURES}
    assert all(parameter.grad is None for parameter in base.model.parameters())
    expected = {how: dict.fromkeys(layers, 0.0) for how in MEASURES}
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        base.model.zero_grad()
        logits = base.model(**batch.inputs).logits
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").backward()
        for name, layer in layers.items():
            expected["gora"][name] += (layer.weight * layer.weight.grad).abs().mean().item()
            expected["sensitivity"][name] += layer.weight.grad.square().sum().item()
    for how in MEASURES:
        assert found[how] == pytest.approx(expected[how], rel=1e-3), how


def test_inputs_are_looked_at_once_for_layers_that_share_them(folder):
    recipe = make_recipe(folder)
    base, _, _ = base_of(recipe)
    layers, batches = find_targets(base.model, "all-linear"), batches_of(recipe, 2)
    found = watch_inputs(base.model, batches, layers, dict.fromkeys(layers, 4))
    block = "model.layers.0."
    assert found[f"{block}self_attn.q_proj"] is found[f"{block}self_attn.v_proj"]
    assert found[f"{block}mlp.gate_proj"] is found[f"{block}mlp.up_proj"]
    assert found[f"{block}self_attn.o_proj"] is not found[f"{block}self_attn.q_proj"]
    assert {one.vectors for one in found.values()} == {sum(batch.supervised for batch in batches)}
    assert not base.model.training


def low_rank_inputs(model, name):
    """Make what goes into a layer span 2 directions (and a mean); returns them."""
    directions = orthonormal_rows(torch.empty(0, 32), 2, seeded(4))
    model.get_submodule(name).register_forward_pre_hook(lambda layer, inputs: (inputs[0] @ directions.T @ directions,))
    return directions


def test_directions_are_exact_under_autocast():
    """CUDA's autocast would hand a bf16 matrix to QR, which has none."""
    matrix = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    plain = leading(matrix, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = leading(matrix, 3)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_eva_spans_the_directions_of_the_inputs(folder):
    recipe = make_recipe(folder, "adapter.init_weights=eva")
    base, data, accelerator = base_of(recipe)
    name = "model.layers.1.self_attn.o_proj"
    directions = low_rank_inputs(base.model, name)
    pool, start = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    layer = pool.layers[name]
    a_CI = layer.a_CI.double()
    spanned = (a_CI[:2] @ directions.T.double()).norm()
    assert_close_to_truth(spanned, torch.tensor(2.0).double().sqrt(), terms=8 * 32, dtype=torch.float32)
    assert_close_to_truth(a_CI @ a_CI.T, torch.eye(8).double(), terms=2 * 32, dtype=torch.float32)
    assert not layer.b_OC.any()
    assert start.counts == dict.fromkeys(pool.layers, 8)


def test_orthogonal_rows_have_the_defaults_size(folder):
    recipe = make_recipe(folder, "adapter.init_weights=orthogonal")
    base, data, accelerator = base_of(recipe)
    pool, _ = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    default = assembled(make_recipe(folder), fill=False).trained
    for name, layer in pool.layers.items():
        a_CI = layer.a_CI.double()
        assert_close_to_truth(a_CI @ a_CI.T, torch.eye(8).double() / 3, terms=2 * 32, dtype=torch.float32)
        assert layer.a_CI.norm().item() == pytest.approx(default.layers[name].a_CI.norm().item(), rel=0.1)
        assert not layer.b_OC.any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # in GPT-2's files weights are [I, O]
def test_loftq_comes_nearer_to_the_weight_before_quantization(folder, kind):
    recipe = make_recipe(folder, "model.load_in_4bit=true", "adapter.init_weights=loftq", kind=kind)
    base, data, accelerator = base_of(recipe)
    pool, _ = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    plain = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    for name, layer in pool.layers.items():
        lost = dense_weight(plain.get_submodule(name)) - dense_weight(layer.base)
        s = torch.linalg.svdvals(lost)
        assert lost.norm() > 0.1
        left = (lost - layer.delta_OI()).norm()
        assert left.item() == pytest.approx(s[layer.count :].norm().item(), rel=1e-3), "the best of that rank"


@pytest.mark.slow
@pytest.mark.parametrize("how", ALLOCATIONS)
def test_a_layer_that_was_made_to_matter_gets_more(folder, how):
    name = "model.layers.0.self_attn.o_proj"

    def counts(matters):
        recipe = make_recipe(folder, f"rank.allocation={how}", "rank.init=4")
        base, data, accelerator = base_of(recipe)
        layer = base.model.get_submodule(name)
        if matters and how == "eva":  # vectors that vary in 8 directions alike
            layer.register_forward_pre_hook(
                lambda layer, x: (torch.randn_like(x[0]) @ torch.eye(32)[:, :8] @ torch.eye(8, 32),)
            )
        elif matters:
            layer.register_forward_pre_hook(lambda layer, x: (5 * x[0],))
        pool, start = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
        uniform = plan_start(
            {n: (layer.in_features, layer.out_features) for n, layer in pool.layers.items()}, parse_budget(2), 4
        )
        assert start.counts == pool.counts
        assert pool.parameters == start.parameters
        assert uniform.parameters - max(pool.costs_K()) < start.parameters <= uniform.parameters
        assert (start.budget, start.average_rank) == (uniform.budget, uniform.average_rank)
        for n, layer in pool.layers.items():
            assert 1 <= pool.counts[n] <= ComponentLinear.most(layer.in_features, layer.out_features)
        assert how in data.notes[-1]
        return start.counts

    before, after = counts(False), counts(True)
    assert len(set(before.values())) > 1
    assert before == counts(False), "the same seed, the same counts"
    assert after[name] > before[name]


def test_a_layer_whose_inputs_have_two_directions_gets_two_components(folder):
    recipe = make_recipe(folder, "rank.allocation=eva", "rank.init=4")
    base, data, accelerator = base_of(recipe)
    low_rank_inputs(base.model, "model.layers.0.self_attn.o_proj")
    _, start = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    assert start.counts["model.layers.0.self_attn.o_proj"] == 2


# -- runs ------------------------------------------------------------------------------------------------------------

RUNS = {
    "pissa": ("adapter.init_weights=pissa", "train.weight_decay=0.1"),
    "eva": ("adapter.init_weights=eva", "rank.allocation=eva"),
    "orthogonal": ("adapter.init_weights=orthogonal", "rank.allocation=sensitivity"),
    "dora": ("adapter.variant=dora", "adapter.init_weights=eva", "rank.allocation=gora"),
    "pissa of shared ranks": ("adapter.init_weights=pissa", "rank.allocation=gora", "pruning.policy=magnitude"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_in_two_is_the_same_run(folder, name):
    recipe = make_recipe(folder, *RUNS[name], "train.save_steps=5", out=name)
    summary, events = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"]
    assert summary["loss_after"] < summary["loss_before"]
    out = Path(recipe.output_dir)
    first, ranks = (out / "adapter_model.safetensors").read_bytes(), lines(out / "rank_events.jsonl")
    again, resumed = train(recipe, resume_from=out / "checkpoints" / "step-5", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == first
    assert lines(out / "rank_events.jsonl") == ranks
    assert again["components_start"] == summary["components_start"]
    notes = [note for event in (*events, *resumed) for note in event.get("notes", ()) if "rank.allocation" in note]
    assert len(notes) == ("allocation" in str(RUNS[name])), "shared out once, and said so once"


def test_stock_peft_loads_the_doubled_rank(folder):
    recipe = make_recipe(folder, "adapter.init_weights=pissa", out="peft")
    summary, _ = train(recipe)
    base, _, _ = base_of(recipe)
    model = PeftModel.from_pretrained(base.model, recipe.output_dir).eval()
    run = assembled(make_recipe(folder))
    sums = SimpleNamespace(loss=0.0, targets=0)
    for index in range(run.val_batches.steps_per_epoch):
        for batch in run.val_batches.step(0, index):
            with torch.no_grad():
                logits = model(**batch.inputs).logits
            sums.loss += F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
            sums.targets += batch.supervised
    assert sums.loss / sums.targets == same_loss(summary["loss_after"])
    saved = sum(tensor.numel() for name, tensor in model.state_dict().items() if "lora_" in name)
    assert saved == summary["parameters"] <= summary["budget_parameters"]


def test_shared_out_without_pruning(folder):
    recipe = make_recipe(folder, "rank.allocation=gora", "rank.init=2", out="one-shot")
    summary, events = train(recipe)
    assert not [event for event in events if event["event"] == "prune"]
    assert len(set(summary["ranks"].values())) > 1
    assert summary["components"] == summary["components_start"]


@pytest.mark.parametrize(
    ("variant", "start"), [("dora", "pissa"), ("dora", "loftq"), ("singlora", "eva"), ("adalora", "orthogonal")]
)
def test_a_start_that_a_variant_does_not_take_is_refused(folder, variant, start):
    with pytest.raises(RecipeError, match=f"variant {variant} does not start as {start}"):
        make_recipe(folder, f"adapter.variant={variant}", f"adapter.init_weights={start}", "model.load_in_4bit=true")


def test_a_dry_run_shows_uniform_and_says_so(folder):
    found = plan_run(make_recipe(folder, "rank.allocation=gora", "adapter.init_weights=pissa"))
    assert {module["components"] for module in found["modules"]} == {8}
    assert "rank.allocation: gora" in " ".join(found["notes"])
    assert found["parameters"]["start"] == 4 * found["parameters"]["budget"] * 2, "8 components of 2 each, for 2"
