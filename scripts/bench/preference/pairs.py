"""The pairs that study.py trains on, and the models that it starts from.

hh     of Anthropic's hh-rlhf (MIT licence), `harmless-base/test.jsonl.gz` at github.com/anthropics/hh-rlhf: what people
       preferred of two answers. Of the 2,312 rows those whose lines have at most 256 tokens; some 500, split by a hash of
       the prompt. The folder of a clone, or of a bare one, is PREFERENCE_HH. Nothing of it is kept here.
e2e    made, not judged by anybody: meanings of e2e_nlg with a text that people wrote. The rejected text is the same with
       one value replaced by another one of its kind ("cheap" by "high", "riverside" by "city centre"). Meanings are disjoint between the parts.

Both start from stories260K, fine-tuned on the chosen answers of other rows (e2e) or of the same ones (hh) and merged.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from dynlora_cli import api

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared"))
BASE = SHARED / "models" / "stories260K"
MOST_TOKENS = {"hh": 256, "e2e": 192}  # of a line
SFT_STEPS, SFT_RATE = 200, 4e-3
Row = dict[str, Any]
Parts = dict[str, list[Row]]


def prepare(name: str, work: Path) -> tuple[Path, Path]:
    """The folder of a set's rows (train, val, test .jsonl), and of the model to start from; made once."""
    rows, model = work / name, work / f"{name}-model"
    if not rows.is_dir():
        parts = {"hh": _hh, "e2e": _e2e}[name]()
        rows.mkdir(parents=True)
        for part, lines in parts.items():
            (rows / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if not model.is_dir():
        recipe = {
            "model": str(BASE),
            "dataset": {"train": [str(rows / "sft.jsonl")], "val": [str(rows / "val_sft.jsonl")], "max_length": 256},
            "rank": {"init": 16, "budget": 16},
            "train": {"max_steps": SFT_STEPS, "micro_batch_size": 16, "learning_rate": SFT_RATE},
            "eval": {"samples": 0},
            "output_dir": str(work / f"{name}-sft"),
        }
        api.merge(api.train(recipe, overwrite=True, progress=None), out=model)
    return rows, model


def _answers(rows: list[Row]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def _part(text: str) -> float:
    """A number from 0 to 1 for a text, the same one each time."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def _hh() -> Parts:
    clone = ["git", "-C", os.environ["PREFERENCE_HH"], "show", "HEAD:harmless-base/test.jsonl.gz"]
    found: Parts = {"train": [], "val": [], "test": []}
    for line in gzip.decompress(subprocess.check_output(clone)).splitlines():
        row = json.loads(line)
        (prompt, chosen), (same, rejected) = (_last_turn(row[side]) for side in ("chosen", "rejected"))
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if prompt == same and chosen != rejected and chosen.strip() and rejected.strip() and _short(pair, "hh"):
            place = _part(prompt)
            found["train" if place < 0.6 else "val" if place < 0.75 else "test"].append(pair)
    return {**found, "sft": _answers(found["train"]), "val_sft": _answers(found["val"])}


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def _short(pair: Row, name: str) -> bool:
    lines = (pair["prompt"] + pair[side] for side in ("chosen", "rejected"))
    return max(len(_tokenizer()(line).input_ids) for line in lines) <= MOST_TOKENS[name]


def _last_turn(text: str) -> tuple[str, str]:
    prompt, turn, answer = text.rpartition("\n\nAssistant:")
    return prompt + turn, answer


def _e2e() -> Parts:
    chance = random.Random(0)
    valid = _meanings(SHARED / "data" / "e2e_nlg" / "valid_clean.jsonl")
    values: dict[str, set[str]] = {}
    for meaning in valid:
        for slot, value in re.findall(r"(\w+)\[(.+?)\]", meaning):
            values.setdefault(slot, set()).add(value)
    names = sorted(valid)
    chance.shuffle(names)
    half, parts = len(names) // 2, len(names) // 10
    sft = [
        {"prompt": name + "\n", "completion": " " + text}
        for name in names[:half]
        for text in chance.sample(valid[name], min(3, len(valid[name])))
    ]
    chance.shuffle(sft)
    ends = {"train": (half, -2 * parts), "val": (-2 * parts, -parts), "test": (-parts, None)}
    found = {part: _wronged(names[begin:end], valid, values, chance) for part, (begin, end) in ends.items()}
    found["val"], found["test"] = found["val"][:100], found["test"][:200]
    return {**found, "sft": sft, "val_sft": _answers(found["val"])}


def _meanings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt"], []).append(row["completion"])
    return found


def _wronged(
    names: list[str], texts: dict[str, list[str]], values: dict[str, set[str]], chance: random.Random
) -> list[Row]:
    """A pair of up to three texts of every meaning, if they have one of its values in so many words."""
    pairs = []
    for name, text in ((one, text) for one in names for text in chance.sample(texts[one], min(3, len(texts[one])))):
        slots = [(slot, value) for slot, value in re.findall(r"(\w+)\[(.+?)\]", name) if value in text]
        slots = [(slot, value) for slot, value in slots if len(values.get(slot, set()) - {value}) and slot != "name"]
        if slots:
            slot, value = chance.choice(slots)
            other = chance.choice(sorted(values[slot] - {value}))
            pairs.append({"prompt": name + "\n", "chosen": " " + text, "rejected": " " + text.replace(value, other)})
    return [pair for pair in pairs if _short(pair, "e2e")]
