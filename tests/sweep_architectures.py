"""Every type of model that transformers knows for a task: trained with pruning, read by stock PEFT, merged, compared.

    python tests/sweep_architectures.py [--only TYPE,TYPE] [--task TASK] [--results FILE] [--table]

Each type runs in a process of its own with a limit of time and memory. A line of JSON per type is appended to the
results; a type that has one there is not run again. `--table` writes docs/architectures.md from them and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from sweep_models import AUTO, CLASSES, LANGUAGE, SEQ2SEQ, write_tiny
from tiny_run import make_recipe, train, write_rows
from transformers.models.auto import modeling_auto

from dynlora_cli import outputs
from dynlora_cli.adapter_reader import read_adapter
from dynlora_cli.merge import into_base

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "scripts" / "bench" / "architectures.jsonl", ROOT / "docs" / "architectures.md"
TYPES = {
    LANGUAGE: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    CLASSES: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
SECONDS, BYTES = 180, 8 << 30
BUILD_PARAMETERS = 20_000_000
TOLERANCE = 2e-4  # of the largest logit; two orders of summation in fp32 stay far below, fresh values far above
STEPS = ("build", "train", "peft", "merge")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of two lines of tokens, [2, T, V] or [2, classes]."""
    ids = torch.tensor([[0, 45, 60, 33, 71, 80, 12], [0, 90, 22, 53, 64, 101, 7]])
    more: dict[str, Any] = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    was = model.training
    found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    model.train(was)
    return found.float()


def try_type(folder: Path, kind: str, task: str) -> dict[str, Any]:
    """One type from its config to the comparison; what failed is told by the step that did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, on what is no concern of ours
        return _try_type(folder, kind, task)


def _try_type(folder: Path, kind: str, task: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": kind, "task": task}
    step, began = "build", time.monotonic()
    try:
        write_tiny(folder / kind, kind, task)
        found["build"] = "ok"
        step = "train"
        trained = _train(folder, kind, task, found)
        found["train"] = "ok"
        base = AUTO[task].from_pretrained(folder / kind, dtype=torch.float32)
        largest = trained.abs().max().item()
        found["moved"] = _apart(trained, logits(base), largest)
        for step, read in (("peft", _by_peft), ("merge", _merged)):
            try:
                found[f"{step}_apart"] = apart = _apart(read(folder, kind, task), trained, largest)
                found[step] = "ok" if apart < TOLERANCE else "other logits"
            except Exception as error:
                found[step] = _said(error)
        return found
    except Exception as error:
        found[step] = _said(error)
        return found
    finally:
        found["seconds"] = round(time.monotonic() - began, 1)


def _apart(a: torch.Tensor, b: torch.Tensor, largest: float) -> float:
    """The largest difference as a share of the largest logit; infinite where something is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return (a - b).abs().max().item() / max(largest, 1e-30)


def _train(folder: Path, kind: str, task: str, found: dict[str, Any]) -> torch.Tensor:
    """Six steps with two pruning events; the logits of the model as it stands at the end."""
    overrides = [f"model.task={task}", "train.max_steps=6", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=2"]
    if task == CLASSES:
        overrides.append(f"dataset.train=[{write_rows(folder / f'{kind}-rows.jsonl', labelled=True)}]")
    recipe = make_recipe(
        folder, *overrides, "rank.budget=1", "train.learning_rate=2e-2", "eval.steps=6", kind=kind, out="out"
    )
    kept: list[torch.Tensor] = []
    write_root = outputs.write_root

    def keeping(place: Path, training: Any, base: Any) -> str:
        kind_of = write_root(place, training, base)
        kept.append(logits(training.model))
        return kind_of

    with mock.patch.object(outputs, "write_root", keeping):
        summary, events = train(recipe)
    found["layers"] = len(summary["ranks"])
    found["emptied"] = sum(rank == 0 for rank in summary["ranks"].values())
    found["checked"] = summary["peft_check"]
    found["notes"] = [note for note in events[0]["notes"] if "max_length" not in note]
    return kept[0]


def _by_peft(folder: Path, kind: str, task: str) -> torch.Tensor:
    base = AUTO[task].from_pretrained(folder / kind, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder / "out"))


def _merged(folder: Path, kind: str, task: str) -> torch.Tensor:
    into_base(read_adapter(folder / "out"), folder / "merged")
    return logits(AUTO[task].from_pretrained(folder / "merged", dtype=torch.float32))


def _said(error: Exception) -> str:
    """One line, with the place of a fault that is no message of ours."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} [{Path(place.filename).name}:{place.lineno}]"


def in_own_process(kind: str, task: str) -> dict[str, Any]:
    """`try_type` in a fork of this process, which has the libraries in memory already."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    answer, began = folder / "answer.json", time.monotonic()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        quiet = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        answer.write_text(json.dumps(try_type(folder, kind, task)))
        os._exit(0)
    try:
        while time.monotonic() - began < SECONDS:
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"type": kind, "task": task, "build": f"no answer in {SECONDS} s"}
        if not answer.is_file():
            log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            return {"type": kind, "task": task, "build": f"the process died: {log}"}
        return json.loads(answer.read_text())
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="types, separated by commas; they are run again")
    parser.add_argument("--task", choices=list(TYPES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    only = options.only.split(",") if options.only else None
    done = {(line["type"], line["task"]) for line in read_results(options.results)} if not only else set()
    for task, types in TYPES.items():
        for kind in types if options.task in (None, task) else ():
            if (kind, task) in done or (only and kind not in only):
                continue
            result = in_own_process(kind, task)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(kind, task, *(f"{step}: {result[step]}" for step in STEPS if step in result), sep="  ", flush=True)
    return 0


def read_results(path: Path) -> list[dict[str, Any]]:
    """The newest line of every type and task."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({(line["type"], line["task"]): line for line in lines}.values())


if __name__ == "__main__":
    sys.exit(main())
