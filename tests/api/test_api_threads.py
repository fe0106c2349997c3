"""The Python face keeps nothing of the process: threads, event loops, signals, random numbers, settings of libraries."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_helpers import contents
from pico import pico_recipe
from transformers.utils import chat_template_utils

from dynlora_cli import api
from dynlora_cli.errors import Interrupted

WEIGHTS = "adapter_model.safetensors"


def recipe_in(folder: Path, seed: int, **sections: Any) -> dict[str, Any]:
    """A recipe whose result depends on random numbers at every step."""
    recipe = json.loads(pico_recipe(folder, adapter={"dropout": 0.2}).read_text(encoding="utf-8"))
    return recipe | {"seed": seed, "output_dir": str(folder / f"seed-{seed}")} | sections


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The weights of a run by its seed, trained while nothing else went on."""
    folder = tmp_path_factory.mktemp("alone")
    return {seed: (api.train(recipe_in(folder, seed)).folder / WEIGHTS).read_bytes() for seed in (1, 2)}


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each of them returns, or raises, all at once in threads of their own."""
    found: list[Any] = [None] * len(works)

    def run(at: int) -> None:
        try:
            found[at] = works[at]()
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


def of_the_process() -> dict[str, Any]:
    """Settings that a program of others may rely on."""
    return {
        "random": torch.get_rng_state().tolist(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "filters": list(warnings.filters),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": transformers.logging.is_progress_bar_enabled(),
        "bitsandbytes": logging.getLogger("bitsandbytes").level,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "sandbox": chat_template_utils.ImmutableSandboxedEnvironment,
        "folder": Path.cwd(),
    }


def test_two_at_once_give_what_each_gives_alone(tmp_path: Path, alone: dict[int, bytes]):
    recipes = [recipe_in(tmp_path, seed) for seed in (1, 2)]
    runs = in_threads(*[lambda one=one: api.train(one) for one in recipes])
    assert [(run.folder / WEIGHTS).read_bytes() for run in runs] == [alone[1], alone[2]]
    assert alone[1] != alone[2]


def test_the_process_is_left_as_it_was(tmp_path: Path):
    recipe = recipe_in(tmp_path, 1)
    before = of_the_process()
    run = api.train(recipe)
    smaller = api.prune(run, budget=0.5, out=tmp_path / "smaller")
    api.merge(smaller)
    with api.load(run) as loaded:
        loaded.generate("def count_words():", max_new_tokens=3, do_sample=True, seed=1)
    assert of_the_process() == before


def test_an_event_loop_may_run(tmp_path: Path, alone: dict[int, bytes]):
    async def cell() -> Any:
        return api.train(recipe_in(tmp_path, 1))

    assert (asyncio.run(cell()).folder / WEIGHTS).read_bytes() == alone[1]


def test_an_adapter_answers_while_another_thread_trains(tmp_path: Path):
    first = api.train(recipe_in(tmp_path, 1))
    half_way, answered = threading.Event(), threading.Event()

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "tick" and event["step"] == 3:
            half_way.set()
            assert answered.wait(60), "the answer waits for the training"

    def ask() -> str:
        assert half_way.wait(60)
        answer = loaded.generate("def count_words():", max_new_tokens=5)
        answered.set()
        return answer

    with api.load(first) as loaded:
        alone = loaded.generate("def count_words():", max_new_tokens=5)
        run, answer = in_threads(lambda: api.train(recipe_in(tmp_path, 2), progress=listen), ask)
    assert answer == alone
    assert run.summary["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a thread", "the main thread"])
def test_a_listener_can_stop_a_run(tmp_path: Path, where: str, alone: dict[int, bytes]):
    recipe = recipe_in(tmp_path, 1)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "tick" and event["step"] == 3:
            raise KeyboardInterrupt

    def work() -> Any:
        with pytest.raises(Interrupted, match="everything is saved") as stopped:
            api.train(recipe, progress=listen)
        return stopped.value.exit_code

    assert (in_threads(work)[0] if where == "a thread" else work()) == 130
    assert contents(api.train(recipe, resume=True).folder)[WEIGHTS] == alone[1]


def test_the_stop_button_of_a_notebook_saves(tmp_path: Path):
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "tick" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)  # what a kernel is sent

    with pytest.raises(Interrupted) as stopped:
        api.train(recipe_in(tmp_path, 1), progress=listen)
    assert stopped.value.hint == "go on with --resume"
    assert (tmp_path / "seed-1" / "checkpoints" / "last").is_file()


def test_conversations_are_written_in_any_thread(tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": f"word {i}"}, {"role": "assistant", "content": f"{i} words"}]}
        for i in range(40)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_in(tmp_path, 1, dataset={"train": [str(file)], "max_length": 64})
    here = contents(api.train(recipe).folder)[WEIGHTS]
    (there,) = in_threads(lambda: api.train(recipe, overwrite=True))
    assert contents(there.folder)[WEIGHTS] == here
