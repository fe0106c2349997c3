"""Stock PEFT as the oracle: with the same tensors ours computes what PEFT computes, and PEFT reads what ours saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_helpers import Dynlora
from numeric import assert_close_to_truth, in_double
from peft_adapters import load
from tiny_run import make_recipe, model_folder, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynlora_cli import plugins
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.training import outputs

RANK, ALPHA = 4, 6
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
# name: (variant, keys of the recipe, PEFT's configuration, its arguments)
CASES: dict[str, tuple[str, list[str], Any, dict[str, Any]]] = {
    "lora": ("lora", ["alpha=6"], peft.LoraConfig, {"lora_alpha": ALPHA}),
    "rslora": ("lora", ["alpha=6", "scaling=rslora"], peft.LoraConfig, {"lora_alpha": ALPHA, "use_rslora": True}),
    "dora": ("dora", ["alpha=6"], peft.LoraConfig, {"lora_alpha": ALPHA, "use_dora": True}),
    # PEFT's HiRA has no scale.
    "hira": ("hira", [f"alpha={RANK}"], peft.HiraConfig, {}),
    "vera": ("vera", [], peft.VeraConfig, {"projection_prng_key": 3}),
    # PEFT divides by the rank at the start, as ours by the budget's.
    "adalora": ("adalora", ["alpha=6"], peft.AdaLoraConfig, {"lora_alpha": ALPHA, "init_r": RANK, "total_step": 10}),
}


# Roundings on the way to a logit, and as many back: in each of two blocks, sums over up to 32 and 64 numbers, 24 tokens.
TERMS = 2 * (2 * (32 + 64)) + 24


def ids() -> Tensor:
    return torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(3))


def peft_model(kind: str, base: Path, config: Any, options: dict[str, Any]) -> Any:
    """PEFT's model, every trained tensor far from its start."""
    if kind == "gpt2":
        options = options | {"fan_in_fan_out": True}
    rank = {} if config is peft.AdaLoraConfig else {"r": RANK}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), config(**rank, **options, target_modules=TARGETS[kind]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def our_model(folder: Path, kind: str, base: Path, variant: str, keys: list[str]) -> tuple[Any, Pool]:
    """A model with components on the same layers."""
    recipe = make_recipe(folder, f"adapter.variant={variant}", *(f"adapter.{key}" for key in keys), "seed=3", kind=kind)
    model = load(base).requires_grad_(False)
    targets = {name: module for name, module in model.named_modules() if name.split(".")[-1] in TARGETS[kind]}
    start = Start(dict.fromkeys(targets, RANK), 0, 0, RANK)
    return model, plugins.load("variants", variant).attach(model, targets, start, recipe.adapter, recipe.seed)


def same(name: str, ours: Any, theirs: Any) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor], nn.Parameter]]:
    """What is the same of two layers: a leaf of ours, the part of it, and PEFT's parameter."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor

    if name == "vera":
        b, d = theirs.vera_lambda_b["default"], theirs.vera_lambda_d["default"]
        return [(ours.a_CI, lambda t: t[:, 0], d), (ours.lambda_b_O, whole, b)]
    if name == "hira":
        return [(ours.a_CI, whole, theirs.hira_A["default"]), (ours.b_OC, whole, theirs.hira_B["default"])]
    a, b = theirs.lora_A["default"], theirs.lora_B["default"]
    if name == "adalora":
        e = theirs.lora_E["default"]
        return [(ours.a_CI, lambda t: t[:, :-1], a), (ours.a_CI, lambda t: t[:, -1:], e), (ours.b_OC, whole, b)]
    found = [(ours.a_CI, whole, a.weight), (ours.b_OC, whole, b.weight)]
    if name == "dora":
        found.append((ours.magnitude_O, whole, theirs.lora_magnitude_vector["default"].weight))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_peft(name: str, kind: str, tmp_path: Path):
    variant, keys, config, options = CASES[name]
    base = model_folder(tmp_path, kind)
    theirs = peft_model(kind, base, config, options)
    ours, pool = our_model(tmp_path, kind, base, variant, keys)
    pairs = [
        pair
        for layer_name, layer in pool.layers.items()
        for pair in same(name, layer, theirs.get_submodule(f"base_model.model.{layer_name}"))
    ]
    with torch.no_grad():
        for mine, part, other in pairs:
            part(mine.data).copy_(other)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert {id(other) for _, _, other in pairs} == {id(parameter) for parameter in trained}
    theirs.double()  # the truth; its parameters stay the same objects
    before = load(base)(ids()).logits
    results = []
    for model in (theirs, ours):
        logits = model(ids()).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)) / logits.shape[-1]
        (logits * weight).sum().backward()
        results.append(logits.detach())
    assert_close_to_truth(results[1], results[0], terms=TERMS)
    assert (results[0] - before).abs().max() > 0.01, "the adapter does something"
    for mine, part, other in pairs:
        assert other.grad.abs().max() > 1e-4
        assert_close_to_truth(part(mine.grad), other.grad, terms=TERMS)


def test_the_frozen_pair_of_vera_is_that_of_peft(tmp_path: Path):
    variant, keys, config, options = CASES["vera"]
    theirs = peft_model("llama", model_folder(tmp_path), config, options).base_model
    _, pool = our_model(tmp_path, "llama", model_folder(tmp_path), variant, keys)
    for layer in pool.layers.values():
        assert torch.equal(layer.pair[0], theirs.vera_A["default"])
        assert torch.equal(layer.pair[1], theirs.vera_B["default"])


RUNS = [
    ("dora", "llama"),
    ("vera", "llama"),
    ("hira", "llama"),
    ("singlora", "llama"),
    ("vera", "gpt2"),
    ("hira", "gpt2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kind"), RUNS)
def test_peft_and_a_merge_compute_what_a_pruned_run_computed(
    variant: str, kind: str, tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    logits = []
    finish = outputs.finish

    @torch.no_grad()
    def listening(folder: Path, record: dict[str, Any], training: Any, summary: dict[str, Any]) -> None:
        logits.append(in_double(training.model.eval())(ids()).logits)
        finish(folder, record, training, summary)

    monkeypatch.setattr(outputs, "finish", listening)
    recipe = make_recipe(
        tmp_path, f"adapter.variant={variant}", "rank.budget=0.2", "train.learning_rate=0.05", kind=kind
    )
    summary, _ = train(recipe)
    ranks = summary["ranks"].values()
    assert len(set(ranks)) > 1, "layers differ, so that what they are filled up with shows"
    base, out = Path(recipe.model.name_or_path), Path(recipe.output_dir)
    with torch.no_grad():
        plain = load(base)
        assert (plain(ids()).logits - logits[0]).abs().max() > 0.01, "training did something"
        with attached(plain, read_adapter(out)):
            assert_close_to_truth(plain(ids()).logits, logits[0], terms=TERMS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # keys or tensors that PEFT does not know
            model = peft.PeftModel.from_pretrained(load(base), out).eval()
        assert_close_to_truth(model(ids()).logits, logits[0], terms=TERMS)
        answer = dynlora("merge", "--adapter", out, "--json")
        assert answer.code == 0, answer.err
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
        assert_close_to_truth(merged(ids()).logits, logits[0], terms=TERMS)
