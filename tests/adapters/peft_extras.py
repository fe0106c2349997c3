"""Adapters of stock PEFT that have more than factors: trained rows of tokens, biases, tables; on tiny random models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from numeric import in_double
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft_adapters import LLAMA
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    T5Config,
)

WORDS = 64
SMALL = {**LLAMA, "num_hidden_layers": 2}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma": Gemma3TextConfig(**SMALL, head_dim=8, tie_word_embeddings=True, sliding_window=32),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "phi": PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "bert": BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    ),
    "t5": T5Config(**T5, decoder_start_token_id=0),
    "t5-untied": T5Config(**T5, decoder_start_token_id=0, tie_word_embeddings=False),
}  # fmt: skip
CONV1D = {"fan_in_fan_out": True}
# name: (base, arguments of PEFT's LoraConfig, what else: `resize` of the base, arguments of save_pretrained)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60, 7]}, {}),
    "rows-tied": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}, {}),
    "rows-of-both": (
        "llama",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
        {},
    ),
    "rows-of-both-tied": (
        "llama-tied",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4, 5]}},
        {},
    ),
    "rows-of-a-tied-head": (
        "llama-tied",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"lm_head": [4, 5]}},
        {},
    ),
    "rows-and-head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]}, {}),
    "rows-and-saved-head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3]},
        {},
    ),
    "rows-gpt2": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [0, 9], **CONV1D}, {}),
    "rows-gemma": ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9], "use_rslora": True}, {}),
    "rows-bert": ("bert", {"target_modules": ["query"], "trainable_token_indices": [3], "task_type": "SEQ_CLS"}, {}),
    "rows-t5": ("t5", {"target_modules": ["q", "wo"], "trainable_token_indices": [3, 8]}, {}),
    "rows-t5-untied": ("t5-untied", {"target_modules": ["q"], "trainable_token_indices": [3, 8]}, {}),
    "rows-and-tables": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
        {"save_embedding_layers": True},
    ),
    "more-tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [64, 65]}, {"resize": 66}),
    "more-tokens-tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 65, 64]},
        {"resize": 66},
    ),
    "more-tokens-rows-alone": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 65, 64]},
        {"resize": 66, "save_embedding_layers": False},
    ),
    "more-tokens-of-both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [64, 65], "lm_head": [65, 64]},
        },
        {"resize": 66, "save_embedding_layers": False},
    ),
    "more-tokens-lora": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"resize": 66}),
    "more-tokens-lora-tied": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}, {"resize": 66}),
    "more-tokens-lora-gemma": (
        "gemma",
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True, "use_dora": True},
        {"resize": 66},
    ),
    "fewer-tokens": ("llama", {"target_modules": ["q_proj"]}, {"resize": 60}),
    "fewer-tokens-tied": ("llama-tied", {"target_modules": ["q_proj"]}, {"resize": 60}),
    "rows-of-a-head-with-a-bias": (
        "phi",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [3, 9]}},
        {},
    ),
    "tables": ("llama-tied", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
    "tables-untied": ("llama", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True, "resize": 70}),
    "saved-table": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {}),
    "saved-tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
    "saved-both": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied-factors": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
    "bias-all": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}, {}),
    "bias-lora-only": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}, {}),
    "bias-none-there": ("llama", {"target_modules": ["q_proj"], "bias": "all"}, {}),
    "bias-some": ("qwen2", {"target_modules": ["q_proj", "o_proj", "up_proj"], "bias": "lora_only"}, {}),
    "bias-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all", **CONV1D}, {}),
    "bias-gpt2-only": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", **CONV1D}, {}),
    "bias-bert": ("bert", {"target_modules": ["query", "dense"], "bias": "all", "task_type": "SEQ_CLS"}, {}),
    "bias-dora": ("llama-bias", {"target_modules": ["q_proj", "up_proj"], "bias": "all", "use_dora": True}, {}),
    "bias-parameter": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["attn.c_attn.weight"], "bias": "all"},
        {},
    ),
    "lora-bias": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "lora_alpha": 7}, {}),
    "lora-bias-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, **CONV1D}, {}),
    "lora-bias-bert": ("bert", {"target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"}, {}),
    "lora-bias-new": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}, {}),
    "lora-bias-qwen2": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, {}),
    "lora-bias-all": (
        "llama-bias",
        {
            "target_modules": ["q_proj", "down_proj"],
            "lora_bias": True,
            "bias": "all",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "trainable_token_indices": [3, 4],
        },
        {},
    ),
    "lora-table": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}, {}),
    "lora-table-bert": ("bert", {"target_modules": ["word_embeddings", "query"], "task_type": "SEQ_CLS"}, {}),
    "lora-table-t5": ("t5", {"target_modules": ["shared", "q"]}, {}),
    "lora-table-t5-encoder": ("t5", {"target_modules": ["encoder.embed_tokens", "q"]}, {}),
    "dora-table": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {}),
    "dora-table-tied": (
        "gemma",
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "rank_pattern": {"embed_tokens": 2}},
        {},
    ),
    "dora-table-gpt2": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "use_dora": True, **CONV1D}, {}),
    "tokens-alone": ("llama", {"token_indices": [3, 60]}, {}),
    "tokens-alone-tied": ("llama-tied", {"token_indices": [3, 60]}, {}),
    "tokens-alone-of-both": ("llama", {"token_indices": [5, 2], "target_modules": ["embed_tokens", "lm_head"]}, {}),
    "tokens-alone-more": ("llama-tied", {"token_indices": [64, 65]}, {"resize": 66}),
    "excluded": (
        "llama-bias",
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "bias": "lora_only"},
        {},
    ),
}


def base_model(kind: str, folder: Path, **saving: Any) -> Path:
    """A random base on disk, no number of it at its usual start; `dtype` of `saving` is its type."""
    path = folder / f"base-{kind}"
    dtype = saving.pop("dtype", torch.float32)
    torch.manual_seed(0)
    model = BertModel(BASES[kind]) if kind == "bert" else _auto(kind).from_config(BASES[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(path, **saving)
    return path


def _auto(kind: str) -> Any:
    return AutoModelForSeq2SeqLM if kind.startswith("t5") else AutoModelForCausalLM


def load(path: Path, kind: str | None = None, *, resize: int | None = None) -> Any:
    """The base, with a classifier on an encoder; `resize` tokens where that is given."""
    torch.manual_seed(1)
    kind = kind or path.name.removeprefix("base-")
    if kind == "bert":
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()
    else:
        model = _auto(kind).from_pretrained(path).eval()
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    return model


def make(name: str, folder: Path, **saving: Any) -> tuple[Path, Path]:
    """A base and a PEFT adapter on it, every trained number of which is another than at the start.

    Returns:
        the base's folder and the adapter's.
    """
    kind, options, more = CASES[name]
    return make_of(kind, options, folder, more, **saving)


def make_of(
    kind: str, options: dict[str, Any], folder: Path, more: dict[str, Any] | None = None, **saving: Any
) -> tuple[Path, Path]:
    """The same of other options than a case's; `token_indices` among them: PEFT's kind that has rows alone."""
    path, more = base_model(kind, folder, **saving), dict(more or {})
    if "token_indices" in options:
        config: Any = TrainableTokensConfig(**{"task_type": "CAUSAL_LM", **options})
    else:
        task = "SEQ_2_SEQ_LM" if kind.startswith("t5") else "CAUSAL_LM"
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": task, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(path, resize=more.pop("resize", None)), config)
        change(model)
        model.save_pretrained(folder / "adapter", **more)
    return path, folder / "adapter"


@torch.no_grad()
def change(model: Any) -> None:
    """Give everything that is trained other numbers, and not small ones."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name and not name.endswith("bias"):
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def texts(kind: str, words: int = WORDS) -> dict[str, torch.Tensor]:
    """Inputs that hold every token."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat([torch.randperm(words, generator=generator) for _ in range(2)])[: 2 * (words // 2 // 2 * 2)]
    inputs = {"input_ids": ids.view(4, -1)}
    if kind.startswith("t5"):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)[:, :12]
    return inputs


@torch.no_grad()
def logits_of(model: Any, kind: str, words: int = WORDS) -> torch.Tensor:
    return model(**texts(kind, words)).logits


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, words: int = WORDS) -> torch.Tensor:
    """What stock PEFT computes, in fp64: the truth for others, and independent of the processor."""
    kind = base.name.removeprefix("base-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load(base, resize=words if words != WORDS else None), adapter).eval()
    return logits_of(in_double(model), kind, words)


def edit(adapter: Path, **changes: object) -> None:
    """Change adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(adapter: Path, change: Any) -> None:
    """Change the tensors, in a function of them."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
