"""Every type of model that transformers knows for a task: trained with pruning, read by stock PEFT, merged, compared.

    scripts/sweep [--only TYPE,TYPE] [--task TASK] [--results FILE] [--table]

Each type runs in a process of its own with a limit of time and memory. A line of JSON per type is appended to the
results; a type that has one there is not run again. `--table` writes docs/models.md from them. Where a model has
experts that components can be put into, it is trained once more with them.
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

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.merge import into_base
from dynlora_cli.models.experts import _understood, fused_experts
from dynlora_cli.training import roots

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "scripts" / "bench" / "architectures.jsonl", ROOT / "docs" / "models.md"
TYPES = {
    LANGUAGE: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    CLASSES: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
SECONDS, BYTES = 180, 8 << 30
TOLERANCE = 2e-4  # of the largest logit; two orders of summation in fp32 stay far below, fresh values far above
STEPS = ("build", "train", "peft", "merge")
WITH_EXPERTS = ("experts", "experts_peft", "experts_merge")
VERSIONS = {"transformers_version": transformers.__version__, "peft_version": peft.__version__}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of two lines of tokens, [2, T, V] or [2, classes]."""
    ids = torch.tensor([[0, 45, 60, 33, 71, 80, 12, 31], [0, 90, 22, 53, 64, 101, 7, 99]]).repeat(1, 4)
    ids[:, -1] = 1  # the end of a text
    for part in model.modules():  # not every type of cache knows every mixture of layers
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False
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
    found: dict[str, Any] = {"type": kind, "task": task, **VERSIONS}
    step, began = "build", time.monotonic()
    try:
        write_tiny(folder / kind, kind, task)
        found["build"] = "ok"
        step = "train"
        trained = _train(folder, kind, task, found)
        found["train"] = "ok"
        base = AUTO[task].from_pretrained(folder / kind, dtype=torch.float32)
        found["moved"] = _apart(trained, logits(base))
        _compare(folder, kind, task, trained, found)
        if any(_understood(base.get_submodule(name)) for name in fused_experts(base)):
            step = "experts"
            trained = _train(folder, kind, task, {}, "adapter.target_modules=[all-linear, experts]", out="experts")
            found["experts"] = "ok"
            _compare(folder, kind, task, trained, found, out="experts")
        return found
    except Exception as error:
        found[step] = _said(error, folder)
        return found
    finally:
        found["seconds"] = round(time.monotonic() - began, 1)


def _compare(
    folder: Path, kind: str, task: str, trained: torch.Tensor, found: dict[str, Any], out: str = "out"
) -> None:
    """Read the adapter of a run by stock PEFT, and merged; two steps that do not need each other."""
    for reader, read in (("peft", _by_peft), ("merge", _merged)):
        step = reader if out == "out" else f"{out}_{reader}"
        try:
            found[f"{step}_apart"] = apart = _apart(read(folder, kind, task, out), trained)
            found[step] = "ok" if apart < TOLERANCE else "other logits"
        except Exception as error:
            found[step] = _said(error, folder)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit; infinite where something is not finite."""
    if found.shape != wanted.shape or not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)


def _train(folder: Path, kind: str, task: str, found: dict[str, Any], *more: str, out: str = "out") -> torch.Tensor:
    """Six steps with two pruning events; the logits of the model as it stands at the end."""
    overrides = [f"model.task={task}", "train.max_steps=6", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=2"]
    if task == CLASSES:
        overrides.append(f"dataset.train=[{write_rows(folder / f'{kind}-rows.jsonl', labelled=True)}]")
    recipe = make_recipe(
        folder, *overrides, "rank.budget=1", "train.learning_rate=2e-2", "eval.steps=6", *more, kind=kind, out=out
    )
    kept: list[torch.Tensor] = []
    write_root = roots.write_root

    def keeping(place: Path, training: Any) -> str:
        kind_of = write_root(place, training)
        kept.append(logits(training.model))
        return kind_of

    with mock.patch.object(roots, "write_root", keeping):
        summary, _ = train(recipe)
    found["layers"] = len(summary["ranks"])
    found["emptied"] = sum(rank == 0 for rank in summary["ranks"].values())
    found["checked"] = summary["peft_check"]
    return kept[0]


def _by_peft(folder: Path, kind: str, task: str, out: str) -> torch.Tensor:
    base = AUTO[task].from_pretrained(folder / kind, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder / out))


def _merged(folder: Path, kind: str, task: str, out: str) -> torch.Tensor:
    into_base(read_adapter(folder / out), folder / f"{out}-merged")
    return logits(AUTO[task].from_pretrained(folder / f"{out}-merged", dtype=torch.float32))


def _said(error: Exception, folder: Path) -> str:
    """One line, with the place of a fault that is no message of ours."""
    text = f"{type(error).__name__}: {' '.join(str(error).replace(f'{folder}/', '').split())[:300]}"
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
            return {"type": kind, "task": task, **VERSIONS, "build": f"no answer in {SECONDS} s"}
        if not answer.is_file():
            log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            return {"type": kind, "task": task, **VERSIONS, "build": f"the process died: {log}"}
        return json.loads(answer.read_text())
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="types, separated by commas; they are run again")
    parser.add_argument("--task", choices=list(TYPES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write docs/models.md from the results")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.table:
        TABLE.write_text(table(read_results(options.results)), encoding="utf-8")
        return 0
    only = options.only.split(",") if options.only else None
    done = {(line["type"], line["task"]) for line in read_results(options.results)} if not only else set()
    for task, types in TYPES.items():
        for kind in types if options.task in (None, task) else ():
            if (kind, task) in done or (only and kind not in only):
                continue
            result = in_own_process(kind, task)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            steps = (*STEPS, *WITH_EXPERTS)
            print(kind, task, *(f"{step}: {result[step]}" for step in steps if step in result), sep="  ", flush=True)
    return 0


def read_results(path: Path) -> list[dict[str, Any]]:
    """The newest line of every type and task."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({(line["type"], line["task"]): line for line in lines}.values())


HEAD = """# Which types of model work

Made by `scripts/sweep` and `scripts/sweep --table`; do not edit. Every type of model that transformers {transformers_version}
knows for a task is built from its own config, tiny and random, trained for six steps with two prunings, read by stock
PEFT {peft_version}, merged, and each time its logits are compared with those of the model as training left it. A random model
shows that names, shapes and arithmetic are right, not that anything was learned.
"""
WORDS = {
    "build": "no tiny model was made of it",
    "train": "does not train",
    "peft": "PEFT reads it otherwise",
    "merge": "not merged",
    "experts": "experts do not train",
    "experts_peft": "PEFT reads its experts otherwise",
    "experts_merge": "experts not merged",
}


def table(results: list[dict[str, Any]]) -> str:
    """docs/models.md: for each task the types that work, and for the others the first thing that does not."""
    parts = []
    for task, types in TYPES.items():
        of_task = {line["type"]: line for line in results if line["task"] == task and line["type"] in types}
        failed = {kind: [step for step in WORDS if line.get(step, "ok") != "ok"] for kind, line in of_task.items()}
        whole = sorted(kind for kind, steps in failed.items() if not steps)
        experts = sorted(kind for kind in whole if "experts" in of_task[kind])
        built = sum(line["build"] == "ok" for line in of_task.values())
        parts.append(f"## {task}\n\n{len(whole)} of {built} that were built work:\n\n{', '.join(whole)}.\n")
        if experts:
            parts.append(f"With components in every expert, too: {', '.join(experts)}.\n")
        rows = [
            f"| {kind} | {'; '.join(WORDS[step] for step in steps)} | {_cell(of_task[kind][steps[0]])} |"
            for kind, steps in sorted(failed.items())
            if steps
        ]
        parts.append("\n".join(["| type | what does not work | first message |", "| --- | --- | --- |", *rows]) + "\n")
    versions = {key: ", ".join(sorted({line[key] for line in results})) for key in VERSIONS}
    return "\n".join([HEAD.format(**versions), *parts])


def _cell(text: str) -> str:
    return text[:160].replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
