"""One optimizer step: its gradient, its rate, and what must not change either."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from numeric import assert_close_to_truth, rounding, same_loss
from tiny_run import assembled, in_double, lines, make_recipe, train

from dynlora_cli.execution.modes.checkpointing import Host
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training import step as step_module
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.step import step

EIGHT_ROWS = ["dataset.val_size=0", "eval.steps=null"]


# Roundings on the way to a gradient: sums over up to 32 and 64 numbers in each of two blocks, and back. Those of the
# many numbers of a gradient are not all one way.
ROUNDING = rounding(torch.float32, 2 * round((2 * 2 * 2 * (32 + 64)) ** 0.5))


def gradient(run, micro_batches=None):
    """(mean loss, gradient of everything that trains) of the run's first step, which updates nothing."""
    found = {}

    def keep(run, *, skipped):
        found["gradient"] = torch.cat([p.grad.flatten().clone() for p in run.parameters])
        run.optimizer.zero_grad(set_to_none=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "update", keep)
        record = step(run, micro_batches or run.batches.step(0, 0))
    return record["loss"], found["gradient"]


def batching(micro_batch_size, accumulation):
    return [f"train.micro_batch_size={micro_batch_size}", f"train.gradient_accumulation_steps={accumulation}"]


def relative(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_micro_batches_and_accumulation_give_one_gradient(tmp_path, kind):
    settings = [*EIGHT_ROWS, "train.max_grad_norm=null"]
    gradients, losses = [], []
    for micro_batch_size, accumulation in [(8, 1), (1, 8), (3, 3)]:
        batches = batching(micro_batch_size, accumulation)
        run = assembled(make_recipe(tmp_path, *settings, *batches, kind=kind))
        run.model.eval()  # GPT-2 and Bert have dropout of their own
        rows = [row for batch in run.batches.step(0, 0) for row in batch.rows]
        if micro_batch_size == 3:  # nine rows in a step; the eight of the others, cut otherwise
            whole = assembled(make_recipe(tmp_path, *settings, *batching(8, 1), kind=kind)).batches
            cuts = [whole._plan(0)[0][at : at + 3] for at in (0, 3, 6)]
            micro_batches = [whole._batch(cut) for cut in cuts]
        else:
            assert len(rows) == 8
            micro_batches = None
        loss, found = gradient(run, micro_batches)
        losses.append(loss)
        gradients.append(found)
    _, exact = gradient(in_double(make_recipe(tmp_path, *settings, *batching(8, 1), kind=kind)))
    assert all(relative(found, exact) < ROUNDING for found in gradients)
    assert losses == same_loss([losses[0]] * 3)


def test_every_supervised_token_weighs_the_same(tmp_path):
    """The gradient of rows of very different lengths is that of the mean over tokens, not of the mean over rows."""
    recipe = make_recipe(tmp_path, *EIGHT_ROWS, *batching(1, 8), "train.max_grad_norm=null")
    run, exact = assembled(recipe), in_double(recipe)
    micro_batches = [run.batches._batch([((index,), 0)]) for index in (0, 8, 17, 25, 1, 2, 3, 4)]
    targets = [batch.supervised for batch in micro_batches]
    assert max(targets) > 5 * min(targets)
    _, found = gradient(run, micro_batches)
    total = 0
    for batch in micro_batches:
        logits = exact.model(**batch.inputs).logits.flatten(0, 1)
        total = total + torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    (total / sum(targets)).backward()
    assert relative(found, exact.trained.values.grad) < ROUNDING


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # positions are relative in one and absolute in the other
def test_packed_rows_give_the_unpacked_loss_and_gradient(tmp_path, kind):
    settings = [*EIGHT_ROWS, "train.max_grad_norm=null"]
    packed = assembled(make_recipe(tmp_path, *settings, "dataset.packing=true", *batching(40, 1), kind=kind))
    plain = in_double(make_recipe(tmp_path, *settings, *batching(40, 1), kind=kind))
    packed.model.eval()  # GPT-2 has dropout of its own
    (bins,) = packed.batches.step(0, 0)
    assert bins.labels.shape[0] < len(bins.rows) == 40
    loss, found = gradient(packed)
    expected_loss, expected = gradient(plain)
    assert loss == same_loss(expected_loss)
    assert relative(found, expected) < ROUNDING


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_stands_in_the_padding_changes_nothing(tmp_path, kind):
    run = assembled(make_recipe(tmp_path, *EIGHT_ROWS, *batching(8, 1), kind=kind))
    run.model.eval()
    batch = run.batches._batch([((index,), 0) for index in (0, 8, 17, 3)])
    padding = batch.inputs["attention_mask"] == 0
    assert padding.sum() > 20
    if kind != "bert":
        assert (batch.labels[padding] == -100).all()
    loss, found = gradient(run, [batch])
    noise = torch.randint(0, 300, batch.inputs["input_ids"].shape)
    ids = torch.where(padding, noise, batch.inputs["input_ids"])
    other_loss, other = gradient(run, [replace(batch, inputs=batch.inputs | {"input_ids": ids})])
    assert other_loss == loss
    assert torch.equal(other, found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, kind):
    seen = []
    for value in ("false", "true", "offload"):
        run = assembled(make_recipe(tmp_path, f"train.gradient_checkpointing={value}", kind=kind))
        blocks = run.model.model.layers if kind == "llama" else run.model.transformer.h
        forwards = []
        blocks[0].mlp.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        seen.append((*gradient(run), len(forwards)))
        run.trained.refuse_live_graphs()
    (loss, found, once), *others = seen
    assert once == 2  # micro-batches
    for other_loss, other, twice in others:
        assert twice == 4  # recomputed in the backward pass
        # Checkpointing lets the embeddings ask for a gradient, so that the first norm is computed as the others are.
        assert other_loss == same_loss(loss)
        assert relative(other, found) < ROUNDING


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the latter's blocks are given a mask as well
def test_offloading_takes_the_input_of_every_block_and_nothing_else(tmp_path, kind, monkeypatch):
    taken, back = [], []
    monkeypatch.setattr(Host, "put", lambda self, tensor: taken.append(tensor.shape) or (tensor,))
    monkeypatch.setattr(Host, "get", lambda self, kept: back.append(kept[0].shape) or kept[0])
    run = assembled(make_recipe(tmp_path, "train.gradient_checkpointing=offload", kind=kind))
    gradient(run)
    assert len(taken) == len(back) == 4  # two blocks, two micro-batches
    assert all(len(shape) == 3 and shape[-1] == 32 for shape in taken)


def test_what_waits_on_the_host_is_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(Host, "put", lambda self, tensor: (tensor.device, tensor.clone()))
    run = assembled(make_recipe(tmp_path, "train.gradient_checkpointing=offload"))
    inputs = []
    for block in run.model.model.layers:
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    batch = run.batches.step(0, 0)[0]
    loss = summed_loss(run.model, batch)
    assert inputs[1]() is None
    loss.backward()


@pytest.mark.slow
def test_gradient_checkpointing_prunes_too(tmp_path):
    plain, _ = train(make_recipe(tmp_path, out="plain"))
    saving, _ = train(make_recipe(tmp_path, "train.gradient_checkpointing=true", out="saving"))
    assert saving["ranks"] == plain["ranks"]
    assert saving["loss_after"] == same_loss(plain["loss_after"])


@pytest.mark.slow
def test_bfloat16_trains_with_a_float32_pool(tmp_path):
    recipe = make_recipe(tmp_path, "model.dtype=bfloat16", "adapter.alpha=1")
    run = assembled(recipe)
    assert run.model.model.layers[0].self_attn.q_proj.base.weight.dtype == torch.bfloat16
    _, found = gradient(run)
    _, exact = gradient(assembled(make_recipe(tmp_path, "adapter.alpha=1")))
    assert found.dtype == torch.float32
    assert 1e-6 < relative(found, exact) < 0.05
    summary, _ = train(recipe)
    assert summary["loss_after"] < summary["loss_before"] - 0.1
    run = assembled(recipe)
    step(run, run.batches.step(0, 0))
    state = run.optimizer.state[run.trained.values]
    assert {run.trained.values.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}


# -- rate, clipping, decay -------------------------------------------------------------------------------------------


def rates(total=20, **options):
    options = {"warmup_ratio": 0.2, "warmup_steps": None, "lr_scheduler": "cosine"} | options
    return [rate_share(step, total, SimpleNamespace(**options)) for step in range(1, total + 1)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_rate_rises_peaks_and_falls_but_not_to_zero(shape):
    found = rates(lr_scheduler=shape)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    after = found[4:]
    if shape == "constant":
        assert after == [1.0] * 16
    else:
        assert all(later < earlier for earlier, later in pairwise(after))
        assert 0 < after[-1] < 0.07
        assert after[8] == pytest.approx(0.5)  # half-way down


def test_the_rate_of_short_runs_and_without_warm_up():
    assert rates(1) == [1.0]
    assert rates(4, warmup_ratio=0.0, lr_scheduler="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, warmup_ratio=0.03)[0] == 1.0
    assert rates(4, warmup_ratio=1.0) == [0.25, 0.5, 0.75, 1.0]


def test_a_warm_up_in_steps_decides_instead_of_the_share():
    assert rates(6, warmup_steps=2, lr_scheduler="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(4, warmup_steps=0, lr_scheduler="linear") == [1.0, 0.75, 0.5, 0.25]


def test_the_rate_follows_what_is_alive(tmp_path):
    settings = ["train.lr_scheduler=constant", "train.warmup_ratio=0", "pruning.lr_coupling=0.5"]
    train(make_recipe(tmp_path, *settings))
    metrics = [line for line in lines(tmp_path / "out" / "metrics.jsonl") if line["event"] == "train"]
    alive = [8192, *(line["parameters"] for line in metrics)]  # a step's rate is set before its event
    expected = [5e-3 * (8192 / parameters) ** 0.5 for parameters in alive[:-1]]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(expected)
    assert metrics[-1]["learning_rate"] > 1.9 * 5e-3


def test_the_rate_of_a_head_is_not_coupled(tmp_path):
    run = assembled(make_recipe(tmp_path, "train.lr_scheduler=constant", "train.warmup_ratio=0", kind="bert"))
    run.control.start_parameters = 4 * run.trained.parameters
    step(run, run.batches.step(0, 0))
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([1e-2, 5e-3])


def taken(run):
    """The gradient that the optimizer was given, and the norm that was reported."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            step_module, "update", lambda run, skipped: found.update(norm=run.trained.values.grad.norm().item())
        )
        return found, step(run, run.batches.step(0, 0))["grad_norm"]


def test_clipping_to_a_norm_and_none(tmp_path):
    found, free = taken(assembled(make_recipe(tmp_path, "train.max_grad_norm=null")))
    assert found["norm"] == pytest.approx(free)
    assert free > 0.1
    found, reported = taken(assembled(make_recipe(tmp_path, "train.max_grad_norm=0.01")))
    assert reported == pytest.approx(free)
    assert found["norm"] == pytest.approx(0.01, rel=1e-3)
    found, reported = taken(assembled(make_recipe(tmp_path, "train.max_grad_norm=1000")))
    assert found["norm"] == pytest.approx(free)


def test_scores_are_taken_before_clipping(tmp_path):
    observed = []
    for limit in ("null", "0.001"):
        run = assembled(make_recipe(tmp_path, f"train.max_grad_norm={limit}", "pruning.start=0"))
        step(run, run.batches.step(0, 0))
        observed.append(run.control.gradients.square(run.trained))
    assert observed[0].abs().sum() > 0
    assert torch.equal(*observed)


def test_weight_decay_shrinks_what_trains(tmp_path):
    values = []
    for decay in (0.0, 0.5):
        settings = ["train.warmup_ratio=0", f"train.weight_decay={decay}"]
        run = assembled(make_recipe(tmp_path, *settings))
        before = run.trained.values.detach().clone()
        step(run, run.batches.step(0, 0))
        values.append(run.trained.values.detach().clone())
    assert_close_to_truth(values[1], values[0].double() - 5e-3 * 0.5 * before.double(), terms=8)
