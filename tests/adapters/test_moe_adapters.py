"""Adapters on mixtures of experts as stock PEFT writes them under transformers 5: experts, routers, any parameter."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth, in_double
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import LLAMA, TERMS, ids
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import export, prune
from dynlora_cli.commands.merge import into_base
from dynlora_cli.config.budget import Budget
from dynlora_cli.errors import UsageError

SIZES = {**LLAMA, "num_hidden_layers": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0}
APART = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "deepseek_v3": {
        **APART, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "glm4_moe": {**APART, "n_group": 1, "topk_group": 1},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},  # transposed, with biases
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},  # transposed
    "phimoe": {"num_local_experts": 4},  # its router is a linear layer that returns two tensors
}  # fmt: skip
SEVEN = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
FORMS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "seven names": {"target_modules": SEVEN},
    "bare": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    "qualified": {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one of the two": {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
    "routers": {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "router.weight"]},
    "patterns": {
        "target_modules": SEVEN, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 0, "o_proj": 3},
        "use_rslora": True,
    },
}  # fmt: skip
# PEFT cannot wrap, as a module, a router that returns two tensors.
IMPOSSIBLE = {("llama4_text", "all-linear"), ("phimoe", "all-linear")}
MOST_USED = ("mixtral", "qwen3_moe", "olmoe")
COMBINATIONS = [
    pytest.param(kind, form, marks=() if (kind in MOST_USED and form != "qualified") or kind == "gpt_oss" else slow)
    for slow in [pytest.mark.slow]
    for kind in MODELS
    for form in FORMS
    if (kind, form) not in IMPOSSIBLE
]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for kind, special in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | special)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder / kind)
        found[kind] = folder / kind
    return found


def peft_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """Save what stock PEFT makes, with random numbers; returns its model in fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        model = get_peft_model(load(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.15)
        model.save_pretrained(folder)
        return in_double(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids()).logits


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), COMBINATIONS)
def test_what_peft_computes(kind: str, form: str, bases: dict[str, Path], tmp_path: Path):
    base, close = bases[kind], partial(assert_close_to_truth, terms=4 * TERMS)
    truth = logits(peft_adapter(base, tmp_path / "adapter", **FORMS[form]))
    adapter = read_adapter(tmp_path / "adapter")
    with attached(model := load(base), adapter):
        close(logits(model), truth)
    assert model.state_dict().keys() == load(base).state_dict().keys()
    into_base(adapter, tmp_path / "merged", base_name=str(base))
    close(logits(load(tmp_path / "merged")), truth)
    export.run(tmp_path / "adapter", "peft", tmp_path / "peft", base_name=str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(logits(PeftModel.from_pretrained(load(base), tmp_path / "peft").eval()), truth)


def test_layers_have_the_names_of_the_model(bases: dict[str, Path], tmp_path: Path):
    """Any module and `.down_proj` ends in `.down_proj`, which is all that a bare target says."""
    peft_adapter(bases["qwen3_moe"], tmp_path / "adapter", target_modules="all-linear")
    modules = dict(load(bases["qwen3_moe"]).named_modules())
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.experts) == 2 * 4 * 2
    plain = [name for name in adapter.layers if name not in adapter.experts]
    assert len(plain) == 2 * 5
    assert set(plain) <= modules.keys()
    assert "model.layers.0.mlp.gate" in plain


@pytest.mark.parametrize("form", ["all-linear", "qualified", "routers"])
def test_pruned_after_training(form: str, bases: dict[str, Path], tmp_path: Path):
    """Half of the components, and what is left is a part of what was there: PEFT loads it."""
    base = bases["qwen3_moe"]
    peft_adapter(base, tmp_path / "adapter", **FORMS[form])
    summary = prune.run(prune.Request(tmp_path / "adapter", Budget("share", 0.5), tmp_path / "pruned", measure=False))
    before, after = (read_adapter(tmp_path / name) for name in ("adapter", "pruned"))
    assert after.parameters == summary["parameters"] <= before.parameters // 2
    kept = sum(factors.energy() ** 2 for factors in after.layers.values())
    whole = sum(factors.energy() ** 2 for factors in before.layers.values())
    assert kept / whole == pytest.approx(summary["energy_kept"], rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = logits(in_double(PeftModel.from_pretrained(load(base), tmp_path / "pruned").eval()))
    with attached(model := load(base), after):
        assert_close_to_truth(logits(model), truth, terms=4 * TERMS)


def test_parameters_that_cannot_be_told_apart_are_refused(bases: dict[str, Path], tmp_path: Path):
    names = ["experts.gate_up_proj", "experts.down_proj"]
    peft_adapter(bases["olmoe"], tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("experts.gate_up_proj", "experts.odd"))
    with pytest.raises(UsageError, match=r"belong to is not to be told: down_proj, odd"):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_of_another_number_of_experts(bases: dict[str, Path], tmp_path: Path):
    peft_adapter(bases["olmoe"], tmp_path / "adapter", **FORMS["bare"])
    with pytest.raises(UsageError, match="in the base and") as refused:
        into_base(read_adapter(tmp_path / "adapter"), tmp_path / "merged", base_name=str(bases["qwen3_moe"]))
    assert "--base FOLDER" in str(refused.value.hint)
