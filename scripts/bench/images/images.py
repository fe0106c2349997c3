"""T-LoRA against its controls: twenty emoji, one picture each, taught to a small base that has never seen them.

    python scripts/bench/images/base.py --work FOLDER --out BASE       # once: about 35 minutes of one core
    python scripts/bench/images/judge.py --work FOLDER                 # once: about 10 minutes
    python scripts/bench/images/images.py --work FOLDER --base BASE    # goes on where it stopped; lines to images.jsonl

Every arm is a run of `dynlora train` on 16 times the same picture and caption `KIND, sks`, and is measured after several
numbers of steps: so each arm is a curve from the base to overfitting, and LoRA's curve is LoRA stopped early. All arms of
a concept and seed run one after the other. What is measured: measures.py; tables and figures: image_tables.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from emoji_data import Emoji, grid
from measures import Bench, measure, named
from PIL import Image

import dynlora_cli.api as dynlora
from dynlora_cli.lora.timesteps.schedule import Schedule

HERE = Path(__file__).parent
RANK, STEPS, EVERY, BATCH, ROWS = 8, 120, 40, 8, 16
RATE = 2e-3  # of 1e-3, 2e-3 and 4e-3, on one of the emoji that are kept for that: it comes far in 120 steps
PRIOR = 16  # pictures of the kind, drawn by the base, for prior preservation


@dataclass(frozen=True)
class Arm:
    """What differs between runs.

    Attributes:
        name: in results.
        rank: components of a layer.
        adapter: keys of the recipe's section.
        prior: rows of the kind, drawn by the base, come up as often as the concept, in batches twice as large.
        rate: learning rate.
        all_when_drawn: what it draws and says is measured with all components, as after dropout.
    """

    name: str
    rank: int
    adapter: dict[str, Any]
    prior: bool = False
    rate: float = RATE
    all_when_drawn: bool = False


T_LORA = {"variant": "t-lora", "min_rank": 1}
ARMS = (
    Arm("lora", RANK, {"variant": "lora"}),
    Arm("lora, half the rank", RANK // 2, {"variant": "lora"}),
    Arm("t-lora", RANK, T_LORA),
    Arm("t-lora, orthogonal", RANK, T_LORA | {"start": "orthogonal"}),
    Arm("random ranks", RANK, T_LORA | {"schedule": "random"}),
    Arm("random ranks, then all", RANK, T_LORA | {"schedule": "random"}, all_when_drawn=True),
    Arm("reversed ranks", RANK, T_LORA | {"schedule": "rising"}),
    Arm("lora, prior kept", RANK, {"variant": "lora"}, prior=True),
)


def write_rows(folder: Path, concept: Emoji, prior: np.ndarray | None) -> Path:
    """The concept's picture ROWS times, and pictures of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(concept.picture()).save(folder / "concept.png")
    rows = [{"image": "concept.png", "text": named(concept).caption()}] * ROWS
    for number, picture in enumerate(() if prior is None else prior):
        Image.fromarray(picture).save(folder / f"prior-{number}.png")
        rows.append({"image": f"prior-{number}.png", "text": concept.caption(form="kind")})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "rows.jsonl"


def recipe(base: Path, rows: Path, arm: Arm, seed: int, steps: int, every: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {"name_or_path": str(base), "task": "text-to-image"},
        "dataset": {"train": [str(rows)], "val_size": 0},
        "adapter": arm.adapter,
        "eval": {"samples": 0},
        "rank": {"init": arm.rank, "budget": arm.rank * products(arm)},  # nothing is pruned
        "train": {
            "max_steps": steps,
            "micro_batch_size": BATCH * (1 + arm.prior),
            "learning_rate": arm.rate,
            "lr_scheduler": "constant",
            "warmup_steps": 5,
            "save_steps": every,
            "log_steps": every,
        },
    }


def fresh(base: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(base / "unet").to(memory_format=torch.channels_last).eval()


def products(arm: Arm) -> int:
    """That one component of an arm is saved as."""
    return 2 if arm.adapter.get("start") == "orthogonal" else 1


def ranks_of(arm: Arm, seed: int) -> layers.Rank | None:
    """r(t) of an arm, as layers.py masks by it."""
    if arm.adapter["variant"] != "t-lora" or arm.all_when_drawn:
        return None
    shape = arm.adapter.get("schedule", "falling")
    if shape == "falling":
        return layers.falling(arm.adapter["min_rank"], products(arm))
    if shape == "rising":
        return layers.rising(arm.adapter["min_rank"])
    schedule = Schedule(shape=shape, min_rank=arm.adapter["min_rank"], seed=seed)
    return lambda t_B, count: schedule.ranks_B(schedule.shares_B(t_B), count)


def run_arm(bench: Bench, base: Path, concept: Emoji, arm: Arm, seed: int, steps: int, every: int) -> Iterator[Any]:
    """Train an arm, then measure each of its checkpoints; lines and samples."""
    folder = bench.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    rows = write_rows(folder / "rows", concept, prior_pictures(bench, base, concept) if arm.prior else None)
    began = time.process_time()
    dynlora.train(recipe(base, rows, arm, seed, steps, every), output_dir=folder / "out", progress=None)
    trained = time.process_time() - began
    for step in range(every, steps + 1, every):
        unet = fresh(base)
        layers.put(unet, layers.read(checkpoint(folder / "out", step)), ranks_of(arm, seed))
        found, samples = measure(bench, unet, concept)
        yield {"step": step, **found, "train_seconds": round(trained * step / steps, 1)}, samples


def checkpoint(folder: Path, step: int) -> Path:
    found = [path for path in folder.rglob(f"step-{step}") if path.is_dir()]
    assert found, f"{folder} holds no checkpoint of step {step}"
    return found[0]


def prior_pictures(bench: Bench, base: Path, concept: Emoji) -> np.ndarray:
    """What the base draws of the concept's kind."""
    from measures import GUIDANCE, SIDE, drawn

    given = {"encoder_hidden_states": bench.read([concept.caption(form="kind")] * PRIOR)}
    none = {"encoder_hidden_states": bench.read([""])}
    latents = drawn(bench.pipeline, fresh(base), given, none, steps=20, guidance=GUIDANCE, seed=99, side=SIDE)
    return bench.pipeline.pictures(latents)


def done(out: Path) -> set[tuple[str, int, str]]:
    if not out.exists():
        return set()
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    return {(line["concept"], line["seed"], line["arm"]) for line in lines}


def write(out: Path, lines: list[dict[str, Any]]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def study(
    bench: Bench, base: Path, concepts: tuple[Emoji, ...], arms: tuple[Arm, ...], seeds: range, out: Path, steps: int
) -> None:
    """All arms of a concept and seed one after the other; an arm's lines are written together."""
    pictures = bench.work / "samples"
    pictures.mkdir(exist_ok=True)
    found, samples = measure(bench, fresh(base), concepts[0])  # also what the base says of held-out emoji
    for seed in seeds:
        for concept in concepts:
            there = done(out)
            head = {"concept": concept.name, "seed": seed}
            if seed == seeds[0] and (concept.name, seed, "base") not in there:
                found, samples = measure(bench, fresh(base), concept)
                write(out, [head | {"arm": "base", "step": 0, **found}])
                grid(samples, len(samples)).save(pictures / f"{concept.name}-base.png")
            for arm in arms:
                if (concept.name, seed, arm.name) in there:
                    continue
                lines, began = [], time.time()
                for line, samples in run_arm(bench, base, concept, arm, seed, steps, EVERY):
                    lines.append(head | {"arm": arm.name, **line})
                    if seed == seeds[0]:
                        grid(samples, len(samples)).save(pictures / f"{concept.name}-{arm.name}-{line['step']}.png")
                write(out, lines)
                last = lines[-1]
                shown = {k: last[k] for k in ("fidelity", "fidelity_context", "context", "memorised", "train_seconds")}
                print(
                    json.dumps(head | {"arm": arm.name} | shown | {"wall": round(time.time() - began, 1)}), flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "images.jsonl")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--part", default="0/1", help="every M-th concept from the N-th on, N/M, for two processes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench.open(asked.work, asked.base)
    first, each = map(int, asked.part.split("/"))
    bench.work = asked.work / f"part-{first}"
    bench.work.mkdir(exist_ok=True)
    study(bench, asked.base, bench.parts.concepts[first::each], ARMS, range(asked.seeds), asked.out, STEPS)


if __name__ == "__main__":
    main()
