"""What hypernetworks are held against: the base, a LoRA for each task, one for all, the nearest adapter of a library."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from text_bench import STEPS, TEXTS, Bench, found_rate
from text_runs import RANK, lora, run_settings, score, took, trained
from text_tasks import described, read, seen, tasks, write

TASK_STEPS = 150
TASK_RATES = (1e-3, 2e-3, 4e-3)
ALIKE = "one LoRA, rank 46, description in prompt"  # whose rate those of other ranks and rows take
SEARCHED_ON = ("first-word", "in-words", "sentiment", "describe")


def no_adapter(task: str, half: int) -> None:  # noqa: ARG001 - asked like others
    return None


@cache
def _read(folder: Path) -> Any:
    from dynlora_cli.adapters.read import read_adapter

    return read_adapter(folder)


def base_alone(bench: Bench) -> None:
    bench.measured({"method": "base", "condition": "own", "parameters": 0}, no_adapter)
    for condition in ("kept back", "shuffled"):
        asked = partial(bench.asked, condition)
        bench.measured({"method": "base, description in prompt", "condition": condition}, no_adapter, asked)


def task_run(bench: Bench, task: str, rate: float, seed: int = 0) -> Path:
    source = [{"path": str(bench.rows(task, "train"))}]
    return trained(run_settings(source, TASK_STEPS, rate, seed) | lora(RANK), bench.work)


@cache
def task_rate(bench: Bench) -> float:
    """The rate of all runs on one task, by validation rows of a few; first come the lines."""
    means = {}
    for rate in TASK_RATES:
        losses = [
            score(bench.rows(task, "val"), bench.work, _read(task_run(bench, task, rate))).means[0]
            for task in SEARCHED_ON
        ]
        means[rate] = sum(losses) / len(losses)
    print(means, flush=True)
    return min(means, key=means.__getitem__)


def by_task(bench: Bench) -> None:
    """An adapter for each task, trained on its rows."""
    rate = task_rate(bench)
    folders = {task: task_run(bench, task, rate) for task in tasks()}
    cost = {"parameters": took(folders["copy"])["parameters"], "cpu": sum(took(f)["cpu"] for f in folders.values())}
    line = {"method": "LoRA by task", "condition": "own", "rate": rate, **cost}
    bench.measured(line, lambda task, half: _read(folders[task]))  # noqa: ARG005 - asked like others


def described_sources(bench: Bench, seed: int) -> list[dict[str, str]]:
    """Training rows of the seen tasks, each with one of its descriptions before the prompt."""
    paths = []
    for task in seen():
        path = bench.work / "described" / f"train-{seed}" / f"{task}.jsonl"
        if not path.exists():
            write(path, described(read(bench.rows(task, "train")), tasks()[task].seen, seed))
        paths.append({"path": str(path)})
    return paths


def val_loss(bench: Bench, adapter: Any, *, texts: bool) -> float:
    """Mean over seen tasks of the loss on validation rows; with a description that was seen before the prompt, or none."""
    losses = []
    for task in seen():
        path = bench.rows(task, "val")
        if texts:
            path = bench.work / "described" / "val" / f"{task}.jsonl"
            if not path.exists():
                write(path, described(read(bench.rows(task, "val")), tasks()[task].seen, 0))
        losses.append(score(path, bench.work, adapter).means[0])
    return sum(losses) / len(losses)


def for_all(bench: Bench, rank: int, seed: int, *, texts: bool) -> None:
    """One LoRA for all seen tasks, whose rows tell the task in their prompts or do not."""
    sources = described_sources(bench, seed) if texts else [{"path": str(bench.rows(t, "train"))} for t in seen()]
    settings = lora(rank) | ({"dataset.max_length": 96} if texts else {})
    name = f"one LoRA, rank {rank}" + (", description in prompt" if texts else "")

    def run(steps: int, rate: float) -> Path:
        return trained(run_settings(sources, steps, rate, seed) | settings, bench.work)

    rate = (
        bench.rate_of(name)
        or bench.rate_of(name.replace("rank 8", "rank 46"))
        or found_rate(run, lambda folder: val_loss(bench, _read(folder), texts=texts))
    )
    folder = run(STEPS, rate)
    line = {"method": name, "rate": rate, "seed": seed, **took(folder)}
    for condition in TEXTS if texts else ("own",):
        asked = partial(bench.asked, condition) if texts else None
        bench.measured({**line, "condition": condition}, lambda task, half: _read(folder), asked)  # noqa: ARG005


def library(bench: Bench) -> None:
    """The adapter of the seen task whose descriptions, on average, are nearest to the one that is given."""
    from dynlora_cli.retrieval.encoders import model_encoder

    encoder, rate = model_encoder("minilm"), task_rate(bench)
    keys_ED = [encoder.encode(list(tasks()[task].seen)).mean(0) for task in seen()]

    @cache
    def nearest(text: str) -> str:
        text_D = encoder.encode([text])[0]
        cosines = [float(key_D @ text_D) / float((key_D @ key_D) ** 0.5) for key_D in keys_ED]
        return seen()[cosines.index(max(cosines))]

    for condition, texts in TEXTS.items():
        chosen = {task: [nearest(text) for text in texts(task)] for task in tasks()}
        found = [name == task for task in seen() for name in chosen[task]]
        line = {"method": "nearest adapter", "condition": condition, "rate": rate, "found": sum(found) / len(found)}

        def adapter(task: str, half: int, chosen: dict[str, list[str]] = chosen) -> Any:
            return _read(task_run(bench, chosen[task][half], rate))

        bench.measured({**line, "chosen": chosen}, adapter)
