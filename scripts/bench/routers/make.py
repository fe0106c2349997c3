"""Adapters and libraries of the routers' study: one adapter for each task, one of the same total size for all of them.

    python scripts/bench/routers/make.py --work FOLDER                    # stories3M, seeds 0 to 2: about an hour on one core
    python scripts/bench/routers/make.py --work FOLDER --model FOLDER     # another model, one seed
    python scripts/bench/routers/make.py --work FOLDER --only e2e,dolly   # a part of it
    python scripts/bench/routers/make.py --work FOLDER --rates            # learning rates, on val rows; took part in no table

What is there is not made again. Then `run.py` measures. Every adapter ends with rank 4 on average, the one for all tasks
with 4 for each of them and as many steps as all adapters together. A library is made of the adapters of a seed with keys
of MiniLM and with keys of the base itself, and calibrated as the tool does it by default; `without NAME` are libraries
that lack one of them, calibrated without it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from router_rows import PAIRS, SHARED, TASKS, prepare

RANK, JOINT = 4, "joint"
CALIBRATED = 60  # rows of each task that calibrate
TRAINED = ("phatgoose", "mole", "x-lora", "moa")  # variants that learn to choose, adapters frozen
ENCODERS = ("minilm", "base")
WITHOUT = "without "
LOOSE, NAMED = "5 %", "unrelated named"  # calibrations by other settings than the default ones


@dataclass(frozen=True)
class Study:
    """What differs between models.

    Attributes:
        name: of it, in results and folders.
        model: folder of the base.
        steps: of an adapter.
        batch: rows of a step.
        rate: learning rate of an adapter.
        joint_rate: of the adapter for all tasks.
        seeds: of training.
        rows: test rows of each task at most.
        router_steps: of a trained router, on the rows of all adapters.
        tasks: that adapters are trained for.
    """

    name: str
    model: Path
    steps: int
    batch: int
    rate: float
    joint_rate: float
    seeds: tuple[int, ...]
    rows: int
    max_length: int = 128
    router_steps: int = 200
    tasks: tuple[str, ...] = TASKS

    def folder(self, work: Path, seed: int) -> Path:
        return work / f"{self.name}-{seed}"


SMALL = Study("stories3M", SHARED / "models" / "stories3M", 150, 8, 2e-3, 7e-4, (0, 1, 2), 60)


def study_of(model: Path | None) -> Study:
    """The main study, or a shorter one with another model."""
    if model is None:
        return SMALL
    return Study(
        model.name, model.resolve(), 12, 4, 1e-3, 5e-4, (0,), 8, max_length=96, router_steps=24, tasks=TASKS[:6]
    )


def names(study: Study) -> tuple[str, ...]:
    """Adapters that are trained."""
    pairs = [name for pair in PAIRS.values() for name in pair] if study is SMALL else []
    return (*study.tasks, *pairs, JOINT)


def recipe(study: Study, name: str, seed: int, rate: float | None, out: Path, work: Path) -> dict[str, Any]:
    """Of one run."""
    tasks = study.tasks if name == JOINT else (name,)
    folders = [prepare(task, work) for task in tasks]
    return {
        "model": {"name_or_path": str(study.model), "dtype": "float32"},
        "dataset": {
            "train": [str(folder / "train.jsonl") for folder in folders],
            "val": [str(folder / "val.jsonl") for folder in folders],
            "max_length": study.max_length,
            "chat": False,
        },
        "rank": {"budget": RANK * len(tasks)},
        "train": {
            "max_steps": study.steps * len(tasks),
            "micro_batch_size": study.batch,
            "learning_rate": rate or (study.joint_rate if name == JOINT else study.rate),
            "save_steps": 1_000_000,
        },
        "eval": {"max_samples": 100 if study is SMALL else 16},
        "output_dir": str(out),
        "seed": seed,
    }


def train(study: Study, name: str, seed: int, work: Path, rate: float | None = None) -> Path:
    """The folder of a run, which is trained if it is not there."""
    out = study.folder(work, seed) / (name if rate is None else f"{name} at {rate}")
    return run_of(recipe(study, name, seed, rate, out, work))


def run_of(form: dict[str, Any]) -> Path:
    """The folder of the run of a recipe."""
    out = Path(form["output_dir"])
    if (out / "took.json").is_file():
        return out
    from dynlora_cli.commands.train import run
    from dynlora_cli.config.load import load_recipe

    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(json.dumps(form), encoding="utf-8")
    started = time.monotonic()
    summary = run(load_recipe(path), overwrite=True)
    took = {"seconds": round(time.monotonic() - started, 1), "parameters": summary["parameters"]}
    print(json.dumps({"run": str(out), **took}), flush=True)
    (out / "took.json").write_text(json.dumps(took), encoding="utf-8")
    return out


def train_router(study: Study, variant: str, seed: int, work: Path) -> Path:
    """The folder of a router over the adapters of all tasks, which is trained if it is not there."""
    adapters = [str(train(study, name, seed, work)) for name in study.tasks]
    changes = {
        "dataset": {"train": ["builtin:library"]},
        "adapter": {"variant": variant, "library": adapters},
        "rank": {},
        "output_dir": str(study.folder(work, seed) / f"router {variant}"),
    }
    form = recipe(study, study.tasks[0], seed, None, Path("out"), work) | changes
    form["train"] |= {"max_steps": study.router_steps, "learning_rate": "auto"}
    return run_of(form)


def searched(study: Study, work: Path) -> None:
    """Rates beside those of quality.py, which are taken, by the loss on val rows."""
    for name, rates in (("e2e", (1e-3, 4e-3)), (JOINT, (1.4e-3,))):
        for rate in rates:
            train(study, name, 0, work, rate)


# -- libraries -------------------------------------------------------------------------------------------------------


def library(study: Study, tasks: Sequence[str], encoder: str, seed: int, work: Path, name: str) -> Path:
    """A library, which is made if it is not there: of its adapters, or of a larger one without one of them.

    It is calibrated, but not that of a larger model, where this would take longer than all the rest.
    """
    root = study.folder(work, seed) / f"library {name} {encoder}"
    if (root / "done").is_file() or (root / "report.html").is_file():
        return root
    from dynlora_cli.library.add import add
    from dynlora_cli.library.addition import Addition
    from dynlora_cli.library.calibrate import Wanted, calibrate
    from dynlora_cli.library.library import library_for_writing

    shutil.rmtree(root, ignore_errors=True)
    with remembering(work / f"{study.name}-vectors", study.folder(work, seed) / "losses of val"):
        if name.startswith(WITHOUT):
            shutil.copytree(library(study, study.tasks, encoder, seed, work, "all"), root)
            with library_for_writing(root) as kept:
                kept.remove(name.removeprefix(WITHOUT))
        else:
            for task in tasks:
                addition = Addition(adapter=train(study, task, seed, work), name=task, encoder=encoder)
                add(root, addition, quiet)
        started = time.monotonic()
        if study is SMALL:
            calibrate(root, Wanted(rows=CALIBRATED), quiet)
    (root / "done").touch()
    print(json.dumps({"library": str(root), "calibrated in": round(time.monotonic() - started, 1)}), flush=True)
    return root


def calibrated_as(study: Study, root: Path, seed: int, work: Path, way: str) -> Path:
    """A copy of a library that is calibrated otherwise: at 5 %, or with a file of the unrelated requests of the default."""
    from dynlora_cli.data.builtin import rows
    from dynlora_cli.library.calibrate import Wanted, calibrate

    copy = root.with_name(f"{root.name}, {way}")
    if (copy / "done").is_file():
        return copy
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    unrelated = work / "unrelated.txt"
    unrelated.write_text("".join(" ".join(row["prompt"].split()) + "\n" for row in rows("train")), encoding="utf-8")
    wanted = {LOOSE: Wanted(rows=CALIBRATED, rate=0.05), NAMED: Wanted(rows=CALIBRATED, unrelated=unrelated)}
    with remembering(work / f"{study.name}-vectors", study.folder(work, seed) / "losses of val"):
        calibrate(copy, wanted[way], quiet)
    (copy / "done").touch()
    return copy


@contextmanager
def remembering(vectors: Path, losses: Path) -> Iterator[None]:
    """Libraries of the same adapters measure the same rows, and encode the same texts: once is enough."""
    import dynlora_cli.library.add as adding
    import dynlora_cli.library.calibrate as calibrating
    import dynlora_cli.library.loaded as loading
    from dynlora_cli.retrieval.encoders import make_encoder

    plain = calibrating.RowLosses
    calibrating.RowLosses = lambda base, examples: KeptLosses(plain(base, examples), examples, losses)  # type: ignore[assignment,misc]
    adding.make_encoder = loading.make_encoder = lambda *given: KeptVectors(make_encoder(*given), vectors)  # type: ignore[assignment]
    try:
        yield
    finally:
        calibrating.RowLosses = plain  # type: ignore[misc]
        adding.make_encoder = loading.make_encoder = make_encoder  # type: ignore[assignment]


class KeptVectors:
    """An encoder that keeps its vectors on the disk."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self.inner, self.path = inner, folder / f"{inner.name}.npz"
        self.name, self.dimension, self.fingerprint = inner.name, inner.dimension, inner.fingerprint
        self.found: dict[str, Any] = {}
        if self.path.is_file():
            with np.load(self.path) as kept:
                self.found = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))

    def encode(self, texts: Sequence[str]) -> Any:
        missing = [text for text in dict.fromkeys(texts) if text not in self.found]
        if missing:
            self.found |= dict(zip(missing, self.inner.encode(missing), strict=True))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self.path, texts=np.array(list(self.found)), vectors=np.stack(list(self.found.values())))
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return np.stack([self.found[text] for text in texts])


class KeptLosses:
    """Losses of rows under adapters of a seed, kept on the disk."""

    def __init__(self, inner: Any, examples: Sequence[Any], folder: Path) -> None:
        self.inner, self.folder = inner, folder
        self.keys = [" ".join(map(str, example.input_ids)) for example in examples]

    def of(self, adapter: Any, name: str, wanted_R: Any = None) -> Any:
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        wanted_R = np.ones(len(self.keys), dtype=bool) if wanted_R is None else wanted_R
        missing_R = wanted_R & np.array([key not in found for key in self.keys])
        if missing_R.any():
            loss_R = self.inner.of(adapter, name, missing_R)
            found |= {key: float(loss) for key, loss in zip(self.keys, loss_R, strict=True) if np.isfinite(loss)}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found), encoding="utf-8")
        return np.array([found[key] if wanted else np.nan for key, wanted in zip(self.keys, wanted_R, strict=True)])


def quiet(line: str) -> None:
    """Takes what a command tells."""


def libraries(study: Study, seed: int) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, adapters and encoder of each library."""
    for encoder in ENCODERS:
        yield "all", study.tasks, encoder
    if study is SMALL:
        for name, pair in PAIRS.items():
            for encoder in ENCODERS:
                yield name, pair, encoder
    if study is SMALL and seed == study.seeds[0]:
        for left in study.tasks:
            yield WITHOUT + left, tuple(task for task in study.tasks if task != left), "minilm"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where runs and libraries are kept")
    parser.add_argument("--model", type=Path, help="folder of another model than stories3M")
    parser.add_argument("--only", help="names of adapters, with commas between them")
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument("--libraries", action="store_true", help="make the libraries, of adapters that are trained")
    parser.add_argument("--rates", action="store_true", help="try learning rates")
    options = parser.parse_args()
    study, work = study_of(options.model), options.work.resolve()
    if options.rates:
        searched(study, work)
        return 0
    for seed in [int(seed) for seed in options.seeds.split(",")] if options.seeds else study.seeds:
        for name in options.only.split(",") if options.only else [*names(study), *TRAINED]:
            (train_router if name in TRAINED else train)(study, name, seed, work)
        if options.libraries or not options.only:
            for name, tasks, encoder in libraries(study, seed):
                library(study, tasks, encoder, seed, work, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
