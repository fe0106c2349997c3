"""Components on a model and off it again; which models, variants and budgets there are, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_run import model_folder
from torch import nn
from trainer_helpers import arguments, losses, rows, tiny_llama, trainer_of
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.trainers import DynamicRankCallback, attach


def answers(model: Any) -> torch.Tensor:
    """What a model computes from a fixed text."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19)[None]).logits


def test_attaching_changes_no_output_and_detaching_brings_the_model_back(tmp_path: Path) -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    plain, names = answers(model), {name: p.requires_grad for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    attributes = set(vars(model))
    trainer, attached, _ = trainer_of(tmp_path, model=model)
    assert torch.equal(answers(model), plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{leaf}" for name in attached.rank_map for leaf in ("a_CI", "b_OC")
    }
    trainer.train()
    assert not torch.allclose(answers(model), plain)
    assert attached.detach() is model
    assert torch.equal(answers(model), plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert set(vars(model)) - attributes <= {"_is_accelerate_prepared"}
    assert not model._forward_pre_hooks
    assert not model._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="off the model already"):
        attached.detach()
    assert attach(model, 2).rank_map  # it can have others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "numbers"), [(2, 1856), (0.5, 3712), ("1k", 1000), (3, 2784)], ids=["rank", "share", "count", "more"]
)
def test_a_budget_is_a_rank_a_share_or_a_count(tmp_path: Path, budget: Any, numbers: int) -> None:
    trainer, attached, callback = trainer_of(tmp_path, budget=budget)
    assert attached.start.budget == numbers
    trainer.train()
    assert numbers - 80 < attached.parameters <= numbers
    assert callback.rank_events[-1]["parameters"] == attached.parameters


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora", "hira", "vera", "sora", "dylora", "singlora", "autolora"])
def test_a_variant_is_pruned_and_read_by_stock_peft(tmp_path: Path, variant: str) -> None:
    many = {"budget": 8, "attaching": {"variant": variant, "init": 16}}
    trainer, attached, _ = trainer_of(tmp_path, **(many if variant == "vera" else {"attaching": {"variant": variant}}))
    trainer.train()
    assert attached.parameters <= attached.start.budget < attached.start.parameters
    attached.save(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "saved"))
    torch.testing.assert_close(answers(loaded), answers(attached.model), atol=1e-5, rtol=0)
    assert (answers(loaded) - answers(tiny_llama())).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fisher", "magnitude", "gradient", "sensitivity", "squeeze", "random"])
def test_policies_that_work_in_training(tmp_path: Path, policy: str) -> None:
    trainer, attached, _ = trainer_of(tmp_path, attaching={"policy": policy})
    trainer.train()
    assert attached.parameters <= attached.start.budget
    assert (len(set(attached.rank_map.values())) == 1) == (policy == "squeeze") or policy == "magnitude"


@pytest.mark.slow
def test_the_seed_of_attach_is_that_of_the_lots(tmp_path: Path) -> None:
    kept = []
    for seed in (0, 0, 1):
        trainer, attached, callback = trainer_of(tmp_path, attaching={"policy": "random", "seed": seed})
        trainer.train()
        kept.append((attached.rank_map, attached.recipe.seed, callback.control.generator.initial_seed()))
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[2][0]
    assert kept[2][1:] == (1, 1)


def test_options_of_lora(tmp_path: Path) -> None:
    frozen, attached, _ = trainer_of(tmp_path, attaching={"freeze_a": True, "init_weights": "orthogonal"})
    before = [layer.a_CI.detach() @ layer.a_CI.detach().T for layer in attached.pool.layers.values()]
    for gram in before:
        torch.testing.assert_close(gram, gram.diagonal().mean() * torch.eye(len(gram)), atol=1e-5, rtol=0)
    frozen.train()
    stepped = {id(p) for group in frozen.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(layer.b_OC) for layer in attached.pool.layers.values() if layer.count}
    assert attached.parameters <= attached.start.budget
    scaled = attach(tiny_llama(), 4, alpha=16, scaling="rslora", target_modules="qv", dropout=0.1)
    assert {name.split(".")[-1] for name in scaled.rank_map} == {"q_proj", "v_proj"}
    layer = next(iter(scaled.pool.layers.values()))
    assert (layer.scale, layer.dropout, layer.count) == (8.0, 0.1, 8)


@pytest.mark.slow
def test_a_classifiers_head_trains_whole_and_is_saved(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "bert")

    def fresh() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    model = fresh()
    head = copy.deepcopy(model.classifier.state_dict())
    attached = attach(model, 2, init=8)
    assert attached.whole == ("classifier",)
    assert "classifier" not in attached.rank_map
    callback = DynamicRankCallback(attached, start=0.25, end=0.75, events=3)
    labelled = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows())]
    trainer = Trainer(
        model, arguments(tmp_path / "run", save_strategy="steps", save_steps=6), train_dataset=labelled,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert not torch.equal(model.classifier.weight, head["weight"])
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {trainer.lr_scheduler.get_last_lr()[0]}  # between steps the groups are the trainer's own
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "saved"))
    torch.testing.assert_close(answers(loaded), answers(model), atol=1e-5, rtol=0)

    again = fresh()
    other = attach(again, 2, init=8)
    watching = DynamicRankCallback(other, start=0.25, end=0.75, events=3)
    later = Trainer(again, arguments(tmp_path / "run"), train_dataset=labelled, callbacks=[watching])
    later.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert losses(later) == losses(trainer)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    attached.detach()
    assert torch.equal(model.classifier.weight, head["weight"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_a_tied_table_that_trains_whole_is_saved_with_its_head(tmp_path: Path) -> None:
    """PEFT loads the table alone where it alone is named, and the head with the base's weights."""
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base = copy.deepcopy(model)
    attached = attach(model, 2, init=8, modules_to_save="embed_tokens")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    attached.save(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(answers(loaded), answers(model), atol=1e-5, rtol=0)
    assert attached.detach() is model
    torch.testing.assert_close(model.lm_head.weight * 1.5, loaded.base_model.model.lm_head.weight)


def test_what_a_checkpoint_lacks_on_top_trains_whole(tmp_path: Path) -> None:
    """A pooler that was drawn anew would be another one in whoever loads the adapter."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**small, intermediate_size=64)).save_pretrained(tmp_path)
    attached = attach(AutoModelForSequenceClassification.from_pretrained(tmp_path), 2)
    assert set(attached.whole) == {"classifier", "bert.pooler.dense"}
    assert not any("pooler" in name for name in attached.rank_map)
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UsageError, match="lm_head has no weights of its own"):
        attach(model, modules_to_save=["lm_head"])


@pytest.mark.slow
def test_a_head_does_not_take_the_components_rate(tmp_path: Path) -> None:
    """After an event components learn faster than the schedule says, and whatever else trains does not."""
    model = tiny_llama()
    trainer, attached, callback = trainer_of(
        tmp_path, model=model, attaching={"modules_to_save": ["lm_head"]}, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    factors: list[list[float]] = []

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
            largest = max(attached.pool.layers.values(), key=lambda layer: layer.count)
            self.parts = [largest.b_OC, model.lm_head.weight]
            self.before = [(part.detach().clone(), part.grad.norm()) for part in self.parts]

        def on_optimizer_step(self, *args: Any, **_: Any) -> None:
            pairs = zip(self.parts, self.before, strict=True)
            factors.append([float((old - new.detach()).norm() / norm / 5e-3) for new, (old, norm) in pairs])

    trainer.add_callback(Watching())
    trainer.train()
    alive = {event["step"]: event["parameters"] for event in callback.rank_events}
    raised = {step: (attached.start.parameters / parameters) ** 0.5 for step, parameters in alive.items()}
    assert [components for components, _ in factors] == pytest.approx(
        [1, 1, 1, 1, 1, *[raised[5]] * 2, *[raised[7]] * 2, *[raised[9]] * 3], rel=1e-3
    )
    assert [head for _, head in factors] == pytest.approx([1] * 12, rel=1e-3)
    assert raised[9] > 1.9


@pytest.mark.slow
def test_a_base_in_4_bits(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four)

    trainer, attached, _ = trainer_of(tmp_path / "run", model=fresh(), learning_rate=0.05)
    assert isinstance(next(iter(attached.pool.layers.values())).base, bitsandbytes.nn.Linear4bit)
    trainer.train()
    assert attached.parameters <= attached.start.budget
    trainer.save_model(str(tmp_path / "saved"))
    plain = answers(fresh())
    loaded = answers(PeftModel.from_pretrained(fresh(), str(tmp_path / "saved")))
    # On some CPUs bitsandbytes multiplies in bf16 where no gradient is needed.
    assert (loaded - answers(attached.model)).abs().max() < 0.05 * (loaded - plain).abs().max()


class Holder(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "auto": ({"budget": "auto"}, "found on held-out rows"),
    "budget": ({"budget": -1}, "rank.budget: got -1"),
    "too small": ({"budget": "1k", "target_modules": "mlp", "init": 0}, "rank.init: got 0"),
    "retrieval": ({"policy": "retrieval"}, "single rows and their confidence"),
    "after training": ({"policy": "activation"}, "works on a trained adapter"),
    "policy": ({"policy": "fischer"}, "did you mean"),
    "penalty": ({"variant": "adalora"}, "adds to the loss"),
    "whole": ({"variant": "full"}, "has no components"),
    "router": ({"variant": "x_lora"}, "adapter"),
    "start": ({"init_weights": "eva"}, "needs the rows"),
    "pissa": ({"init_weights": "pissa"}, "needs the rows"),
    "elastic": ({"elastic": True}, "by `dynlora train` alone"),
    "from": ({"from": "out"}, "by `dynlora train` alone"),
    "allocation": ({"allocation": "eva"}, "not known yet"),
    "unknown": ({"drop_out": 0.1}, "unknown key 'drop_out'; did you mean 'dropout'"),
    "targets": ({"target_modules": ["nowhere"]}, "matches no linear layer"),
    "heads": ({"modules_to_save": ["nowhere"]}, "no module 'nowhere'"),
    "conflict": ({"variant": "hira", "freeze_a": True}, "has no use for it"),
    "rslora": ({"scaling": "rslora"}, "write `alpha: 16`"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("given", "what"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_attached_is_refused_in_words(given: dict[str, Any], what: str) -> None:
    model = tiny_llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UsageError) as refused:
        attach(model, **given)
    assert what in str(refused.value) + str(refused.value.hint)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    attach(model, 2)  # nothing was left on it


def test_models_that_cannot_have_components() -> None:
    with pytest.raises(UsageError, match="needs a model, and got str"):
        attach("meta-llama/Llama-3.2-1B")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds 0 transformers models"):
        attach(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="holds 2 transformers models"):
        attach(Holder(tiny_llama(), tiny_llama()))
    with pytest.raises(UsageError, match="has an adapter of PEFT"):
        attach(get_peft_model(tiny_llama(), LoraConfig()))
    model = tiny_llama()
    attach(model)
    with pytest.raises(UsageError, match="has components already"):
        attach(model)
    with pytest.raises(UsageError, match="has components already"):
        attach(Holder(model))
    with pytest.raises(UsageError, match="has no components"):
        DynamicRankCallback(tiny_llama())
    with pytest.raises(UsageError, match="push_to_hub"):
        model.save_pretrained("nowhere", push_to_hub=True)


@pytest.mark.slow
def test_two_models_in_one_process_do_not_know_each_other(tmp_path: Path) -> None:
    alone, first, _ = trainer_of(tmp_path / "a")
    alone.train()
    trainer, second, _ = trainer_of(tmp_path / "b")
    other, third, _ = trainer_of(tmp_path / "c", budget=4)
    trainer.train()
    other.train()
    assert losses(trainer) == losses(alone)
    assert second.rank_map == first.rank_map != third.rank_map


def test_errors_are_the_command_lines() -> None:
    with pytest.raises(DynloraError) as refused:
        attach(tiny_llama(), policy="fischer")
    assert refused.value.exit_code == 2
