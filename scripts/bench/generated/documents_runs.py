"""Adapters of documents, made by the tool itself: `dynlora adapt`, and what it is compared with.

distilled   dynlora adapt --document FILE
text        dynlora train on the document's text, as many steps and the same budget: plain fine-tuning
added       dynlora merge --into adapter, exact, of adapters that were distilled one by one
joint       dynlora train on the rows of all these documents together, as many steps as theirs together
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from documents_judge import MODEL
from documents_sets import Document

BUDGET = 2  # average rank
ASKED = ("--questions", "24", "--answer-tokens", "32", "--budget", str(BUDGET), "--dtype", "bf16")
RATE, TEXT_RATE = (
    2e-3,
    2e-4,
)  # of `adapt`; the text alone at 1e-3 destroys the model (tried on the ten documents that are kept out)
MODEL_DTYPE = "bfloat16"
Record = dict[str, Any]


class FailedError(Exception):
    """A command of the tool did not end well."""


def dynlora(*arguments: str) -> float:
    """A command of the tool; CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "dynlora_cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise FailedError(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Adapters:
    """Adapters on disk, each made once; the record of one is a file beside its folder.

    Args:
        work: where documents, runs and records lie.
        settings: `key=value` for all runs of the tool.
    """

    def __init__(self, work: Path, settings: Sequence[str] = ()) -> None:
        self.work, self.settings = work, tuple(settings)
        work.mkdir(parents=True, exist_ok=True)

    def distilled(self, document: Document, seed: int, *, add_chunks: bool = False) -> tuple[Path, Record]:
        """Of one document, with the model's own questions."""
        kind = "added-chunks" if add_chunks else "distilled"
        more = ["--add-chunks"] if add_chunks else []
        options = [*ASKED, *more, "--set", f"model.dtype={MODEL_DTYPE}"]
        return self.adapted(f"{kind}-{_name(document)}-{seed}", document, options, seed)

    def adapted(self, name: str, document: Document, options: Sequence[str], seed: int) -> tuple[Path, Record]:
        """`dynlora adapt` on one document."""
        arguments = ["adapt", "--model", str(MODEL), "--document", str(self._file(document)), *options]
        return self._made(name, [*arguments, *self._set(f"seed={seed}")])

    def trained(
        self, name: str, sources: Sequence[Any], seed: int, steps: int, **sections: Record
    ) -> tuple[Path, Record]:
        """`dynlora train` on rows."""
        return self._made(name, [*self._recipe(sources, seed, steps, **sections), *self._set()])

    def text(self, document: Document, seed: int, steps: int) -> tuple[Path, Record]:
        """Plain fine-tuning on the text of one document."""
        source = {"path": str(self._rows(document)), "format": "text"}
        train = {"micro_batch_size": 2, "learning_rate": TEXT_RATE}
        return self.trained(f"text-{_name(document)}-{seed}", [source], seed, steps, train=train)

    def joint(self, runs: Sequence[Path], seed: int, steps: int) -> tuple[Path, Record]:
        """On the rows of several runs of `adapt` together."""
        sources = [{"path": str(run / "rows.jsonl"), "format": "grounded"} for run in runs]
        train = {"objective": "context-distillation", "micro_batch_size": 8, "learning_rate": RATE}
        return self.trained(f"joint-{len(runs)}-{seed}", sources, seed, steps, train=train)

    def added(self, runs: Sequence[Path], seed: int, weight: float = 1.0) -> tuple[Path, Record]:
        """The sum of several adapters, component by component, each at a weight."""
        adapters = [argument for run in runs for argument in ("--adapter", str(run))]
        arguments = ["merge", *adapters, "--into", "adapter", "--method", "exact"]
        arguments += ["--weights", ",".join([str(weight)] * len(runs))]
        return self._made(f"added-{len(runs)}-{weight}-{seed}", arguments)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _made(self, name: str, arguments: Sequence[str]) -> tuple[Path, Record]:
        folder, record = self.work / name, self.work / f"{name}.json"
        if not record.exists():
            out = ["--set", f"output_dir={folder}"] if arguments[0] == "train" else ["--out", str(folder)]
            began = time.monotonic()
            seconds = dynlora(*arguments, *out, "--overwrite")
            found = {"cpu": seconds, "wall": time.monotonic() - began, **about(folder)}
            record.write_text(json.dumps(found), encoding="utf-8")
        return folder, json.loads(record.read_text(encoding="utf-8"))

    def _set(self, *more: str) -> list[str]:
        return [part for setting in (*more, *self.settings) for part in ("--set", setting)]

    def _file(self, document: Document) -> Path:
        path = self.work / f"{_title(document)}.txt"
        path.write_text(document.text, encoding="utf-8")
        return path

    def _rows(self, document: Document) -> Path:
        path = self.work / f"{_name(document)}.jsonl"
        path.write_text("".join(json.dumps({"text": half}) + "\n" for half in halves(document.text)), encoding="utf-8")
        return path

    def _recipe(self, sources: Sequence[Any], seed: int, steps: int, **sections: Record) -> list[str]:
        recipe = {
            "model": {"name_or_path": str(MODEL), "dtype": MODEL_DTYPE},
            "dataset": {"train": list(sources), "val_size": 0, "max_length": 2048},
            "rank": {"budget": BUDGET, **sections.get("rank", {})},
            "adapter": {"save_dtype": "bf16", **sections.get("adapter", {})},
            "train": {"max_steps": steps, **sections.get("train", {})},
            "seed": seed,
        }
        text = json.dumps(recipe)
        path = self.work / f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        path.write_text(text, encoding="utf-8")
        return ["train", str(path)]


def halves(text: str) -> tuple[str, str]:
    """A text as two rows, which is the least that the tool trains on: cut at the end of a sentence in its middle."""
    ends = [at + 1 for at in range(len(text)) if text[at : at + 2] in (". ", ".\n", "? ", "! ")]
    at = min(ends or [len(text) // 2], key=lambda end: abs(end - len(text) // 2))
    return text[:at], text[at:].lstrip()


def about(folder: Path) -> Record:
    """Bytes of an adapter; of a run its steps, and of `adapt` its rows and the seconds that writing them took."""
    record = json.loads((folder / "dynlora.json").read_text(encoding="utf-8"))
    summary, adapted = record.get("summary") or {}, record.get("adapted") or {}
    found: Record = {"bytes": (folder / "adapter_model.safetensors").stat().st_size}
    found |= {key: summary[key] for key in ("steps", "learning_rate", "average_rank") if key in summary}
    if adapted:
        found |= {"rows": adapted["rows"] + adapted["held_out"], "writing": adapted["writing_seconds"]}
        found["chunks"] = sum(document["chunks"] for document in adapted["documents"])
    return found


def _name(document: Document) -> str:
    return f"{document.set}-{document.name}"


def _title(document: Document) -> str:
    """A file's name, which the tool takes for the title of the document."""
    title = "".join(c if c.isalnum() else " " for c in document.title)
    return " ".join(title.split())[:60]
