"""A model, rows and a recipe small enough to train in seconds: a random Llama of 2 layers, 32 wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from data_helpers import ROLE_TOKENS, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

_VERBS = ("count", "sort", "reverse", "print", "join", "split", "copy")
_NOUNS = ("words", "lines", "numbers", "names")


def pico_model(folder: Path) -> Path:
    """Write a random Llama with a byte-level tokenizer and a chat template into `folder`/pico; the same bytes each time."""
    path = folder / "pico"
    tokenizer = byte_tokenizer(ROLE_TOKENS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rows(folder: Path, count: int = 40) -> Path:
    """Write `folder`/rows.jsonl: prompt/completion rows with different prompts."""
    path = folder / "rows.jsonl"
    lines = []
    for index in range(count):
        verb, noun = _VERBS[index % len(_VERBS)], _NOUNS[index % len(_NOUNS)]
        row = {"prompt": f"def {verb}_{noun}_{index}():", "completion": f" {verb} the {noun}"}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pico_recipe(folder: Path, **sections: Any) -> Path:
    """Write `folder`/recipe.yaml: 6 steps on 4 rows each, pruned from 8 to 2 components per layer, into `folder`/out.

    The model and the rows are written too, unless `sections` names others. JSON is YAML.

    Args:
        folder: an existing folder.
        sections: replace whole sections of the recipe.
    """
    recipe: dict[str, Any] = {
        "model": sections.get("model") or str(pico_model(folder)),
        "dataset": {"train": [str(rows(folder))], "val_size": 0.2, "max_length": 64},
        "rank": {"init": 8, "budget": 2},
        "pruning": {"start": 0.2, "end": 0.7, "events": 2},
        "train": {"max_steps": 6, "micro_batch_size": 4, "learning_rate": 0.005, "log_steps": 2},
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe | sections, indent=2) + "\n", encoding="utf-8")
    return path
