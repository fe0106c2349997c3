"""The published configs of models that people have, as far as GGUF needs them: taken, with the numbers that they mean."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynlora_cli.export.gguf.architectures import architecture

_LONG = {"type": "longrope", "long_factor": [4.0] * 48, "short_factor": [1.0] * 48}
# As config.json on the hub has them, in the form of its time.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "gemma-2-2b": (
        {
            "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096,
            "vocab_size": 256000,
        },
        {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "attention.head_count_kv": 4},
        2 + 26 * 11,
    ),
    "gemma-2-27b": (
        {
            "model_type": "gemma2", "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864,
            "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144, "vocab_size": 256000,
        },
        {"block_count": 46, "final_logit_softcapping": 30.0},
        2 + 46 * 11,
    ),
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 512},
        2 + 26 * 13,
    ),
    "Phi-3-mini-4k": (
        {
            "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0,
            "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
        },
        {"context_length": 2047, "rope.dimension_count": 96, "attention.sliding_window": 0},
        3 + 32 * 6,
    ),
    "Phi-4-mini": (
        {
            "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rope_scaling": _LONG,
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
        },
        {
            "context_length": 131072, "rope.dimension_count": 96, "rope.scaling.original_context_length": 4096,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(32) / math.log(4096)),
        },
        2 + 32 * 6,
    ),
    "granite-3.3-2b": (
        {
            "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0, "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40,
            "num_key_value_heads": 8, "residual_multiplier": 0.22, "rope_theta": 1e7, "tie_word_embeddings": True,
            "vocab_size": 49159,
        },
        {"attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
        2 + 40 * 9,
    ),
    "OLMo-2-0425-1B": (
        {
            "model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "rope_theta": 500000,
            "tie_word_embeddings": False, "vocab_size": 100352,
        },
        {"rope.freq_base": 5e5, "attention.key_length": 128},
        3 + 16 * 11,
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
            "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
            "num_key_value_heads": 4, "rope_scaling": None, "rope_theta": 5e6, "sliding_window": None,
            "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 128256,
        },
        {"rope.freq_base": 5e6, "context_length": 65536},
        2 + 36 * 9,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
            "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1e6,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768},
        3 + 48 * 12,
    ),
    "Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
            "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
            "num_key_value_heads": 16, "rope_theta": 1e6, "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"expert_count": 60, "expert_shared_feed_forward_length": 5632, "context_length": 8192},
        3 + 24 * 17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_taken(name):
    config, expected, tensors = PUBLISHED[name]
    arch = architecture(config)
    found = {key.partition(".")[2]: value for key, value in arch.keys.items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert len(arch.entries) == tensors
    assert len({entry.gguf for entry in arch.entries}) == tensors
    assert "attention.sliding_window_pattern" not in found, "the order of windows is the one that llama.cpp knows"
