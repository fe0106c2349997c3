"""Tiny models of every architecture that has a GGUF form, their exports, and adapters large enough to change a text.

CONFIGS       what to build, by name: grouped heads, heads of their own size, biases, scaled rotary embeddings, Conv1D
pre_tokenizer, trained_tokenizer      by the names that llama.cpp gives to the ways to cut a text into words
make          a model and its tokenizer in a folder, with the same weights on every machine
random_layers factors of mixed rank for most of a model's layers, and none for every sixth
export_base, export_merged
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from data_helpers import SPECIAL, byte_tokenizer
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from dynlora_cli.export.gguf.file import write_model
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.targets import find_targets

SMALL: dict[str, Any] = {
    "vocab_size": 352,  # more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA: dict[str, Any] = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 24}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, head_dim=24, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama-linear": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    ),
    "llama-3": LlamaConfig(**SMALL, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
    "mistral": MistralConfig(**SMALL, sliding_window=128, head_dim=16),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "gemma2": Gemma2Config(**SMALL, **GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SMALL | {"num_hidden_layers": 7}, **GEMMA),
    "gemma3-pattern": Gemma3TextConfig(
        **SMALL, **GEMMA, layer_types=["full_attention", "sliding_attention"], final_logit_softcapping=2.0,
        tie_word_embeddings=False, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "phi3": Phi3Config(**SMALL, pad_token_id=1, sliding_window=None, tie_word_embeddings=False),
    "phi3-long": Phi3Config(
        **SMALL | {"max_position_embeddings": 512}, pad_token_id=1, original_max_position_embeddings=256, sliding_window=400, rope_parameters={
            "rope_type": "longrope", "rope_theta": 5e3, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            "long_factor": [1.0 + i for i in range(6)], "short_factor": [1.0 + i / 4 for i in range(6)],
        },
    ),
    "granite": GraniteConfig(
        **SMALL, embedding_multiplier=6.0, attention_multiplier=0.05, residual_multiplier=0.3, logits_scaling=4.0
    ),
    "granite-biases": GraniteConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "olmo2": Olmo2Config(**SMALL),
    "olmo2-tied": Olmo2Config(**SMALL, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 5}, pad_token_id=1),
    "qwen2-moe": Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, **EXPERTS, norm_topk_prob=True, head_dim=24, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=352, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1),
}  # fmt: skip


PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "gpt-4o")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """What GPT-2, SmolLM, Qwen 2, Llama 3, GPT-4 and GPT-4o do before merging."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    digits_of = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}", "dbrx": r"\p{N}{1,3}"}
    words = Regex(_GPT4O if name == "gpt-4o" else _WORDS % digits_of[name])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), plain])


def trained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with one of the pre-tokenizers; nothing is added to a text."""
    bpe = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer(name), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    readme = Path(__file__).parent.parent / "README.md"
    bpe.train_from_iterator(readme.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """Write the model and its tokenizer to `folder`; uniform weights, which torch draws alike on every CPU."""
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = (-0.3, 0.3) if parameter.ndim > 1 else (0.5, 1.5)
            parameter.uniform_(low, high, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_layers(model: PreTrainedModel, strength: float = 0.1) -> dict[str, tuple[Tensor, Tensor]]:
    """a_CI and b_OC by module name; C goes from 1 to 5."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for index, (name, module) in enumerate(find_targets(model, "all-linear").items()):
        inputs, outputs = linear_shape(module)
        rank = 1 + 3 * index % 5
        a_CI = torch.empty(rank, inputs).uniform_(-strength, strength, generator=generator)
        b_OC = torch.empty(outputs, rank).uniform_(-1, 1, generator=generator)
        if index % 6 != 5:
            layers[name] = a_CI, b_OC
    return layers


def add(model: PreTrainedModel, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put an adapter's change into the weights of a model."""
    with torch.no_grad():
        for name, (a_CI, b_OC) in layers.items():
            module = model.get_submodule(name)
            change_OI = b_OC @ a_CI
            module.weight += change_OI.T if type(module).__name__ == "Conv1D" else change_OI


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def export_base(folder: Path, path: Path, kind: str = "f32") -> dict[str, Any]:
    """Write the model of a folder as GGUF, straight from its safetensors file."""
    if "num_experts_per_tok" in config_of(
        folder
    ):  # a file has each expert apart, a model in memory all of a block together
        return export_merged(folder, path, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), kind)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return write_model(path, config_of(folder), folder, file.keys(), file.get_tensor, kind=kind)


def export_merged(folder: Path, path: Path, model: PreTrainedModel, kind: str = "f32") -> dict[str, Any]:
    """Write a model in memory as GGUF, with the config and the tokenizer of a folder."""
    state = model.state_dict()
    names = [name for name in state if name != "lm_head.weight" or not model.config.tie_word_embeddings]
    return write_model(path, config_of(folder), folder, names, state.__getitem__, kind=kind)
