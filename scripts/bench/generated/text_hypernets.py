"""Hypernetworks of text.py: trained by `dynlora train`, asked for an adapter by a description, measured with it on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from text_bench import STEPS, TEXTS, Bench, found_rate
from text_runs import RANK, Settings, base, lora, run_settings, score, took, trained
from text_tasks import seen, tasks

MINILM = {"adapter.text_encoder": "minilm"}
METHODS: dict[str, Settings] = {
    "text-gated": {"adapter.variant": "text-gated", **MINILM},
    "text-gated, 32 wide": {
        "adapter.variant": "text-gated",
        **MINILM,
        "adapter.latent_size": 32,
        "adapter.hidden_size": 32,
    },
    "text-gated, rank 40 to 8": {"adapter.variant": "text-gated", **MINILM, "rank.init": 40},
    "text-gated, the base's vectors": {"adapter.variant": "text-gated", "adapter.text_encoder": "base"},
    "text-to-lora L": {"adapter.variant": "text-to-lora", **MINILM, "adapter.head": "L"},
    "text-to-lora M": {"adapter.variant": "text-to-lora", **MINILM, "adapter.head": "M"},
    "text-to-lora S": {"adapter.variant": "text-to-lora", **MINILM, "adapter.head": "S"},
}
ALIKE = {  # whose rate a method takes
    **{name: "text-gated" for name in METHODS if name.startswith("text-gated, ")},
    "text-to-lora M": "text-to-lora L",
    "text-to-lora S": "text-to-lora L",
}


class Generator:
    """A trained hypernetwork, opened once: what `dynlora adapt` does for each description."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any) -> None:
        import torch

        from dynlora_cli.hypernets.conditions import Descriptions
        from dynlora_cli.hypernets.files import read_hypernet
        from dynlora_cli.retrieval.encoders import make_encoder

        self.hypernet = read_hypernet(folder)
        form = self.hypernet.form.encoder
        assert form is not None
        encoder = make_encoder(form.name, model, tokenizer, form.fingerprint)
        tensors = self.hypernet.conditions
        self.texts = Descriptions.from_tensors(encoder, tensors, torch.device("cpu"))
        self.milliseconds: list[float] = []

    def __call__(self, text: str) -> Any:
        """The adapter of a description, all of its components."""
        import torch

        from dynlora_cli.adapters.adapter import Adapter, Factors

        began = time.perf_counter()
        with torch.no_grad():
            written = self.hypernet.net(self.texts.of([text]))
        layers = {}
        for name, (a, b, gate) in written.items():
            a_CI, b_OC = (x[0] if x.ndim == 3 else x for x in (a, b))
            layers[name] = Factors(a_CI, b_OC if gate is None else b_OC * gate[0])
        self.milliseconds.append(1000 * (time.perf_counter() - began))
        return Adapter(self.hypernet.folder, layers, {})


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
    model, tokenizer = base(bench.work).model, base(bench.work).tokenizer
    settings = lora(RANK) | METHODS[method]

    def run(steps: int, rate: float) -> Path:
        return trained(run_settings(sources(bench), steps, rate, seed) | settings, bench.work)

    rate = (
        bench.rate_of(method)
        or bench.rate_of(ALIKE.get(method, ""))
        or found_rate(run, lambda folder: val_loss(bench, Generator(folder, model, tokenizer)))
    )
    folder = run(STEPS, rate)
    written = Generator(folder, model, tokenizer)
    cost = {**took(folder), "parameters": written.hypernet.form.parameters}
    one = written("Say the first word.")
    numbers = sum(layer.a_CI.numel() + layer.b_OC.numel() for layer in one.layers.values())
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
