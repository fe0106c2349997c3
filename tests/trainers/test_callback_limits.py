"""What a trainer may not do around components, and what it may: errors in words, and nothing left behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trainer_helpers import EVENTS, arguments, losses, rows, tiny_llama, trainer_of
from transformers import Trainer, TrainerCallback

from dynlora_cli.errors import DynloraError, MeasureError, UsageError
from dynlora_cli.lora.svd_basis import to_svd_basis
from dynlora_cli.trainers import DynamicRankCallback, attach
from dynlora_cli.trainers.leaves import on_flat, refuse_unknown


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_a_compiled_model(tmp_path: Path, backend: str) -> None:
    plain, _, _ = trainer_of(tmp_path)
    plain.train()
    trainer, attached, _ = trainer_of(tmp_path, torch_compile=True, torch_compile_backend=backend)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-4)
    assert attached.parameters <= attached.start.budget


class Keeping(Trainer):
    """Holds a loss with its graph, as code that forgets `detach` does."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.kept = loss[0] if isinstance(loss, tuple) else loss
        return loss


@pytest.mark.slow
def test_a_live_graph_is_an_error_in_words(tmp_path: Path) -> None:
    attached = attach(tiny_llama(), 2, init=8)
    callback = DynamicRankCallback(attached, **EVENTS)
    trainer = Keeping(attached.model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    with pytest.raises(DynloraError, match="still holds a loss or an output with its graph"):
        trainer.train()
    assert attached.parameters == attached.start.parameters
    del trainer.kept


class Cyclic(TrainerCallback):
    """Leaves graphs in cycles of references, which are nobody's."""

    def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        gc.disable()
        output: Any = {"y": model(input_ids=torch.arange(3, 9)[None]).logits}
        output["self"] = output

    def on_step_end(self, *_: Any, **__: Any) -> None:
        gc.enable()


@pytest.mark.slow
def test_a_graph_that_nobody_holds_is_no_error(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(tmp_path, options={"callbacks": [Cyclic()]})
    try:
        trainer.train()
    finally:
        gc.enable()
    assert attached.parameters <= attached.start.budget


def test_the_trainer_has_to_train_the_model_with_the_components(tmp_path: Path) -> None:
    attached = attach(tiny_llama(), 2, init=8)
    callback = DynamicRankCallback(attached, **EVENTS)
    with pytest.raises(UsageError, match="not the model with these components"):
        Trainer(tiny_llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    wrapped = get_peft_model(attached.model, LoraConfig(target_modules=["base"]))
    with pytest.raises(UsageError, match="has put an adapter of PEFT on the model"):
        Trainer(wrapped, arguments(tmp_path), train_dataset=rows(), callbacks=[callback])


def test_an_optimizer_from_before_the_components_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    early = torch.optim.AdamW(model.parameters())
    attached = attach(model, 2, init=8)
    callback = DynamicRankCallback(attached, **EVENTS)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback], optimizers=(early, None)
    )  # fmt: skip
    with pytest.raises(UsageError, match="does not step 28 of the 28 factors"):
        trainer.train()


class Averaging(torch.optim.SGD):
    """Keeps an average of each number itself, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["z"] = parameter.detach().clone()
        return super().step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["averaging", "amsgrad", "galore_adamw", "lion_32bit"])
def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_the_first_event(tmp_path: Path, optim: str) -> None:
    attached = attach(tiny_llama(), 2, init=8)
    leaves = attached.pool.leaves
    made = {"averaging": lambda: Averaging(leaves, lr=1e-3), "amsgrad": lambda: torch.optim.AdamW(leaves, amsgrad=True)}
    named = {} if optim in made else {"optim": optim, "optim_target_modules": "all-linear"}

    def train() -> None:
        callbacks = [DynamicRankCallback(attached, **EVENTS)]
        own = made[optim]() if optim in made else None
        args = arguments(tmp_path, **named)
        Trainer(
            attached.model, args, train_dataset=rows(), callbacks=callbacks, optimizers=(own, None)
        ).train()  # fmt: skip

    with pytest.raises(UsageError, match=r"nobody knows how to cut|keeps gradients in another form"):
        train()
    assert attached.parameters == attached.start.parameters


class Scaled(Trainer):
    """Scales the loss as fp16 does, which accelerate does on GPUs only; its gradient overflows in the fourth step."""

    overflows = False

    def create_optimizer(self, *args: Any) -> Any:
        inner = super().create_optimizer(*args)
        scaler = self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        self.optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        self.optimizer._is_accelerate_prepared = True
        return self.optimizer

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        return loss * (torch.inf if self.overflows and self.state.global_step == 3 else 1)

    def _clip_grad_norm(self, model: Any) -> Any:
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return super()._clip_grad_norm(model)


@pytest.mark.slow
@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaled_loss_is_seen_unscaled(tmp_path: Path, overflows: bool) -> None:
    plain, pruned, told = trainer_of(tmp_path)
    plain.train()
    attached = attach(tiny_llama(), 2, init=8)
    callback = DynamicRankCallback(attached, **EVENTS)
    trainer = Scaled(attached.model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    trainer.overflows = overflows
    trainer.train()
    assert attached.parameters <= attached.start.budget
    assert attached.pool.values.isfinite().all()
    assert losses(trainer)[:3] == losses(plain)[:3]
    if not overflows:  # powers of two change no digit
        assert losses(trainer) == losses(plain)
        assert attached.rank_map == pruned.rank_map
        assert callback.rank_events[1]["threshold"] == told.rank_events[1]["threshold"]


def test_two_callbacks_on_the_same_components_are_refused(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(tmp_path)
    trainer.add_callback(DynamicRankCallback(attached, **EVENTS))
    with pytest.raises(UsageError, match="two DynamicRankCallbacks"):
        trainer.train()


@pytest.mark.parametrize(
    ("pruning", "what"),
    [
        ({"start": 0.7, "end": 0.5}, "pruning.end: got 0.5, must be above"),
        ({"start": 2}, "pruning.start: got 2"),
        ({"events": 0}, "pruning.events: got 0"),
        ({"tolerance": 0.1}, "pruning.tolerance"),
        ({"count": 5}, "pruning.count: unknown key"),
    ],
)
def test_wrong_settings_of_the_callback(pruning: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        DynamicRankCallback(attach(tiny_llama()), **pruning)


@pytest.mark.slow
def test_a_callback_can_be_added_later_and_be_given_the_model(tmp_path: Path) -> None:
    trainer, attached, _ = trainer_of(tmp_path, pruned=False)
    trainer.callback_handler.callbacks.insert(0, DynamicRankCallback(attached.model, **EVENTS))
    trainer.add_callback(_detaching(attached))
    with pytest.raises(UsageError, match="a trainer is at work"):
        trainer.train()
    with pytest.raises(UsageError, match="a trainer is at work") as refused:
        attached.detach()
    assert "call `release()` of its callback" in str(refused.value.hint)
    trainer.callback_handler.callbacks.pop()
    trainer.train()  # the crash of the first run is no hindrance
    assert attached.parameters <= attached.start.budget


def _detaching(attached: Any) -> TrainerCallback:
    class Detaching(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            attached.detach()

    return Detaching()


def test_numbers_that_are_no_numbers_end_the_run_at_an_event(tmp_path: Path) -> None:
    class Breaking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            attached.pool.leaves[1].data.fill_(torch.nan)

    attached = attach(tiny_llama(), 2, init=8)
    callbacks = [Breaking(), DynamicRankCallback(attached, **EVENTS)]
    trainer = Trainer(attached.model, arguments(tmp_path), train_dataset=rows(), callbacks=callbacks)
    with pytest.raises(MeasureError, match="after step 3 components hold NaN"):
        trainer.train()


def test_a_run_too_short_to_prune_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, attached, _ = trainer_of(tmp_path, max_steps=2)
    trainer.train()
    assert attached.parameters == attached.start.parameters
    assert "too few to prune" in caplog.text


def test_events_stand_in_the_log_of_the_trainer(tmp_path: Path) -> None:
    trainer, attached, callback = trainer_of(tmp_path, save_strategy="steps", save_steps=12)
    trainer.train()
    told = [entry["rank_event"] for entry in trainer.state.log_history if "rank_event" in entry]
    assert told == callback.rank_events
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["component_parameters"] for line in lines][::3] == [7424, 7424, told[2]["parameters"], 1824]
    assert lines[-1]["component_learning_rate"] / lines[-1]["learning_rate"] == pytest.approx((7424 / 1824) ** 0.5)
    assert "rank_event" in (tmp_path / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8")
    assert told[-1]["predicted_loss_change"] is not None
    assert repr(attached).startswith("Attached(28 components in 14 layers, 1,824 numbers")


# -- the optimizer's moments at an event -------------------------------------------------------------------------------


def _filled(make: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Components after a few steps of an optimizer on a made-up gradient."""
    pool = attach(tiny_llama(), 2, init=8).pool
    optimizer = make(pool.leaves)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for leaf in pool.leaves:
            leaf.grad = torch.empty_like(leaf).normal_(generator=generator)
        optimizer.step()
        for leaf in pool.leaves:
            leaf.grad = None
    return pool, optimizer


def test_moments_are_turned_and_cut_as_if_the_optimizer_stepped_the_flat_tensor() -> None:
    pool, optimizer = _filled(lambda leaves: torch.optim.AdamW(leaves, lr=0.01))
    twin, flat = attach(tiny_llama(), 2, init=8).pool, None
    twin.values.data.copy_(pool.values.data)
    flat = torch.optim.AdamW([twin.values], lr=0.01)
    parts = {key: torch.zeros_like(twin.values.detach()) for key in ("exp_avg", "exp_avg_sq")}
    for key, whole in parts.items():
        views = [part for pair in twin.views(whole) for part in pair]
        for view, leaf in zip(views, pool.leaves, strict=True):
            view.copy_(optimizer.state[leaf][key])
    flat.state[twin.values] = {"step": torch.tensor(3.0), **parts}
    keep_K = torch.arange(pool.components) % 3 != 1

    from dynlora_cli.lora.surgery import shrink

    def act(stand_in: torch.optim.Optimizer) -> None:
        to_svd_basis(pool, stand_in)
        shrink(pool, stand_in, keep_K)

    on_flat(pool, optimizer, act)
    to_svd_basis(twin, flat)
    shrink(twin, flat, keep_K)
    assert torch.equal(pool.values, twin.values)
    for key in parts:
        views = [part for pair in twin.views(flat.state[twin.values][key]) for part in pair]
        for view, leaf in zip(views, pool.leaves, strict=True):
            assert torch.equal(optimizer.state[leaf][key], view)
            assert optimizer.state[leaf]["step"] == 3
    assert set(optimizer.state) == set(pool.leaves)


def test_adafactors_rows_and_columns_stand_for_the_same_squares() -> None:
    from transformers.optimization import Adafactor

    def square(leaf: Tensor) -> Tensor:
        row, column = (optimizer.state[leaf][f"exp_avg_sq_{side}"] for side in ("row", "col"))
        return torch.outer(row, column) / row.mean()

    pool, optimizer = _filled(lambda leaves: Adafactor(leaves, lr=0.01, scale_parameter=False, relative_step=False))
    before = [square(leaf) for leaf in pool.leaves]
    keep_K = torch.arange(pool.components) % 8 < 3

    from dynlora_cli.lora.surgery import shrink

    on_flat(pool, optimizer, lambda stand_in: shrink(pool, stand_in, keep_K))
    for index, (leaf, whole) in enumerate(zip(pool.leaves, before, strict=True)):
        kept = whole[:, :3] if index % 2 else whole[:3]
        torch.testing.assert_close(square(leaf), kept, rtol=1e-5, atol=0)


def test_moments_in_8_bits_are_read_and_written_again() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pool, optimizer = _filled(lambda leaves: bitsandbytes.optim.AdamW8bit(leaves, lr=0.01, min_8bit_size=64))
    stored = {state["state1"].dtype for state in optimizer.state.values()}
    assert torch.uint8 in stored
    refuse_unknown(optimizer, pool.leaves)
    keep_K = torch.arange(pool.components) % 8 < 3

    from dynlora_cli.lora.moments import read_moments
    from dynlora_cli.lora.surgery import shrink

    before = [read_moments(optimizer, leaf)["exp_avg"] for leaf in pool.leaves]
    on_flat(pool, optimizer, lambda stand_in: shrink(pool, stand_in, keep_K))
    for index, (leaf, whole) in enumerate(zip(pool.leaves, before, strict=True)):
        kept = whole[:, :3] if index % 2 else whole[:3]
        torch.testing.assert_close(
            read_moments(optimizer, leaf)["exp_avg"], kept, atol=2e-2 * whole.abs().max(), rtol=0
        )
        leaf.grad = torch.zeros_like(leaf)
    optimizer.step()
