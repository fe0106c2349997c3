"""From a transformers config to GGUF: architecture, hyperparameters, and one entry per tensor.

Everything follows from the config: which tensors a complete model has, their shapes, their GGUF names, and what is
done to them on the way. So a file is checked before its first byte is written, and is written in one pass.

A file of families/ describes the models that resemble each other. Each is tried in the real llama.cpp, token by token.

Reference: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.families import gemma, gpt2, llama, olmo2, phi3, qwen_moe
from dynlora_cli.export.gguf.form import INSTEAD, Architecture

FAMILIES = (llama, gpt2, gemma, phi3, olmo2, qwen_moe)
ARCHITECTURES: dict[str, str] = {kind: name for family in FAMILIES for kind, name in family.NAMES.items()}
# Buffers that old checkpoints store beside the weights: attention masks and rotary frequencies.
BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The GGUF form of a config.

    Args:
        config: content of config.json; keys that are missing have transformers' defaults.

    Raises:
        UsageError: llama.cpp has no such model, or we do not know how to say it in GGUF.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UsageError(
            f"model_type {kind!r} has no GGUF form here; supported: {', '.join(sorted(ARCHITECTURES))}", INSTEAD
        )
    from transformers import CONFIG_MAPPING

    complete = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    family = next(family for family in FAMILIES if kind in family.NAMES)
    return family.describe(complete, kind)
