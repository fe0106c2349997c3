"""Adapters as other people make them: stock PEFT on tiny random models, every kind that dynlora reads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from numeric import in_double, rounding
from peft import HiraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from dynlora_cli.adapters.adapter import Factors

LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "llama-tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gemma": Gemma3TextConfig(**LLAMA, head_dim=8, tie_word_embeddings=True, sliding_window=32),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "bert": BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    ),
}  # fmt: skip

# What only some tests use.
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "tied-conv1d": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}
# name: (base, arguments of PEFT's configuration)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear", "lora_alpha": 16}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"v_proj": 3, r"^model\.layers\.2\..*": 10},
        },
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "tied": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "scaled-embedding": ("gemma", {"target_modules": ["q_proj", "embed_tokens"]}),
    "whole-head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "classifier": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "hira": ("llama", {"target_modules": "all-linear"}),
    "conv1d-hira": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "vera": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 48}),
    "conv1d-vera": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "projection_prng_key": 3}),
}


def base_model(kind: str, folder: Path, **saving: Any) -> Path:
    """A random base on disk; the encoder without a head, as a pretrained one."""
    path = folder / f"base-{kind}"
    torch.manual_seed(0)
    model = BertModel(BASES[kind]) if kind == "bert" else AutoModelForCausalLM.from_config(BASES[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(path, **saving)
    return path


def load(path: Path, classify: bool = False) -> Any:
    torch.manual_seed(1)
    if classify:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()
    return AutoModelForCausalLM.from_pretrained(path).eval()


def make(kind: str, folder: Path, **saving: Any) -> tuple[Path, Path]:
    """A base and a PEFT adapter on it whose weights are random and not small.

    Returns:
        the base's folder and the adapter's.
    """
    base, options = (KINDS | SPECIAL)[kind]
    path = base_model(base, folder, **saving)
    method = {"hira": HiraConfig, "vera": VeraConfig}.get(kind.split("-")[-1], LoraConfig)
    defaults: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM"}
    if method is LoraConfig:
        defaults["lora_alpha"] = 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(path, base == "bert"), method(**(defaults | options)))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vera_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                elif ("lora_" in name and "magnitude" not in name) or "hira_" in name:
                    parameter.normal_(std=0.15, generator=generator)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
                elif "modules_to_save" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / "adapter")
    return path, folder / "adapter"


# Roundings on the way to a logit of these bases: in each of three blocks, sums over up to 32 and 48 numbers.
TERMS = 3 * (32 + 48)
# Two models in fp32, each off by its own roundings; the logits of these bases and of tiny_run's are below 8.
SAME_LOGITS = 2 * 8 * rounding(torch.float32, TERMS)


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(3))


def exact_delta(factors: Factors) -> torch.Tensor:
    """The update of the fp32 factors, multiplied in fp64."""
    return factors.b_OC.double() @ factors.a_CI.double()


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, *, merged: bool = False) -> torch.Tensor:
    """What stock PEFT computes, in fp64: the truth for others, and independent of the processor."""
    classify = BASES["bert"].model_type in str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load(base, classify), adapter).eval()
        model = in_double(model)
        if merged:
            model = model.merge_and_unload()
    return model(ids()).logits
