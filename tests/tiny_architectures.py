"""Tiny random models of many architectures, each built from its config; `CASES` says what is special in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data_helpers import byte_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE.items()}
BART |= {"d_model": 32, "decoder_start_token_id": 1}
LANGUAGE, CLASSES, SEQ2SEQ = "causal-lm", "sequence-classification", "seq2seq-lm"
# Config class, what is special in it, the task, and how many layers get components.
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama": ("Llama", GROUPED, LANGUAGE, 14),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 64}, LANGUAGE, 14),
    "qwen2": ("Qwen2", {**GROUPED, "tie_word_embeddings": True}, LANGUAGE, 14),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}, LANGUAGE, 14),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, LANGUAGE, 14),
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, LANGUAGE, 14),
    "phi": ("Phi", SMALL, LANGUAGE, 12),
    "phi3": ("Phi3", GROUPED, LANGUAGE, 8),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, LANGUAGE, 8),
    "gpt_neox": ("GPTNeoX", SMALL, LANGUAGE, 8),
    "opt": ("OPT", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, LANGUAGE, 12),
    "bert": ("Bert", SMALL, CLASSES, 12),
    "roberta": ("Roberta", SMALL, CLASSES, 12),
    "deberta-v2": (
        "DebertaV2",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        CLASSES,
        16,
    ),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, LANGUAGE, 8),
    "qwen2_moe": (
        "Qwen2Moe",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 48},
        LANGUAGE,
        14,
    ),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, **EXPERTS, "head_dim": 8}, LANGUAGE, 8),
    "olmoe": ("Olmoe", {**GROUPED, **EXPERTS}, LANGUAGE, 8),
    "t5": (
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 40},
        SEQ2SEQ,
        32,
    ),
    "bart": ("Bart", BART, SEQ2SEQ, 32),
    "modernbert": ("ModernBert", {**SMALL, "global_attn_every_n_layers": 2}, CLASSES, 9),
}


def some_fast(*fast: str) -> list[Any]:
    """Every architecture as a parameter of a test, all but these marked slow."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]


def write_model(path: Path, kind: str) -> None:
    """The model of a case with its tokenizer; an encoder as it comes from pretraining, without a classifier."""
    config_name, settings, task, _ = CASES[kind]
    tokenizer = byte_tokenizer(cls_token="<s>", sep_token="</s>")
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    config = getattr(transformers, f"{config_name}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=130, initializer_range=0.1, **(ids | settings)
    )
    auto = {
        LANGUAGE: transformers.AutoModelForCausalLM,
        CLASSES: transformers.AutoModelForMaskedLM,
        SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
    }
    torch.manual_seed(0)
    auto[task].from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
