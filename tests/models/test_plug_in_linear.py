"""A kind of linear layer that dynlora does not know is one new file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Answer
from numeric import assert_close_to_truth
from tiny_run import make_recipe, model_folder, train
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from tutorials import code_of

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import MeasureError


class GainLinear(nn.Linear):
    """Multiplies its weight by a number."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device=like.weight.device)
        self.register_buffer("gain", torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class GainConfig(LlamaConfig):
    model_type = "llama_with_gains"


class GainModel(LlamaForCausalLM):
    config_class = GainConfig

    def __init__(self, config: GainConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.q_proj = GainLinear(layer.self_attn.q_proj)


@pytest.fixture
def run(tmp_path: Path, plug_in: Callable[..., Path]) -> Path:
    """A HiRA on a model with gains: W' = W ∘ (1 + ΔW), and W is what the plug-in says."""
    AutoConfig.register(GainConfig.model_type, GainConfig, exist_ok=True)
    AutoModelForCausalLM.register(GainConfig, GainModel, exist_ok=True)
    ((_, code),) = code_of("linears").items()
    plug_in("linears", "gain", code)
    base = model_folder(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(base)
    model = GainModel(GainConfig(**{**plain.config.to_dict(), "model_type": GainConfig.model_type}))
    model.load_state_dict(plain.state_dict(), strict=False)
    shutil.rmtree(base / "model.safetensors", ignore_errors=True)
    model.save_pretrained(base)
    recipe = make_recipe(tmp_path, "adapter.variant=hira", "adapter.target_modules=q_proj")
    with pytest.raises(MeasureError, match="stock PEFT does not compute what was written"):  # it multiplies W alone
        train(recipe)
    return Path(recipe.output_dir)


def test_the_weight_is_the_one_that_the_layer_multiplies_with(run: Path):
    model, adapter = GainModel.from_pretrained(run.parent / "llama"), read_adapter(run)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        with attached(model, adapter):
            ours = model(ids).logits
        plain = model.double()(ids).logits
        for name, factors in adapter.layers.items():
            weight = model.get_submodule(name).weight
            weight.mul_(1 + factors.b_OC.double() @ factors.a_CI.double())
        truth = model(ids).logits
    assert (truth - plain).abs().max() > 1e-2
    assert_close_to_truth(ours, truth, terms=2 * (2 * (32 + 64)) + 24)


def test_merging_into_another_weight_than_the_stored_one_is_refused(run: Path, dynlora: Callable[..., Answer]):
    answer = dynlora("merge", "--adapter", run, "--json")
    assert answer.code == 2, answer.err
    assert "does not multiply with the weight that its files hold" in answer.json["error"]
