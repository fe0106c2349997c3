"""Tiny random models of any type that transformers knows: its own default config, shrunk field by field.

shrunk        the config of a type, small enough that a model of it is made and trained in seconds
write_tiny    the model with a tokenizer on disk

`CARE` holds what the general rules get wrong, per type; a dotted key is a field of a nested config.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from data_helpers import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, PreTrainedConfig

LANGUAGE, SEQ2SEQ, CLASSES = "causal-lm", "seq2seq-lm", "sequence-classification"
AUTO = {
    LANGUAGE: transformers.AutoModelForCausalLM,
    SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
    CLASSES: transformers.AutoModelForSequenceClassification,
}
POSITIONS = 160
# The first pattern that matches the whole name of an integer field gives its value.
RULES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), value)
    for pattern, value in (
        (r"(.*_)?vocab_size(_.*)?|n_words|type_vocab_size_of_text", 0),  # the tokenizer's
        (r"bos_token_id|decoder_start_token_id|cls_token_id", 0),
        (r"(eos|pad|sep|forced_eos|forced_bos)_token_id|pad_index|eos_index", 1),
        (r"(num|n)_(hidden_)?layers?(_.*)?|n_layers?|num_(encoder|decoder)_layers|(encoder|decoder)_layers", -1),
        (r".*(num|n)_(key_value|kv)_heads?|.*kv_heads|num_query_groups|multi_query_group_num|num_kv_head", 2),
        (r"(mamba|ssm|gated_delta).*(n|num)_heads|mamba_num_heads|n_mamba_heads", 8),
        (r".*(num|n)_(attention_)?heads?|(encoder|decoder)_attention_heads|n_head|.*_heads|num_attention_head", 4),
        (r"linear_num_value_heads", 4),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
        (r"linear_num_key_heads", 2),
        (r".*head_dim|d_kv|.*d_head|head_size|kv_channels|attention_head_size|.*_head_size", 8),
        (r"(q|kv|o|v)_lora_rank|.*lora_rank", 16),
        (r"(num_expert_groups?|n_groups?|topk_groups?|mamba_n_groups|.*num_groups)", 1),
        (r".*(experts_per_tok|top_?k|top_k_experts|moe_k)(_.*)?", 2),
        (r".*shared_experts?", 1),
        (r".*(num|n)_.*experts|.*num_experts|.*_experts", 4),
        (r".*(state_size|d_state|ssm_state.*)", 8),
        (r".*(conv_kernel|d_conv|conv1d_width|conv_size)", 4),
        (r".*(chunk_size|block_size)", 16),
        (r".*time_step_rank|.*dt_rank", 4),
        (r".*(intermediate|ffn|ffw|mlp|feed_forward|inner|d_ff).*", 64),
        (r"(.*_)?(hidden_size.*|d_model|n_embd|dim|embed_dim|hidden_dim|.*embedding_size|emb_dim|lru_width)", 32),
        (
            r"max_(target_)?position(s|_embeddings)|n_positions|n_ctx|max_sequence_length|max_seq(_len|uence_length)",
            POSITIONS,
        ),
        (r"max_source_positions|seq_length|max_seq_len", POSITIONS),
        (r"(.*_)?image_size", 32),
        (r"(.*_)?patch_size", 16),
    )
]
GEMMA4: dict[str, Any] = {"per_layer_config": {"1": {"head_dim": 16}}, "hidden_size_per_layer_input": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GROUPED = {"num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1}
MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
CARE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": GROUPED | {"qk_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MOE | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "qk_head_dim": 16},
    "dots1": MOE,
    "dots3_note": {"per_layer_config": {}},
    "dots3_note_text": {"per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n": {f"text_config.{key}": value for key, value in GEMMA3N.items()},
    "gemma3n_text": GEMMA3N,
    "gemma4": {f"text_config.{key}": value for key, value in GEMMA4.items()},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {f"text_config.{key}": value for key, value in GEMMA4.items()},
    "gemma4_unified_text": GEMMA4,
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": HYBRID,
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": GROUPED | {"qk_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mistral4": {"qk_head_dim": 16, "head_dim": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 20],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "squeezebert": {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_query_groups": 4,
        "adapter_rank": 8,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: str, vocabulary: int) -> PreTrainedConfig:
    """The config of a type of model, small.

    Args:
        kind: model_type.
        vocabulary: tokens of the tokenizer.

    Raises:
        Exception: whatever the config class says where the rules do not fit it.
    """
    made = CONFIG_MAPPING[kind]
    values = _shrink(made().to_dict(), vocabulary)
    for key, value in CARE.get(kind, {}).items():
        *path, leaf = key.split(".")
        inside = values
        for part in path:
            inside = inside[part]
        inside[leaf] = value
    return made.from_dict(values)


def _shrink(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    layers_before = next((values[key] for key in values if key in ("num_hidden_layers", "n_layer", "num_layers")), None)
    picked = _picked_layers(values, layers_before)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            small[name] = _shrink(value, vocabulary) if "model_type" in value else value
        elif isinstance(value, (list, tuple)) and layers_before and len(value) == layers_before > 2:
            small[name] = [value[index] for index in picked]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = value
        else:
            small[name] = _small(name, value, vocabulary, len(picked))
    heads = values.get("num_attention_heads")
    for name in ("num_key_value_heads",):
        if heads and values.get(name) == heads:
            small[name] = small["num_attention_heads"]
    return small


def _small(name: str, value: int, vocabulary: int, layers: int) -> int:
    for pattern, limit in RULES:
        if pattern.fullmatch(name) and name != "chunk_size_feed_forward":
            wanted = {0: vocabulary, -1: layers}.get(limit, limit) if "token" not in name else limit
            return wanted if wanted > value or value > wanted else value
    if name.endswith(("_token_id", "_token_index", "_token")) and value >= vocabulary:
        return vocabulary - 1
    return value


def _picked_layers(values: dict[str, Any], count: int | None) -> list[int]:
    """Two layers at least, and one of every kind that the config lists."""
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if not kinds or len(kinds) != count:
        return [0, 1]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return sorted(first) if len(first) > 1 else [0, 1]


def write_tiny(path: Path, kind: str, task: str) -> None:
    """A model of this type for this task with its tokenizer, the same at every call."""
    tokenizer = byte_tokenizer(cls_token="<s>", sep_token="</s>")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2)  # not the end of a text, which BART counts
    config = shrunk(kind, len(tokenizer))
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = tokenizer.pad_token_id, 0, 1
        if task == LANGUAGE and hasattr(part, "is_decoder"):
            part.is_decoder = True
        if part.is_encoder_decoder:
            part.decoder_start_token_id = 0
    if task == CLASSES:
        backend = tokenizer.backend_tokenizer  # BART and its kin read the class at the end of the text
        backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        config.id2label, config.label2id = {0: "few", 1: "many"}, {"few": 0, "many": 1}
    torch.manual_seed(0)
    model = AUTO[task].from_config(config, dtype=torch.float32)
    with torch.no_grad():  # so that no layer's share in the logits is lost in rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    if type(model.config) not in AUTO[task]._model_mapping:  # of Emu3 a part alone, which nothing loads by itself
        config.save_pretrained(path)
    tokenizer.save_pretrained(path)
