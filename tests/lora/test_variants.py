"""Every file of lora/variants keeps the promises of a variant; what PEFT has too computes what PEFT computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numeric import assert_close_to_truth, same_loss
from tiny_run import make_recipe, train

from dynlora_cli import plugins
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import RecipeError
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.execution.mode import plan
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.linear import dense_weight
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.setup import read_base, read_data

# t-lora needs a denoiser: tests/lora/test_rank_by_timestep.py
NAMES = [n for n in plugins.names("variants") if plugins.load("variants", n).has_components and n != "t-lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def recipe_of(folder, name, *overrides):
    return make_recipe(folder, f"adapter.variant={name}", *overrides, out=f"out-{name}")


def one_layer(folder, name, count=4, dtype=torch.float64, d_in=10, d_out=12):
    """A layer of the variant around a random base, by its own attach."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(d_in, d_out)}).requires_grad_(False)
    shape = {"layer": count}
    cost = sum(plugins.load("variants", name).Layer.widths(d_in, d_out))
    start, recipe = Start(shape, count * cost, count * cost, count), recipe_of(folder, name)
    pool = plugins.load("variants", name).attach(model, {"layer": model["layer"]}, start, recipe.adapter, recipe.seed)
    if dtype is torch.float64:
        model.double()
        pool.adopt(pool.values.detach().double(), pool.counts)
        for extra, value in vars(pool.layers["layer"]).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(pool.layers["layer"], extra, value.double())
    return model, pool


def fill(pool: Pool):
    """Values as of a trained adapter, far from the start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        pool.values.add_(0.3 * torch.randn(pool.parameters, generator=generator))
        for layer in pool.layers.values():
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad and not any(parameter is leaf for leaf in (layer.a_CI, layer.b_OC)):
                    parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
    for layer in pool.layers.values():
        layer.begin_step(8, 10)
        layer.after_update(0.0)


def test_the_start_is_the_base(folder, name):
    model, pool = one_layer(folder, name)
    x = torch.randn(3, 10, dtype=torch.float64)
    model.train()
    # DoRA's m is made of the base's norms in fp32.
    assert_close_to_truth(model["layer"](x), pool.layers["layer"].base(x), terms=10 + 4, dtype=torch.float32)


def test_delta_is_what_forward_adds(folder, name):
    model, pool = one_layer(folder, name)
    fill(pool)
    model.eval()
    layer, x = pool.layers["layer"], torch.randn(3, 10, dtype=torch.float64)
    delta = layer.delta_OI()
    assert delta.norm() > 0.1
    W = dense_weight(layer.base).double() + delta
    expected = torch.nn.functional.linear(x, W, layer.base.bias)
    assert_close_to_truth(layer(x), expected, terms=10 + 4, dtype=torch.float32)  # what is stored is fp32


def test_gradients_are_those_of_finite_differences(folder, name):
    model, pool = one_layer(folder, name, count=3, d_in=5, d_out=4)
    fill(pool)
    model.train()
    layer = pool.layers["layer"]
    constant = name == "dora"  # its norm carries no gradient, by its definition: held as it is here
    if constant:
        norm_O = layer.norm_O()
        layer.norm_O = lambda: norm_O
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def loss():
        return (layer(x) * weight).sum().item()

    turns = [1, 2] if name == "autolora" else [9]  # it trains gates and factors in turn
    found, expected = torch.zeros(pool.parameters).double(), torch.zeros(pool.parameters).double()
    for number in turns:
        layer.begin_step(number, 10)
        pool.values.grad.zero_()
        (layer(x) * weight).sum().backward()
        found += pool.values.grad
    for place in range(pool.parameters):
        with torch.no_grad():
            pool.values[place] += 1e-6
            above = loss()
            pool.values[place] -= 2e-6
            expected[place] = (above - loss()) / 2e-6
            pool.values[place] += 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gate_gradient_is_that_of_a_factor_before_the_component(folder, name):
    model, pool = one_layer(folder, name)
    fill(pool)
    model.train()
    layer, x = pool.layers["layer"], torch.randn(3, 10, dtype=torch.float64)
    layer.begin_step(9, 10)
    weight = torch.randn(3, 12, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    found = pool.gate_gradient_K()
    layer.gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    if name == "dora":
        norm_O = layer.norm_O()
        layer.norm_O = lambda: norm_O
    (layer(x) * weight).sum().backward()
    assert_close_to_truth(found, layer.gate.grad, terms=3 * 12, dtype=torch.float32)


def test_components_go_down_to_one(folder, name):
    model, pool = one_layer(folder, name)
    fill(pool)
    layer, x = pool.layers["layer"], torch.randn(3, 10, dtype=torch.float64)
    model.eval()
    keep = torch.tensor([True, False, True, False])
    with pool.masked(keep), torch.no_grad():
        expected = layer(x)
    optimizer = torch.optim.AdamW([pool.values], lr=1e-2)
    shrink(pool, optimizer, keep)
    assert_close_to_truth(layer(x), expected, terms=10 + 4, dtype=torch.float32)
    shrink(pool, optimizer, torch.tensor([True, False]))
    assert layer.count == 1
    layer(x).square().mean().backward()
    optimizer.step()
    assert layer(x).isfinite().all()


@pytest.mark.slow
def test_trained_pruned_saved_and_resumed(folder, name):
    """The folder alone computes what training computed; a run that was cut in two is the same run, bit by bit."""
    recipe = recipe_of(folder, name, "train.save_steps=5", "eval.steps=12")
    summary, _ = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"]
    out = Path(recipe.output_dir)
    first = (out / "adapter_model.safetensors").read_bytes()

    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    rows = make_batches(recipe, data.val, base, shuffle=False)
    with attached(base.model, read_adapter(out)):
        found = held_out(base.model, (b for index in range(rows.steps_per_epoch) for b in rows.step(0, index)))
    assert found["loss"] == same_loss(summary["loss_after"])
    assert found["loss"] != pytest.approx(summary["loss_before"], rel=1e-4)

    for step in (5, 12):  # the last one: nothing is left to do but to save
        again, _ = train(recipe, resume_from=out / "checkpoints" / f"step-{step}", overwrite=True)
        assert (out / "adapter_model.safetensors").read_bytes() == first
        assert again["loss_after"] == summary["loss_after"]


def test_dora_is_evaluated_with_the_factors_of_now(folder):
    model, pool = one_layer(folder, "dora")
    x = torch.randn(3, 10, dtype=torch.float64)
    model.train()
    model["layer"](x)
    fill(pool)  # in place, as an optimizer does
    training = model["layer"](x)
    fill(pool)
    found = model.eval()["layer"](x)
    assert not torch.equal(found, training)
    torch.testing.assert_close(found, model.train()["layer"](x))


def test_vera_holds_copies_of_its_pair_only_when_it_has_to(folder):
    _, pool = one_layer(folder, "vera", dtype=torch.float32)
    layer, x = pool.layers["layer"], torch.randn(3, 10)
    layer(x)
    assert layer._A_CI.data_ptr() == layer.pair[0].data_ptr()
    shrink(pool, torch.optim.AdamW([pool.values]), torch.tensor([False, True, False, True]))
    layer(x)
    before = layer._A_CI
    assert torch.equal(before, layer.pair[0][[1, 3]])
    layer(x)
    assert layer._A_CI is before, "gathered once"
    assert pool.parameters == 2, "a component is one number"


def test_vera_has_no_scale_to_set(folder):
    with pytest.raises(RecipeError, match=r"adapter\.alpha: variant vera has no use for it"):
        recipe_of(folder, "vera", "adapter.alpha=16")


def test_hira_keeps_no_matrix_of_the_base_for_the_backward_pass(folder):
    model, pool = one_layer(folder, "hira", dtype=torch.float32)
    model.train()
    sizes = []
    pack = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update = pool.layers["layer"].update(torch.randn(3, 10), *pool.layers["layer"].factors())
    assert sizes
    assert max(sizes) < 120, "the base is 12 x 10"
    update.sum().backward()
