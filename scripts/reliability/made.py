"""Runs small enough to be made again and again, and what must come of them.

made/     the model, the rows, the recipe of `tests/tiny_run.py`
made/new  the run that nothing befell
made/old  an earlier one of another seed, which is to be overwritten
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dynlora_cli.runs import folder as run_folder

from .child import command
from .trial import Lost

WEIGHTS = "adapter_model.safetensors"
OF_STEPS = {"train", "eval", "samples", "gauge", "prune"}
SETTINGS = ("train.max_steps=6", "train.save_steps=2", "eval.steps=3", "dataset.max_length=48")


def prepare(made: Path) -> None:
    """Make the model, the rows, the recipe, and both runs, unless they are there."""
    from tiny_run import make_recipe

    if (made / "old").exists():
        return

    make_recipe(made)
    recipe = json.loads((made / "llama.yaml").read_text())
    for setting in SETTINGS:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        recipe[section][name] = int(value)
    recipe["pruning"] = {"start": 0.17, "end": 0.84, "events": 2}
    recipe["train"]["gradient_accumulation_steps"] = 1
    (made / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    command(train(made, made / "new"), made).must(0)
    command([*train(made, made / "old"), "--set", "seed=5"], made).must(0)
    if (made / "new" / WEIGHTS).read_bytes() == (made / "old" / WEIGHTS).read_bytes():
        raise Lost("the two runs are to differ")


def train(made: Path, out: Path, *more: object) -> list[object]:
    """The command that trains the new run."""
    return ["train", made / "recipe.yaml", "--output-dir", out, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; links as where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path).encode()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def settled(out: Path) -> None:
    """Put in order what a killed process has left, as every command does that writes there or reads a run."""
    with run_folder.place_of(out):
        pass


def same_run(out: Path, reference: Path, changed: str | None = None) -> None:
    """Check that a finished run is the reference: its files, its weights and checkpoints, and its metrics.

    Args:
        out: its folder.
        reference: the other's.
        changed: a log in which somebody changed a byte. No run reads it to go on, so the byte stays as it is.

    Raises:
        Lost: it is not.
    """
    from tiny_run import lines

    names, expected = (set(contents(folder)) for folder in (out, reference))
    if names != expected:
        raise Lost(f"the files are others: {sorted(names ^ expected)}")
    for name in sorted(expected):
        if name.endswith(".safetensors") and (out / name).read_bytes() != (reference / name).read_bytes():
            raise Lost(f"{name} has other bytes than that of the run that nothing befell")
    for name in ("metrics.jsonl", "rank_events.jsonl"):
        if name != changed and _curve(lines(out / name)) != _curve(lines(reference / name)):
            raise Lost(f"{name} says something else than that of the run that nothing befell")
    if "summary" not in run_folder.read_record(out):
        raise Lost("the run ended, and its record does not say so")


def _curve(lines: list[dict]) -> list[dict]:
    """What a log says of the steps; a run that went on says so in lines of its own."""
    return [line for line in lines if line["event"] in OF_STEPS]


def same_files(out: Path, reference: Path) -> None:
    """Check that a folder holds what it held, byte for byte.

    Raises:
        Lost: it does not.
    """
    now, before = contents(out), contents(reference)
    if now != before:
        differ = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        raise Lost(f"{out.name} is not as it was: {differ}")


def alone(parent: Path, *names: str) -> None:
    """Check that nothing else lies about in a folder.

    Raises:
        Lost: something does.
    """
    found = {path.name for path in parent.iterdir() if not path.name.startswith(".said-")}
    if found - set(names):
        raise Lost(f"left behind: {sorted(found - set(names))}")


def remove(folder: Path) -> None:
    """Remove a folder of ours, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def copy(source: Path, target: Path) -> Path:
    """A copy of a folder."""
    return Path(shutil.copytree(source, target, symlinks=True))
