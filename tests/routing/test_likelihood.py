"""The router likelihood against losses in fp64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from banks import a_model, an_adapter, true_logits
from peft_adapters import base_model, load, make
from torch.nn import functional as F

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.options import given
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.models.load import Base
from dynlora_cli.routing.router import Asked, Context, RequestRouter, open_router

PROMPTS = [
    tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (9, 3, 14, 9, 2)
]
ASKED = [Asked("", ids) for ids in PROMPTS]


def words(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 64 for letter in text]}


class Tokenizer:
    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return words(text)


def base_of(model: Any, context: int | None = None, pad: int | None = 0) -> Base:
    files: Any = SimpleNamespace(context_length=context)
    tokenizer: Any = Tokenizer()
    tokenizer.pad_token_id = pad
    return Base(model, tokenizer, files, torch.float32, None)


def opened(bank: Bank, *options: str, must_choose: bool = False) -> RequestRouter:
    made = Context(bank=bank, base=base_of(bank.model), options=given("routers", "likelihood", options))
    if must_choose:
        from dynlora_cli import plugins

        return plugins.load("routers", "likelihood").make(replace(made, must_choose=True, names=tuple(bank.names)))
    router = open_router("likelihood", made)
    assert not isinstance(router, Bank)
    return router  # type: ignore[return-value]


def truth(model: Any, adapters: dict[str, Any]) -> list[dict[str, float]]:
    """Nats per token of each prompt under each, in fp64."""
    found = []
    for ids in PROMPTS:
        one = {}
        for name, there in {"base": {}, **{n: {n: adapter} for n, adapter in adapters.items()}}.items():
            prompt = torch.tensor([ids])
            logits = true_logits(model, there, lambda updates, x: x.new_ones(len(x), len(updates)), prompt)[0]
            one[name] = F.cross_entropy(logits[:-1], prompt[0, 1:]).item()
        found.append(one)
    return found


def three(model: Any) -> dict[str, Any]:
    return {"a": an_adapter(model, 1), "b": an_adapter(model, 2, targets=("q_proj",)), "c": an_adapter(model, 3)}


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_the_lowest_loss_answers_and_every_loss_is_that_of_fp64(batch_tokens: int):
    model = a_model()
    adapters = three(model)
    expected = truth(model, adapters)
    with Bank(model, adapters) as bank:
        decisions = opened(bank, f"batch_tokens={batch_tokens}").decide(ASKED)
    for decision, losses in zip(decisions, expected, strict=True):
        best = min(losses, key=lambda name: losses[name])
        assert decision.mix == ({} if best == "base" else {best: 1.0})
        assert {name: -value for name, value in decision.confidence.items()} == pytest.approx(losses, rel=1e-4)
        assert decision.reason.startswith(f"{best}: the prompt costs {losses[best]:.3f} nats per token")
    assert len({decision.chosen for decision in decisions}) > 1  # it is a choice


def test_of_a_prompt_beyond_the_context_the_end_is_read_and_no_token_for_padding_is_needed():
    model = a_model()
    options = given("routers", "likelihood", [])
    with Bank(model, three(model)) as bank:
        whole = opened(bank, "longest=4").decide(ASKED)
        router: Any = open_router(
            "likelihood", Context(bank=bank, base=base_of(model, context=4, pad=None), options=options)
        )
        cut = router.decide(ASKED)
    assert [one.confidence for one in cut] == [one.confidence for one in whole]


def test_logits_of_a_batch_are_bounded(monkeypatch: pytest.MonkeyPatch):
    model = a_model()
    monkeypatch.setattr("dynlora_cli.routing.routers.likelihood.LOGITS", 20 * model.config.vocab_size)
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    with Bank(model, three(model)) as bank:
        sizes.clear()
        opened(bank).decide(ASKED)
    assert max(sizes) <= 20


def test_an_adapter_must_save_more_than_the_margin():
    model = a_model()
    adapters = three(model)
    expected = truth(model, adapters)
    saved = [losses["base"] - min(losses.values()) for losses in expected]
    margin = sorted(saved)[-2] + 1e-3  # the largest alone is more
    with Bank(model, adapters) as bank:
        decisions = opened(bank, f"margin={margin}").decide(ASKED)
    assert [bool(decision.chosen) for decision in decisions] == [one > margin for one in saved]


def test_under_a_calibration_it_chooses_among_adapters_alone():
    model = a_model()
    adapters = three(model)
    expected = truth(model, adapters)
    with Bank(model, adapters) as bank:
        router = opened(bank, must_choose=True)
        decisions = router.decide(ASKED)
    assert router.notes == []
    for decision, losses in zip(decisions, expected, strict=True):
        losses.pop("base")
        assert decision.chosen == (min(losses, key=lambda name: losses[name]),)


def test_no_adapter_that_lowers_the_loss_leaves_the_base():
    """Of two that change nothing the base answers, however they are called."""
    model = a_model()
    same = {name: an_adapter(model, 1, size=0.0) for name in ("a", "z")}
    with Bank(model, same) as bank:
        assert [decision.chosen for decision in opened(bank).decide(ASKED)] == [()] * len(ASKED)


def test_the_end_of_a_long_prompt_is_read():
    model = a_model()
    with Bank(model, three(model)) as bank:
        (cut,) = opened(bank, "longest=5").decide(ASKED[2:3])
        (end,) = opened(bank).decide([Asked("", PROMPTS[2][-5:])])
    assert cut == end


def test_texts_without_tokens_are_read_and_nothing_is_the_base_s():
    model = a_model()
    with Bank(model, three(model)) as bank:
        router = opened(bank)
        by_text, by_ids, one_token, empty = router.decide(
            [Asked("sort"), Asked("sort", tuple(words("sort")["input_ids"])), Asked("", (3,)), Asked("")]
        )
    assert by_text.chosen == by_ids.chosen
    assert one_token.reason == empty.reason == "base: there is no request to go by"


def test_an_adapter_that_goes_alone_is_read_too(tmp_path: Any):
    base, dora = make("dora", tmp_path)
    model = load(base)
    adapters = {"plain": an_adapter(model, 1), "dora": read_adapter(dora)}
    with Bank(model, adapters) as bank:
        assert set(bank.alone) == {"dora"}
        together = opened(bank).decide(ASKED)
        with bank.active([{"dora": 1.0}]), torch.no_grad():
            logits = model(torch.tensor(PROMPTS[:1])).logits[0]
    expected = F.cross_entropy(logits[:-1].double(), torch.tensor(PROMPTS[0][1:])).item()
    assert -together[0].confidence["dora"] == pytest.approx(expected, rel=1e-4)
    assert set(together[0].confidence) == {"base", "plain", "dora"}


def test_a_loss_that_is_no_number_is_told():
    model = a_model()
    model.lm_head.weight.fill_(float("nan"))
    with Bank(model, three(model)) as bank, pytest.raises(MeasureError, match="the loss of a prompt under base is nan"):
        opened(bank).decide(ASKED)


def test_it_is_of_language_models(tmp_path: Any):
    model = load(base_model("llama", tmp_path))
    base = replace(base_of(model), head="score")
    with Bank(model, {"a": an_adapter(model, 1)}) as bank, pytest.raises(UsageError, match="this base is a classifier"):
        open_router("likelihood", Context(bank=bank, base=base))
    with pytest.raises(UsageError, match="not in memory here"):
        open_router("likelihood", Context(adapters={"a": SimpleNamespace()}))  # type: ignore[dict-item]
