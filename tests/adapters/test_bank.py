"""A bank of adapters on one base: they come and go, some go alone, and the model is as it was after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_helpers import TERMS, adaptable, an_adapter, merged_in_double, texts, tiny_model
from numeric import assert_close_to_truth
from torch import nn

from dynlora_cli.adapters import bank_check
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.multi import MultiLinear

A, B, BASE = {"a": 1.0}, {"b": 1.0}, {}  # type: ignore[var-annotated]


@pytest.fixture
def model(tmp_path) -> Any:
    return tiny_model(tmp_path)


@pytest.fixture
def adapters(model) -> dict[str, Adapter]:
    return {name: an_adapter(model, seed) for seed, name in enumerate("abc")}


@torch.no_grad()
def logits(model, rows=1):
    return model(texts(6)[0].expand(rows, -1)).logits


def assert_is(found_TV, model, adapters, mix):
    """Logits of `texts(6)` are those of a mix on the plain model."""
    with torch.no_grad():
        truth = merged_in_double(model, adapters, mix)(texts(6)[0][None]).logits[0]
    assert_close_to_truth(found_TV, truth, terms=TERMS)


def dora(model, name="model.layers.0.self_attn.q_proj"):
    layer = model.get_submodule(name)
    a, b = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    magnitude = layer.weight.norm(dim=1) * 1.2
    return Adapter(Path("dora"), {name: Factors(a, 0.1 * b, kind="dora", own={"magnitude_O": magnitude})}, {})


class TestTheModel:
    def test_is_as_it_was_after_close(self, model, adapters):
        before, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
        hooks = {name: dict(module._forward_pre_hooks) for name, module in before.items()}
        with Bank(model, adapters) as bank:
            assert dict(model.named_modules()) != before
            with bank.active([A, BASE]):
                logits(model, 2)
        after = dict(model.named_modules())
        assert list(after) == list(before)
        assert all(after[name] is module for name, module in before.items())
        assert all(dict(module._forward_pre_hooks) == hooks[name] for name, module in after.items())
        assert all(value.equal(state[name]) for name, value in model.state_dict().items())
        bank.close()  # a second time does no harm

    def test_is_as_it_was_where_an_adapter_does_not_fit(self, model, adapters):
        before = dict(model.named_modules())
        name = next(iter(adaptable(model)))
        wrong = Adapter(Path("wrong"), {name: Factors(torch.zeros(1, 5), torch.zeros(7, 1))}, {})
        with pytest.raises(UsageError, match="7 x 5 in the adapter"):
            Bank(model, {**adapters, "wrong": wrong})
        assert dict(model.named_modules()) == before
        with Bank(model, adapters) as bank:
            with pytest.raises(UsageError, match="7 x 5 in the adapter"):
                bank.add("wrong", wrong)
            assert bank.names == ["a", "b", "c"]

    def test_holds_the_weights_of_the_base_once(self, model, adapters):
        pointers = {p.data_ptr() for p in model.parameters()}
        with Bank(model, adapters) as bank:
            assert {p.data_ptr() for p in model.parameters()} == pointers
            components = sum(4 * adapter.parameters for adapter in adapters.values())
            numbering = sum(8 * 2 * len(layer.a_RI) for layer in bank.layers.values())
            assert bank.bytes == components + numbering
            with bank.active([A, B, BASE]):
                logits(model, 3)
                assert {p.data_ptr() for p in model.parameters()} == pointers

    def test_is_in_training_mode_where_it_was(self, model, adapters):
        model.train()
        with Bank(model, adapters):
            assert all(module.training for module in model.modules())

    def test_saves_no_components_with_its_weights(self, model, adapters):
        with Bank(model, adapters):
            assert not [name for name in model.state_dict() if name.endswith(("a_RI", "b_OR", "columns_R"))]


class TestComeAndGo:
    def test_each_time_the_others_are_what_they_were(self, model, adapters):
        with Bank(model, {"a": adapters["a"]}) as bank:
            bank.add("b", adapters["b"])
            with bank.active([B, A]):
                rows = logits(model, 2)
            assert_is(rows[0], self.plain(bank), adapters, B)
            bank.remove("a")
            assert bank.names == ["b"]
            bank.add("c", adapters["c"])
            bank.add("a", adapters["a"])
            with bank.active([A, BASE, {"c": 1.0}, {"b": 0.5, "a": -1.0}]):
                rows = logits(model, 4)
            for row, mix in zip(rows, [A, BASE, {"c": 1.0}, {"b": 0.5, "a": -1.0}], strict=True):
                assert_is(row, self.plain(bank), adapters, mix)
            for name in ("a", "b", "c"):
                bank.remove(name)
            assert not any(isinstance(module, MultiLinear) for module in model.modules())
            with bank.active([BASE]):
                assert_is(logits(model)[0], model, adapters, BASE)

    @staticmethod
    def plain(bank):
        """A copy of the model without the bank."""
        import copy

        with bank._plain():
            return copy.deepcopy(bank.model)

    def test_not_while_the_bank_is_in_use(self, model, adapters):
        with Bank(model, adapters) as bank, bank.active([A]):
            with pytest.raises(RuntimeError, match="in use"):
                bank.add("d", adapters["a"])
            with pytest.raises(RuntimeError, match="in use"):
                bank.remove("a")

    def test_names_are_checked(self, model, adapters):
        with Bank(model, adapters) as bank:
            with pytest.raises(UsageError, match="already"):
                bank.add("a", adapters["b"])
            with pytest.raises(UsageError, match="no adapter aa") as caught, bank.active([{"aa": 1.0}]):
                pass
            assert caught.value.hint == "there are: a, b, c"
            with pytest.raises(UsageError, match="no adapter d"):
                bank.remove("d")
            with pytest.raises(UsageError, match="nan"), bank.active([{"a": float("nan")}]):
                pass
            with pytest.raises(ValueError, match="one request"), bank.active([]):
                pass

    def test_an_empty_bank_is_the_base(self, model):
        before = logits(model)
        with Bank(model, {}) as bank, bank.active([BASE, BASE]):
            assert logits(model).equal(before)
            assert bank.bytes == 0

    def test_layers_without_components_are_left_out(self, model, adapters):
        name = next(name for name in adaptable(model) if name not in adapters["a"].layers)
        layer = model.get_submodule(name)
        nothing = Factors(torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0))
        odd = replace(adapters["a"], layers={**adapters["a"].layers, name: nothing})
        with Bank(model, {"a": odd}) as bank:
            assert not bank.alone
            assert bank.layers.keys() == adapters["a"].layers.keys()


class TestWhoUsesWhat:
    def test_blocks_may_be_nested(self, model, adapters):
        plain = logits(model)
        with Bank(model, adapters) as bank:
            with bank.active([A]):
                a = logits(model)
                with bank.active([B]):
                    b = logits(model)
                assert logits(model).equal(a)
            assert logits(model).equal(plain)
            assert not a.equal(b)

    def test_an_exception_inside_leaves_the_base(self, model, adapters):
        plain = logits(model)
        with Bank(model, {**adapters, "dora": dora(model)}) as bank:
            for mix in (A, {"dora": 1.0}):
                with pytest.raises(KeyError), bank.active([mix]):
                    raise KeyError
                assert logits(model).equal(plain)
            with bank.active([A]):
                assert not logits(model).equal(plain)

    def test_beams_and_several_answers_follow_their_request(self, model, adapters):
        ids = torch.stack(texts(5, 5))
        options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3}
        with Bank(model, adapters) as bank:
            with bank.active([A, BASE]):
                both = model.generate(ids, **options)
            for row, mix in enumerate((A, BASE)):
                with bank.active([mix]):
                    assert model.generate(ids[row : row + 1], **options)[0].equal(both[row])

    def test_sampling_is_that_of_the_mix(self, model, adapters):
        with Bank(model, adapters) as bank, bank.active([A, BASE, B]):
            torch.manual_seed(0)
            ids = model.generate(
                torch.stack(texts(5, 5, 5)), do_sample=True, max_new_tokens=5, eos_token_id=None, pad_token_id=0
            )
        assert ids.shape == (3, 10)

    def test_what_overflows_in_one_request_stays_there(self, model, adapters):
        with Bank(model, adapters) as bank:
            with bank.active([A, {"b": 1e38, "c": 1e38}, BASE]):
                rows = logits(model, 3)
            assert not rows[1].isfinite().all()
            with bank.active([A, BASE, BASE]):
                clean = logits(model, 3)
        torch.testing.assert_close(rows[::2], clean[::2])

    def test_gradients_flow_to_inputs(self, model, adapters):
        inputs = model.get_input_embeddings()(torch.stack(texts(4, 4))).requires_grad_()
        with Bank(model, adapters) as bank, bank.active([A, B]):
            model(inputs_embeds=inputs).logits.sum().backward()
        assert inputs.grad.abs().sum() > 0


class TestAlone:
    @pytest.fixture
    def odd(self, model) -> dict[str, Adapter]:
        """One of each kind that cannot share a batch."""
        attention = "model.layers.0.self_attn.q_proj"
        table = model.get_input_embeddings()
        tokens = Factors(torch.randn(2, table.embedding_dim), torch.randn(table.num_embeddings, 2), embedding=True)
        a, b = torch.full((1, 32), float("nan")), torch.ones(32, 1)
        head = {"lm_head.weight": torch.randn_like(model.lm_head.weight)}
        return {
            "dora": dora(model),
            "table": Adapter(Path("table"), {"model.embed_tokens": tokens}, {}),
            "head": Adapter(Path("head"), {}, {}, whole=head),
            "nan": Adapter(Path("nan"), {attention: Factors(a, b)}, {}),
        }

    def test_why_is_said_in_words(self, model, adapters, odd):
        with Bank(model, adapters | odd) as bank:
            assert bank.names == [*adapters, *odd]
            assert bank.alone.keys() == odd.keys()
            assert "DoRA" in bank.alone["dora"]
            assert "table of tokens, model.embed_tokens" in bank.alone["table"]
            assert "its own lm_head" in bank.alone["head"]
            assert "beyond 1e+12" in bank.alone["nan"]

    def test_it_computes_what_it_is_attached(self, model, adapters, odd):
        del odd["nan"]
        alone = {}
        for name, adapter in odd.items():
            with attached(model, adapter):
                alone[name] = logits(model, 2)
        with Bank(model, adapters | odd) as bank:
            for name in odd:
                with bank.active([{name: 1.0}, {name: 1.0}]):
                    assert logits(model, 2).equal(alone[name])
            with bank.active([A, BASE]):
                rows = logits(model, 2)
            with bank._plain():
                assert_is(rows[0], model, adapters, A)

    @pytest.mark.parametrize(
        "mixes", [[{"dora": 1.0}, {"a": 1.0}], [{"dora": 1.0}, {}], [{"dora": 0.5}], [{"dora": 1.0, "a": 1.0}]]
    )
    def test_it_is_refused_beside_others(self, model, adapters, odd, mixes):
        with (
            Bank(model, adapters | odd) as bank,
            pytest.raises(UsageError, match=r"dora cannot be blended or share a batch .*DoRA"),
            bank.active(mixes),
        ):
            pass

    def test_nothing_else_may_be_used_inside(self, model, adapters, odd):
        with Bank(model, adapters | odd) as bank, bank.active([{"dora": 1.0}]):
            for mix in (A, {"dora": 1.0}, BASE):
                with pytest.raises(RuntimeError, match="in use"), bank.active([mix]):
                    pass

    def test_it_can_be_removed_and_comes_between_others(self, model, adapters, odd):
        with Bank(model, {"dora": odd["dora"], **adapters}) as bank:
            bank.remove("dora")
            assert bank.alone == {}
            with bank.active([A]):
                a = logits(model)
            with bank._plain():
                assert_is(a[0], model, adapters, A)

    def test_experts_and_their_router_go_alone(self, tmp_path):
        model = tiny_model(tmp_path, "mixtral")
        gate = model.model.layers[0].mlp.gate
        out, width = gate.weight.shape
        router = Factors(torch.randn(1, width), torch.randn(out, 1))
        single = Factors(torch.randn(1, 32), torch.randn(128, 1), experts=4)
        adapters = {
            "router": Adapter(Path("router"), {"model.layers.0.mlp.gate": router}, {}),
            "expert": Adapter(Path("expert"), {"model.layers.0.mlp.experts.1.gate_up_proj": single}, {}),
            "a": an_adapter(model, 0),
        }
        with Bank(model, adapters) as bank:
            assert "no linear layer" in bank.alone["router"]
            assert "single experts" in bank.alone["expert"]
            assert "a" not in bank.alone
            with bank.active([{"expert": 1.0}]):
                changed = logits(model)
            assert not changed.equal(logits(model))


class Scattered(nn.Module):
    """Hands its layer the tokens in another order, as a model of experts does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class TestTheCheck:
    def test_a_layer_that_mixes_requests_up_makes_its_adapters_go_alone(self, model, adapters):
        layer = "model.layers.1.mlp.down_proj"
        model.model.layers[1].mlp.down_proj = Scattered(model.model.layers[1].mlp.down_proj)
        inner = f"{layer}.inner"
        a, b = torch.randn(2, 64), torch.randn(32, 2)
        through = Adapter(Path("through"), {inner: Factors(a, b)}, {})
        shared = {
            name: replace(one, layers={k: f for k, f in one.layers.items() if k != layer})
            for name, one in adapters.items()
        }
        with Bank(model, {**shared, "through": through}) as bank:
            assert bank.alone == {"through": f"its layer {inner} does not see the rows of one request after the other"}
            assert inner not in bank.layers
            assert bank.notes == [f"through cannot share a batch with other adapters: {bank.alone['through']}"]
            with bank.active([{"through": 1.0}]):
                changed = logits(model)
            assert not changed.equal(logits(model))

    def test_a_layer_that_no_text_reaches_makes_its_adapters_go_alone(self, model, adapters):
        model.tower = nn.Linear(4, 4)
        far = Adapter(Path("far"), {"tower": Factors(torch.randn(1, 4), torch.randn(4, 1))}, {})
        with Bank(model, {**adapters, "far": far}) as bank:
            assert bank.alone == {"far": "its layer tower is not reached by a text"}

    def test_an_adapter_that_is_another_in_a_batch_goes_alone(self, model, adapters, monkeypatch):
        """As if the layer took one request's components for another's."""
        right = MultiLinear.forward

        def wrong(layer, x):
            y = right(layer, x)
            mixes = layer.choice.mixes
            if mixes is not None and not mixes.one and any(2 in run.weights for run in mixes.runs):
                y = y.roll(1, 0)
            return y

        monkeypatch.setattr(MultiLinear, "forward", wrong)
        with Bank(model, adapters) as bank:
            assert list(bank.alone) == ["c"]
            assert "rounding explains" in bank.alone["c"]
            assert all(2 not in layer.adapters for layer in bank.layers.values())

    def test_a_model_that_cannot_be_asked_makes_all_go_alone(self, model, adapters, monkeypatch):
        def needs_more(*_args, **_kwargs):
            raise ValueError("pixel_values are missing\nand more")

        monkeypatch.setattr(model, "forward", needs_more)
        before = dict(model.named_modules())
        with Bank(model, adapters) as bank:
            assert set(bank.alone.values()) == {
                "the check of a mixed batch failed: ValueError: pixel_values are missing"
            }
            assert not bank.layers
            assert dict(model.named_modules()) == before

    def test_it_costs_few_passes_and_none_for_layers_that_are_known(self, model, adapters, monkeypatch):
        passes = []
        real = bank_check._logits
        monkeypatch.setattr(bank_check, "_logits", lambda *args: passes.append(1) or real(*args))
        everywhere = an_adapter(model, 7, share=1.0)
        with Bank(model, {**adapters, "everywhere": everywhere}) as bank:
            assert len(passes) == 6
            bank.remove("a")
            bank.add("a", adapters["a"])
        assert len(passes) == 9

    def test_it_is_silent_about_rounding_in_sixteen_bits(self, model, adapters):
        model.bfloat16()
        with Bank(model, adapters) as bank:
            assert not bank.alone

    @pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_neox"])
    def test_it_lets_real_models_pass(self, kind, tmp_path):
        model = tiny_model(tmp_path, kind)
        with Bank(model, {"a": an_adapter(model, 0, share=1.0)}) as bank:
            assert not bank.notes
