"""Input that somebody has damaged: recipes, rows, configs and headers with one thing changed, or bytes of them.

`scripts/reliability` tries many thousands of them, tests/cli/test_mutations.py a few hundred.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynlora_cli.errors import DynloraError

VALUES: list[Any] = [
    None, True, -1, 0, 3.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x1b]0;x\x07", "\u0000", "../../x",
    "(a+)+$", [], {}, [[]], {"a": 1}, "a" * 5000,
]  # fmt: skip
RECIPE = {
    "model": {"name_or_path": "builtin:tiny", "dtype": "float32"},
    "dataset": {"train": [{"path": "rows.jsonl", "format": "completion"}], "val_size": 0.1, "max_length": 32},
    "rank": {"init": 8, "budget": 2},
    "pruning": {"start": 0.2, "events": 3},
    "train": {"max_steps": 3, "learning_rate": 1e-3, "betas": [0.9, 0.99]},
    "output_dir": "out",
}
ROW = {"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "c"}], "weight": 1.0}
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 4}, "target_modules": ["q_proj"], "modules_to_save": None, "bias": "none",
    "use_rslora": False, "use_dora": False, "base_model_name_or_path": "builtin:tiny", "fan_in_fan_out": False,
}  # fmt: skip
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora"
EXAMPLE = Path(__file__).parents[1] / "fixtures" / "run_example"


def changed(value: Any, chance: random.Random) -> Any:
    """The value with one thing in it changed: another type, a key gone, or another name."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, value = chance.choice(list(value)), dict(value)
        match chance.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[f"\x1b{key}"] = value.pop(key)
            case _:
                value[key] = changed(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with a flipped bit, cut off, zeroed, doubled, or with many brackets in between."""
    at = chance.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    zeroed = content[:at] + bytes(len(content) - at)
    deep = content[:at] + chance.choice([b"[", b'{"a":']) * 20_000 + content[at:]
    return chance.choice([flipped, flipped, content[:at], zeroed, deep, content[at:] + content])


def mutation(content: Any, chance: random.Random, *, bytes_too: bool) -> bytes:
    """A JSON text with a changed value, and with `bytes_too` changed bytes besides."""
    text = json.dumps(changed(content, chance)).encode()
    return damaged(text, chance) if bytes_too else text


def mutations(content: dict[str, Any], seed: int, times: int) -> Iterator[bytes]:
    """So many JSON texts, two thirds with changed values and the rest with changed bytes too."""
    chance = random.Random(seed)
    for number in range(times):
        yield mutation(content, chance, bytes_too=number % 3 == 0)


def answered(read: Any, *arguments: Any) -> DynloraError | None:
    """Check that reading works, or is refused with an exit code that says that the input must change.

    Returns:
        What it was refused with, in text for a terminal.
    """
    refused = None
    try:
        read(*arguments)
    except DynloraError as error:
        refused = error
    if refused:
        assert refused.exit_code in (2, 3, 4), refused
        assert refused.message.strip(), "refused without a word"
        assert "\x1b" not in f"{refused.message}{refused.hint}", refused
    return refused
