"""What may be assumed of a model's blocks."""

from __future__ import annotations

import torch
import transformers

from dynlora_cli.execution.blocks import draws
from dynlora_cli.lora.layer import ComponentLinear


def test_dropout_is_found_wherever_it_is():
    llama = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 8,
    }
    assert not draws(transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)))
    assert draws(transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, attention_dropout=0.1)))
    assert draws(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert draws(ComponentLinear(torch.nn.Linear(2, 2), 1.0, dropout=0.1))
