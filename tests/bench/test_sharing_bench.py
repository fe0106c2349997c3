"""scripts/bench/sharing: what its forms compute and count, against single runs, torch's AdamW and stock PEFT."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "sharing")]

import shared_layers as layers  # noqa: E402 - they are scripts, not a package
import sharing  # noqa: E402
import side_by_side  # noqa: E402

LAYERS, UP = 3, (8, 12)
ONE = LAYERS * 2 * sum(UP)  # numbers of LoRA of rank 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "down": nn.Linear(12, 8)})  # noqa: E731
        self.layers = nn.ModuleList(block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return x


def targets_of(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}


def filled(form: layers.Form, rank: int, rates: list[float], net: nn.Module) -> layers.Runs:
    runs = layers.Runs(form, rank, rates, targets_of(net), 0)
    for parameter in runs.parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return runs


@pytest.mark.parametrize("name", [name for name, form in layers.FORMS.items() if not form.gamma])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_form_begins_at_the_base_and_has_the_size_of_lora(name, rank):
    net = Net()
    x_TI, targets = torch.randn(5, 8), targets_of(net)
    before = net(x_TI)
    runs = layers.Runs(layers.FORMS[name], rank, [1e-3, 2e-3], targets, 0)
    layers.attach(net, targets, [runs])
    assert torch.allclose(net(torch.stack([x_TI, x_TI])), before, atol=1e-6), "B is zero at the start"
    sizes = runs.sizes(targets)
    gates = sizes["parameters"] - rank * ONE
    assert gates >= 0
    assert (gates > 0) == layers.FORMS[name].gates
    assert gates <= 0.16 * rank * ONE, "a gate for every layer and component; the layers of this net are narrow"
    assert sizes["expanded"] >= rank * ONE


def test_every_run_computes_its_own_plain_lora():
    net, x_TI = Net(), torch.randn(5, 8)
    targets = targets_of(net)
    groups = [filled(layers.FORMS[name], 2, [1e-3, 2e-3], net) for name in ("lora", "rasa", "mos-gated")]
    plain = [{name: runs.layers[name].plain() for name in targets} for runs in groups]
    layers.attach(net, targets, groups)
    together = net(x_TI.expand(6, 5, 8))
    for number, row in enumerate(together):
        alone, factors = Net(), plain[number // 2]
        for name, module in targets_of(alone).items():
            a_CI, b_OC = (part[number % 2] for part in factors[name])
            module.weight.data += layers.SCALE * b_OC @ a_CI
        assert torch.allclose(alone(x_TI), row, atol=1e-5)


def test_layers_share_a_pool_and_differ_in_gates():
    net = Net()
    runs = filled(layers.FORMS["pool"], 1, [1e-3], net)
    one, two = (runs.layers[f"layers.{number}.up"] for number in (0, 1))
    assert one.pool is two.pool
    assert not torch.equal(one.plain()[0], two.plain()[0])
    equal = filled(layers.FORMS["pool-equal"], 1, [1e-3], net)
    assert torch.equal(equal.layers["layers.0.up"].plain()[0], equal.layers["layers.1.up"].plain()[0])


def test_the_step_is_that_of_torch_for_every_run():
    rates, clip = [1e-2, 4e-2], 0.5
    runs = filled(layers.FORMS["rasa"], 2, rates, Net())
    alone = [[nn.Parameter(p[n].detach().clone()) for p in runs.parameters] for n in range(2)]
    optimizers = [torch.optim.AdamW(group, lr=rate, weight_decay=0.1) for group, rate in zip(alone, rates, strict=True)]
    for number in range(1, 6):
        for parameter in runs.parameters:
            parameter.grad = torch.randn_like(parameter) * number
        for n, (group, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            for mine, theirs in zip(group, runs.parameters, strict=True):
                mine.grad = theirs.grad[n].clone()
            torch.nn.utils.clip_grad_norm_(group, clip)
            optimizer.step()
        runs.step(number, 1.0, 0.1, clip)
    for n, group in enumerate(alone):
        for mine, theirs in zip(group, runs.parameters, strict=True):
            assert torch.allclose(mine, theirs[n], atol=1e-5)


def test_the_start_is_the_steepest_step_of_its_rank():
    gradient_OI = torch.randn(12, 8)
    a_NCI, b_NOC = torch.zeros(1, 2, 8), torch.zeros(1, 12, 2)
    layers.start_from(gradient_OI, a_NCI, b_NOC, 16.0)
    update_OI = (b_NOC @ a_NCI)[0]
    norms = torch.linalg.svdvals(update_OI)
    assert norms[0] == pytest.approx(1 / 16, rel=1e-4)
    assert norms[2] < 1e-6
    aligned = -(update_OI * gradient_OI).sum() / update_OI.norm()
    assert aligned > 0.99 * torch.linalg.svdvals(gradient_OI)[:2].square().sum().sqrt() * 0.9


@pytest.mark.long
@pytest.mark.shared
def test_lora_side_by_side_is_stock_pefts(tmp_path, monkeypatch):
    """Twelve steps of E2E on stories260K from PEFT's own start, at two rates."""
    import quality_methods as methods

    task, rates = "small@12", [4e-3, 1.6e-2]
    found = side_by_side.train(task, 2, {"lora": rates}, 0, tmp_path)

    def theirs(ground, job):
        model, targets = methods._wrap(job, ground, methods.lora_config, 2)
        start = layers.Runs(layers.FORMS["lora"], 2, [0.0], targets, 0)
        for name, layer in start.layers.items():
            module = model.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.data.copy_(layer.own[0][0])
        methods._train_rival(model, ground)
        return methods._result(model, ground, 0, 0.0)

    for line, rate in zip(found, rates, strict=True):
        job = methods.Job(task, "lora", 2, rate, 0)
        alone = theirs(methods.lay_ground(job, tmp_path, []), job)
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert line["test"] == pytest.approx(alone["test"], rel=1e-4)


def test_rates_are_tried_until_the_best_is_inside():
    losses = {}
    while rates := sharing.next_rates(losses, 4e-3, coarse=False):
        losses |= {rate: 1 + abs(math.log2(rate / 5e-4)) for rate in rates}
    assert min(losses, key=losses.get) == pytest.approx(5e-4)
    assert sorted(round(2 * math.log2(rate / 4e-3)) for rate in losses) == [-8, -7, -6, -5, -4, -2, 0, 2]
    assert sharing.next_rates({2e-3: 2.0, 4e-3: 1.0, 8e-3: math.inf}, 4e-3, coarse=True) == []


def record(method, rate, seed, test, task="e2e@800"):
    return {
        "task": task, "method": method, "budget": 1, "rate": rate, "seed": seed, "loss": test, "test": test, "cpu": 36.0,
        "parameters": 100, "expanded": 600, "vera": 120,
    }  # fmt: skip


def test_the_rule_is_applied_at_800_steps_and_the_best_rates():
    lines = [record("lora", 4e-3, s, 2.0) for s in (0, 1)] + [record("lora", 8e-3, 0, 2.5)]
    lines += [record("pool", 2e-3, s, 1.96 - 0.01 * s) for s in (0, 1)] + [record("rasa", 2e-3, 0, 1.98)]
    lines += [record(m, 2e-3, 0, x, "e2e") for m, x in (("lora", 2.0), ("mos", 1.0))]
    text = sharing.page(lines)
    assert "`pool` at 800 steps: `test` -2.3 %, `val` -2.3 % in the mean of 1 cell: passes" in text
    assert "`rasa` at 800 steps: `test` -1.0 %, `val` -1.0 % in the mean of 1 cell: is out" in text
    assert "`mos` at" not in text, "200 steps judge nothing"
    assert "| 4.0e-03 (2) |" in text
    assert "1.00x | 6.00x | 1.20x" in text
    assert "0 runs" in sharing.page([])


def test_both_parts_must_gain_and_stock_lora_fills_in():
    stock = [record("lora", 4e-3, s, 2.0) for s in (0, 1)]
    lines = [record("pool", 2e-3, 0, 1.9) | {"loss": 2.02}, record("lora", 4e-3, 1, 9.0)]
    text = sharing.page(lines, [*stock, record("dynlora", 4e-3, 0, 1.0)])
    assert "`test` -5.1 %, `val` +1.0 % in the mean of 1 cell: is out" in text
    assert "| 4.0e-03 (1) | 2.0200 | 2.0000 |" in text
    assert "0 runs" in sharing.page([], stock)
