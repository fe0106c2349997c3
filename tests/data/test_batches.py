"""Micro-batches: order, random access, targets, padding, packing, ranks."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from numeric import rounding, same_loss
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dynlora_cli.data import packing_check
from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.examples import Classified, OneText
from dynlora_cli.data.packing_check import packed_mask_dtype
from dynlora_cli.errors import UsageError

VOCABULARY = 64


def examples(count: int, longest: int = 30) -> list[OneText]:
    """Rows of random length, the first two tokens a prompt."""
    chance = random.Random(0)
    made = []
    for row in range(count):
        ids = [chance.randrange(1, VOCABULARY) for _ in range(chance.randint(3, longest))]
        made.append(OneText(ids, [-100, -100, *ids[2:]], row))
    return made


def batches(made: list[OneText], size: int = 4, accumulation: int = 1, **settings: Any) -> Batches:
    defaults: dict[str, Any] = {"max_length": 40, "pad_id": 0}
    return Batches(made, micro_batch_size=size, accumulation=accumulation, **(defaults | settings))


def rows_of(step: list[Batch]) -> list[int]:
    return [row for batch in step for row in batch.rows]


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
    return tensors and torch.equal(one.labels, other.labels) and one.rows == other.rows


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_a_step_depend_on_the_product_only(packing: bool) -> None:
    made = examples(50)
    one, eight = (batches(made, size, 8 // size, packing=packing) for size in (1, 8))
    assert one.steps_per_epoch == eight.steps_per_epoch
    for index in range(one.steps_per_epoch):
        assert rows_of(one.step(0, index)) == rows_of(eight.step(0, index))


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_sees_every_row_once_in_its_own_order(packing: bool) -> None:
    made = batches(examples(50), packing=packing)
    epochs = [[rows_of(made.step(epoch, index)) for index in range(made.steps_per_epoch)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == list(range(50))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_any_step_can_be_asked_for_first(packing: bool) -> None:
    straight, resumed = (batches(examples(50), 2, 3, packing=packing, seed=5) for _ in range(2))
    walked = {(e, i): straight.step(e, i) for e in range(3) for i in range(straight.steps_per_epoch)}
    for (epoch, index), step in random.Random(1).sample(sorted(walked.items(), key=lambda item: item[0]), 8):
        for one, other in zip(step, resumed.step(epoch, index), strict=True):
            assert same(one, other)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_made_ahead_is_the_step_and_is_given_once(packing: bool) -> None:
    ahead, plain = (batches(examples(50), 2, 3, packing=packing, seed=5) for _ in range(2))
    ahead.prepare(1, 1)
    made = ahead.step(1, 1)
    for again in (plain.step(1, 1), ahead.step(1, 1)):
        assert all(same(one, other) and one is not other for one, other in zip(made, again, strict=True))
    ahead.prepare(1, 0)  # and never asked for
    assert all(map(same, ahead.step(0, 2), plain.step(0, 2)))


def test_seed_decides_the_order() -> None:
    first, second = (batches(examples(50), seed=seed) for seed in (0, 1))
    assert [rows_of(first.step(0, i)) for i in range(3)] != [rows_of(second.step(0, i)) for i in range(3)]


def test_steps_hold_rows_of_similar_length() -> None:
    made = examples(400, longest=40)
    padded = sum(batch.inputs["input_ids"].numel() for i in range(50) for batch in batches(made, 8).step(0, i))
    assert padded < 1.05 * sum(len(example.input_ids) for example in made)


def test_targets_are_aligned_with_logits_and_padding_is_masked_by_position() -> None:
    made = [OneText([5, 6, 7, 9], [-100, 6, 7, 9], 3), OneText([8, 9], [-100, 9], 4)]
    (batch,) = batches(made, pad_id=9, shuffle=False).step(0, 0)  # the pad token is also the last token of each row
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 9, -100], [9, -100, -100, -100]]
    assert (batch.rows, batch.tokens, batch.supervised) == ([3, 4], 6, 4)


def test_a_batch_knows_the_places_of_its_targets() -> None:
    made = [OneText([5, 6, 7, 9], [-100, 6, -100, 9], 3), OneText([8, 9], [-100, 9], 4)]
    (batch,) = batches(made, shuffle=False).step(0, 0)
    assert batch.places.tolist() == [0, 2, 4]
    assert batch.labels.flatten()[batch.places].tolist() == [6, 9, 9]
    assert batch.to(torch.device("meta")).places.device.type == "meta"
    empty = batches(made[:1], shards=2, shard=1).step(0, 0)[0]
    assert len(empty.places) == 0


def test_in_order_is_for_evaluation() -> None:
    made = Batches.in_order(examples(10), micro_batch_size=4, max_length=40, pad_id=0)
    assert [rows_of(made.step(0, index)) for index in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert made.steps_per_epoch == 3


def test_classification() -> None:
    made = [Classified([5, 6, 7], 1, 0), Classified([8], 0, 1)]
    (batch,) = batches(made, shuffle=False).step(0, 0)
    assert batch.labels.tolist() == [1, 0]
    assert (batch.tokens, batch.supervised) == (4, 2)
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    paired = [Classified([5, 6, 7], 1, 0, [0, 1, 1]), Classified([8], 0, 1, [0])]
    (batch,) = batches(paired, shuffle=False).step(0, 0)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="causal language models only"):
        batches(made, packing=True)


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_ranks_share_a_step_and_make_the_same_number_of_passes(shards: int) -> None:
    made = examples(19)
    whole = batches(made, 2, 4, seed=2)
    ranks = [batches(made, 2, 4, seed=2, shards=shards, shard=shard) for shard in range(shards)]
    for index in range(whole.steps_per_epoch):
        steps = [rank.step(1, index) for rank in ranks]
        assert len({len(step) for step in steps}) == 1
        assert sorted(row for step in steps for row in rows_of(step)) == sorted(rows_of(whole.step(1, index)))
        assert sum(b.supervised for s in steps for b in s) == sum(b.supervised for b in whole.step(1, index))
        empty = [batch for step in steps for batch in step if not batch.rows]
        assert all((batch.labels == -100).all() and batch.supervised == batch.tokens == 0 for batch in empty)


def test_bins_are_full_and_never_overfull() -> None:
    made = examples(300)
    packed = batches(made, 1, packing=True)
    bins = [packed.step(0, index)[0] for index in range(packed.steps_per_epoch)]
    assert max(batch.tokens for batch in bins) <= 40
    assert sum(batch.tokens for batch in bins) > 0.97 * 40 * (len(bins) - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_even_widths_are_few_and_hold_the_same_rows(packing: bool) -> None:
    made = examples(200, longest=250)
    usual, even = (batches(made, 2, max_length=250, packing=packing, even=even) for even in (False, True))
    pairs = [
        (one, other)
        for index in range(usual.steps_per_epoch)
        for one, other in zip(usual.step(0, index), even.step(0, index), strict=True)
    ]
    widths = {other.labels.shape[1] for _, other in pairs}
    assert len(widths) <= (1 if packing else 24) < len({one.labels.shape[1] for one, _ in pairs}) + packing
    for one, other in pairs:
        width = one.labels.shape[1]
        assert width <= other.labels.shape[1] <= (250 if packing else min(250, max(width + 7, 1.125 * width)))
        assert torch.equal(other.labels[:, :width], one.labels)
        assert torch.equal(other.inputs["input_ids"][:, :width], one.inputs["input_ids"])
        assert (other.labels[:, width:] == -100).all()


def test_too_long_and_none_at_all() -> None:
    with pytest.raises(ValueError, match="longer than max_length 10"):
        batches(examples(5), max_length=10)
    with pytest.raises(ValueError, match="no examples"):
        batches([])


# Of models in fp64 whose norms and angles are fp32, each row of them for itself.
ROUNDING = rounding(torch.float32, 8)


def llama(attention: str, **settings: Any) -> torch.nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": attention}
    torch.manual_seed(0)
    if settings:
        return MistralForCausalLM(MistralConfig(**sizes, **settings))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def gpt2(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, attn_implementation=attention))


def loss_and_gradient(model: Any, made: Batches) -> tuple[float, torch.Tensor]:
    """Sum of the loss over an epoch, and its gradient."""
    model.zero_grad()
    total = torch.zeros(())
    for index in range(made.steps_per_epoch):
        for batch in made.step(0, index):
            logits = model(**batch.inputs).logits
            total = total + cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_loss_and_gradient_equal_the_unpacked(make: Any, attention: str) -> None:
    model = make(attention).double()
    made = examples(13)
    apart, gradient_apart = loss_and_gradient(model, batches(made))
    mask_dtype = packed_mask_dtype(model, 40)
    packed = batches(made, 2, packing=True, mask_dtype=mask_dtype)
    assert max(len(batch.rows) for batch in packed.step(0, 0)) > 2
    together, gradient_together = loss_and_gradient(model, packed)
    assert together == same_loss(apart)
    assert (gradient_together - gradient_apart).norm() < ROUNDING * gradient_apart.norm()


def test_a_packed_mask_is_causal_in_a_row_and_closed_between_rows() -> None:
    made = [OneText(range(length), range(length), number) for number, length in enumerate([3, 2, 4])]
    (batch,) = batches(made, 2, max_length=5, packing=True, shuffle=False).step(0, 0)
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    mask = batch.inputs["attention_mask"].squeeze(1).int().tolist()
    alone = [0, 0, 0, 0, 1]
    assert mask[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], alone]  # the last: padding
    assert mask[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_same_gradient_for_1x8_and_8x1() -> None:
    model = llama("sdpa").double()
    made = examples(16)
    one, eight = (loss_and_gradient(model, batches(made, size, 8 // size)) for size in (1, 8))
    assert (one[1] - eight[1]).norm() < ROUNDING * one[1].norm()


def test_a_model_that_would_mix_packed_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama("eager")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="flash_attention_2 attention takes no mask"):
        packed_mask_dtype(model, 40)
    with pytest.raises(UsageError, match="sees 16 tokens back"):
        packed_mask_dtype(llama("sdpa", sliding_window=16), 40)  # type: ignore[arg-type]
    deaf: Any = llama("sdpa").train()
    whole = deaf.forward
    monkeypatch.setattr(deaf, "forward", lambda input_ids, **_: whole(input_ids=input_ids))
    with pytest.raises(UsageError, match="does not keep packed rows apart"):
        packed_mask_dtype(deaf, 40)
    assert deaf.training


@pytest.mark.parametrize(
    ("together", "padded", "mixed", "fine"),
    [(0.04, 0.0, 1.1, True), (0.08, 0.05, 1.1, True), (0.08, 0.01, 1.1, False), (0.04, 0.0, 0.04, False)],
)
def test_rounding_of_a_deep_model_is_told_from_mixed_rows(
    together: float, padded: float, mixed: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8 B model in 4 bits with random weights was refused on a GPU: its rounding is more than 5 %."""
    monkeypatch.setattr(packing_check, "_differences", lambda *_: (together, padded, mixed))
    with nullcontext() if fine else pytest.raises(UsageError, match="does not keep packed rows apart"):
        assert packed_mask_dtype(llama("sdpa"), 40) == torch.bool


def test_a_boolean_mask_would_not_close_anything_under_eager_attention() -> None:
    """Why `packed_mask_dtype` exists: this mistake raises nothing and spoils the gradient."""
    model = llama("eager")
    made = examples(13)
    _, apart = loss_and_gradient(model, batches(made))
    _, mixed = loss_and_gradient(model, batches(made, packing=True, mask_dtype=torch.bool))
    assert (mixed - apart).norm() > 0.1 * apart.norm()
