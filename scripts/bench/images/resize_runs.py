"""Adapters of the small base of emoji, trained here, for resize.py; then its lines for each of them.

    python scripts/bench/images/resize_runs.py --work FOLDER --base BASE    # lines to resize.jsonl; base.py makes BASE

Ranks 8, 16 and 32; layers are 64 wide. `concept`: one emoji by one picture, as in images.py. `set`: 120 emoji that the base has never
seen, by their own captions, which asks more of an adapter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from emoji_data import Emoji, fetch, read, split
from images import Arm, recipe, write_rows
from PIL import Image
from resize import Outputs, compared, table

import dynlora_cli.api as dynlora
from dynlora_cli.adapters.images.of_run import as_image
from dynlora_cli.adapters.read import read_adapter

HERE = Path(__file__).parent
RANKS, BUDGETS, CONCEPTS, STEPS, NEW = (8, 16, 32), [0.5, 0.25, 0.125], 2, {"concept": 120, "set": 300}, 120


def write_set(folder: Path, emoji: tuple[Emoji, ...]) -> Path:
    """Pictures and captions of many emoji."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, one in enumerate(emoji):
        Image.fromarray(one.picture()).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": one.caption()})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "rows.jsonl"


def lines_of(base: Path, rows: Path, what: str, rank: int, captions: list[str], folder: Path) -> list[dict[str, Any]]:
    """Train one adapter, and compare the rules on it."""
    kind = what.split(" ")[0]
    asked = recipe(base, rows, Arm("lora", rank, {"variant": "lora"}), 0, STEPS[kind], STEPS[kind])
    if not (folder / "dynlora.json").exists():
        dynlora.train(asked, output_dir=folder, progress=None, overwrite=True)
    adapter = as_image(read_adapter(folder, images=True))
    assert adapter
    head = {"file": what, "rank": rank, "parameters": adapter.parameters}
    return [head | line for line in compared(adapter, BUDGETS, Outputs(base, adapter, captions))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "resize.jsonl")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts, work = split(read(fetch(asked.work))), asked.work / "resize"
    new = parts.held_out[:NEW]
    sources = {"set": (write_set(work / "set", new), [one.caption() for one in new[:4]])}
    for number, concept in enumerate(parts.concepts[:CONCEPTS]):
        named = write_rows(work / f"concept-{number}", concept, None)
        sources[f"concept {concept.name}"] = (
            named,
            [f"{concept.kind}, sks"] * 2 + [e.caption() for e in parts.train[:2]],
        )
    there = [json.loads(line) for line in asked.out.read_text("utf-8").splitlines()] if asked.out.exists() else []
    for rank in RANKS:
        for what, (rows, captions) in sources.items():
            if any((line["file"], line["rank"]) == (what, rank) for line in there):
                continue
            new_lines = lines_of(
                asked.base, rows, what, rank, captions, work / "runs" / f"{what.replace(' ', '-')}-{rank}"
            )
            with asked.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in new_lines)
            there += new_lines
    for kind in STEPS:
        print(f"{kind}\n\n{table([line for line in there if line['file'].startswith(kind)])}\n")


if __name__ == "__main__":
    main()
