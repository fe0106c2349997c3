"""What others wrote is stopped in time, in the main thread and in any other."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from data_helpers import byte_tokenizer

from dynlora_cli.data.chat import template as chat_template
from dynlora_cli.errors import UsageError
from dynlora_cli.files.time_limit import limited, matches_in_time

REFUSAL = UsageError("takes too long")


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


in_each_thread = pytest.mark.parametrize("run", [lambda work: work(), in_thread], ids=["main", "another"])
Run = Callable[[Callable[[], Any]], Any]


@in_each_thread
def test_a_block_without_end_is_stopped(run: Run):
    def work() -> None:
        with limited(0.1, REFUSAL):
            while True:
                with suppress(Exception):
                    time.sleep(0.001)

    with pytest.raises(UsageError, match="takes too long"):
        run(work)


@in_each_thread
def test_a_block_in_time_is_left_alone(run: Run):
    def work() -> int:
        count = 0
        until = time.monotonic() + 1.0
        while time.monotonic() < until:  # some of them end just when their time does
            try:
                with limited(1e-4, REFUSAL):
                    time.sleep(5e-5)
            except UsageError:
                count += 1
        time.sleep(0.05)  # nothing comes late
        return count

    assert run(work) >= 0


@in_each_thread
@pytest.mark.parametrize("pattern", [r"(a|aa)+$x", r"((a|b|ab)*)*(?=c)d|((\w|\w\w)+)+!"])
def test_a_pattern_without_end_is_stopped(run: Run, pattern: str):
    began = time.monotonic()
    with pytest.raises(UsageError, match="takes too long"):
        run(lambda: matches_in_time(re.compile(rf"(.*\.)?({pattern})$"), "a" * 60, 0.2, REFUSAL))
    assert time.monotonic() - began < 5


@in_each_thread
def test_patterns_find_the_same_in_every_thread(run: Run):
    rules = [r".*\.(q|v)_proj", r"layers\.[01]\..*proj", r"^model\.layers\.0\.self_attn\.q_proj", "roj", ""]
    names = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.q_proj", "mlp.up_proj", "x")]
    for rule in rules:
        compiled = re.compile(rf"(.*\.)?({rule})$")
        found = [run(lambda name=name, rule=compiled: matches_in_time(rule, name, 5.0, REFUSAL)) for name in names]
        assert found == [compiled.match(name) is not None for name in names]


@in_each_thread
def test_a_template_without_end_is_stopped(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match="takes more than"):
        run(lambda: chat_template.write(tokenizer, [{"role": "user", "content": "x"}], None))


def test_somebody_elses_alarm_still_comes():
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with limited(5.0, REFUSAL):
            time.sleep(0.1)
        time.sleep(0.05)
        assert heard == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
