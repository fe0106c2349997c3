"""Hypernetworks of text.py: trained by `dynlora train`, asked for an adapter by a description, measured with it on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from text_baselines import task_rate, task_run
from text_bench import RATES, STEPS, TEXTS, Bench, found_rate
from text_runs import RANK, Settings, lora, run_settings, score, took, trained
from text_tasks import seen, tasks

MINILM = {"adapter.text_encoder": "minilm"}
NARROW = {"adapter.variant": "text-to-lora", **MINILM, "adapter.hidden_size": 64}
METHODS: dict[str, Settings] = {
    "text-gated": {"adapter.variant": "text-gated", **MINILM},
    "text-to-lora L, 64 wide": {**NARROW, "adapter.head": "L"},
    "text-to-lora L, 64 wide, reconstruction": {
        **NARROW,
        "adapter.head": "L",
        "train.objective": "reconstruction",
    },
    "text-to-lora M, 64 wide": {**NARROW, "adapter.head": "M"},
    "text-to-lora S, 64 wide": {**NARROW, "adapter.head": "S"},
    "text-to-lora L": {"adapter.variant": "text-to-lora", **MINILM, "adapter.head": "L"},
    "text-gated, 32 wide": {
        "adapter.variant": "text-gated",
        **MINILM,
        "adapter.latent_size": 32,
        "adapter.hidden_size": 32,
    },
    "text-gated, the base's vectors": {"adapter.variant": "text-gated", "adapter.text_encoder": "base"},
}
OWN_RATES = {  # to choose from, where they are not those of the others
    "text-to-lora L, 64 wide": (5e-4,),
    "text-to-lora L, 64 wide, reconstruction": (1e-3,),  # the paper's
    "text-to-lora L": (1e-4, 3e-4),
}
ALIKE = {  # whose rate a method takes
    **{name: "text-gated" for name in METHODS if name.startswith("text-gated, ")},
    "text-to-lora M, 64 wide": "text-to-lora L, 64 wide",
    "text-to-lora S, 64 wide": "text-to-lora L, 64 wide",
}


class Generator:
    """A trained hypernetwork, opened once: what `dynlora adapt --hypernet` does for each description.

    Attributes:
        writer: of hypernets/writing.py.
        milliseconds: that each adapter took, from the text to the factors.
    """

    def __init__(self, folder: Path) -> None:
        from dynlora_cli.hypernets.files import read_hypernet
        from dynlora_cli.hypernets.writing import open_writer

        self.writer = open_writer(read_hypernet(folder))
        self.milliseconds: list[float] = []

    def __call__(self, text: str) -> Any:
        """The adapter of a description, all of its components."""
        began = time.perf_counter()
        adapter = self.writer.write(text)
        self.milliseconds.append(1000 * (time.perf_counter() - began))
        return adapter


def sources(bench: Bench) -> list[Settings]:
    """The seen tasks with their descriptions."""
    return [
        {"path": str(bench.rows(task, "train")), "descriptions": str(bench.work / "tasks" / task / "descriptions.txt")}
        for task in seen()
    ]


def val_loss(bench: Bench, written: Callable[[str], Any]) -> float:
    """Mean over seen tasks of the loss on validation rows, with the adapter of the first description that was seen."""
    losses = [score(bench.rows(task, "val"), bench.work, written(tasks()[task].seen[0])).means[0] for task in seen()]
    return sum(losses) / len(losses)


def measure(bench: Bench, method: str, seed: int) -> None:
    """Train a hypernetwork and measure what it writes under all conditions."""
    settings = lora(RANK) | METHODS[method]
    if "train.objective" in settings:  # the adapters that baselines.by_task has made
        settings["adapter.library"] = [str(task_run(bench, task, task_rate(bench))) for task in seen()]
    rates = OWN_RATES.get(method, RATES)

    def run(steps: int, rate: float) -> Path:
        return trained(run_settings(sources(bench), steps, rate, seed) | settings, bench.work)

    rate = (
        bench.rate_of(method)
        or bench.rate_of(ALIKE.get(method, ""))
        or found_rate(run, lambda folder: val_loss(bench, Generator(folder)), rates)
    )
    folder = run(STEPS, rate)
    written = Generator(folder)
    cost = {**took(folder), "parameters": written.writer.hypernetwork.form.parameters}
    one = written("Say the first word.")
    numbers = one.parameters
    for condition, texts in TEXTS.items():
        line = {"method": method, "condition": condition, "rate": rate, "seed": seed, **cost}
        line |= {"written": numbers, "kb": round(4 * numbers / 1000)}
        adapters = cache(partial(_written, written, texts))
        if not bench.has({"part": "test", **line}):
            adapters("copy", 0)
            line["ms"] = round(median(written.milliseconds), 1)
        bench.measured(line, adapters)


def _written(written: Generator, texts: Callable[[str], Any], task: str, half: int) -> Any:
    return written(texts(task)[half])
