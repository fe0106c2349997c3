"""Gate gradients of single rows: against autograd's, against those of each row alone, and in their sum."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth
from tiny_run import assembled, in_double, make_recipe

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.row_gates import batch_gates, row_gates
from dynlora_cli.tasks.loss import summed_loss

from toy import fill, make


def toy(seed=0):
    net, pool = make(dtype=torch.float64)
    fill(pool)
    return net, pool, torch.randn(5, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def passed_back(run, batch):
    """Gate gradients of the batch's rows, from one pass. [R, K]"""
    run.trained.values.grad.zero_()
    with batch_gates(run.trained, batch) as gates:
        summed_loss(run.model, batch).backward()
    return gates.gradient_RK


def alone(run):
    """The truth: each training row is a batch of its own. [rows, K]"""
    found = []
    for example in run.data.train:
        run.trained.values.grad.zero_()
        labels = torch.tensor([[*example.labels[1:], -100]])
        loss = run.model(input_ids=torch.tensor([list(example.input_ids)])).logits
        torch.nn.functional.cross_entropy(loss[0], labels[0], reduction="sum").backward()
        found.append(run.trained.gate_gradient_K().detach())
    return torch.stack(found)


def test_equals_autograd_through_a_gate_for_each_row():
    net, pool, x = toy()
    gates = {name: torch.ones(5, 1, layer.count, dtype=torch.float64) for name, layer in net.layers().items()}
    for name, layer in net.layers().items():
        layer.gate = gates[name].requires_grad_()
    net(x).cos().sum().backward()
    truth = torch.cat([gate.grad[:, 0] for gate in gates.values()], 1)
    for layer in net.layers().values():
        layer.gate = None
    with row_gates(pool, rows=5) as found:
        net(x).cos().sum().backward()
    torch.testing.assert_close(found.gradient_RK, truth, rtol=1e-12, atol=1e-12)
    assert truth.abs().min() > 0


def test_rows_add_up_to_the_gradient_of_the_batch():
    net, pool, x = toy()
    with row_gates(pool, rows=5) as found:
        net(x).cos().sum().backward()
    torch.testing.assert_close(found.gradient_RK.sum(0), pool.gate_gradient_K(), rtol=1e-12, atol=1e-12)


def test_no_hook_stays():
    net, pool, x = toy()
    with row_gates(pool, rows=5) as found:
        pass
    net(x).sum().backward()
    assert not found.gradient_RK.any()
    assert not any(layer._forward_hooks for layer in net.layers().values())


@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_of_a_model_are_told_apart(tmp_path, packing):
    run = in_double(make_recipe(tmp_path, f"dataset.packing={packing}", "train.micro_batch_size=3"))
    truth = dict(zip((example.row for example in run.data.train), alone(run), strict=True))
    batch = run.batches.step(0, 0)[0]
    found = passed_back(run, batch)
    assert len(batch.rows) > len(batch.labels) if packing == "true" else len(batch.rows) == 3
    expected = torch.stack([truth[row] for row in batch.rows])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("mode", ["train.fused=true", "train.gradient_checkpointing=true", "adapter.freeze_a=true"])
@pytest.mark.parametrize("variant", ["lora", "adalora"])
def test_modes_and_variants_give_the_same(tmp_path, mode, variant):
    if mode.startswith("adapter") and variant != "lora":
        pytest.skip("adalora trains both")
    recipe = make_recipe(tmp_path, mode, f"adapter.variant={variant}", "train.micro_batch_size=4")
    run, truth = assembled(recipe), in_double(recipe)
    truth.trained.values.data.copy_(run.trained.values.detach())
    batch = run.batches.step(0, 0)[0]
    found, expected = passed_back(run, batch), passed_back(truth, batch)
    terms = 64 * batch.labels.shape[1]
    assert_close_to_truth(found, expected, terms=terms)
    assert_close_to_truth(found.sum(0), run.trained.gate_gradient_K().detach().double(), terms=terms)


def test_two_products_of_one_component_count_together(tmp_path):
    run = in_double(make_recipe(tmp_path, "adapter.init_weights=pissa"))
    found = passed_back(run, run.batches.step(0, 0)[0])
    run.trained.settle_gradient()
    expected = run.trained.gate_gradient_K().detach()
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def test_layers_whose_rows_cannot_be_told_apart_are_refused():
    net, pool, x = toy()
    with pytest.raises(UsageError, match="do not tell which row"), row_gates(pool, rows=5):
        net(x.flatten(0, 1))
    with row_gates(pool, rows=5, width=7) as found:
        net(x.flatten(0, 1)).cos().sum().backward()
    assert found.gradient_RK.abs().min() > 0

    class Other(ComponentLinear):
        def update(self, x, a_CI, b_OC):
            return super().update(x, a_CI, b_OC) * 2

    pool.layers["gate"].__class__ = Other
    with pytest.raises(UsageError, match="gate is no plain sum"), row_gates(pool, rows=5):
        pass
