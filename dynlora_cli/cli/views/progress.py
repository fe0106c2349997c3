"""What a listener has heard of a run so far, and each event as one plain line for logs and pipes. No rich here."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.runs.log import Event
from dynlora_cli.text import MISSING, count, duration, number, percent, rate, short

OF_STEP = ("loss", "learning_rate", "tokens_per_second", "components", "parameters", "memory_bytes", "seconds")


WIDEST_ANSWER = 100  # characters of a line of samples where there is no terminal window


@dataclass
class Progress:
    """The state of a run as its events tell it; a value that no event told yet is None."""

    run: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    latest: dict[str, float] = field(default_factory=dict)  # the newest value of each key of OF_STEP
    losses: tuple[float, ...] = ()  # losses of the last steps, for the sparkline
    held_out: float | None = None
    held_out_step: int | None = None
    held_out_first: float | None = None
    accuracy: float | None = None
    start: dict[str, int] = field(default_factory=dict)  # components of each layer at the start
    ranks: dict[str, int] = field(default_factory=dict)  # and now
    last_event: str = ""
    _step_seconds: float | None = None
    _clock: float | None = None

    def hear(self, event: Event) -> None:
        """Takes in one event of the training loop."""
        kind = event["event"]
        if kind == "start":
            self._begin(event)
        elif kind in ("tick", "train"):
            self._advance(event)
        elif kind == "eval":
            self._measured(event)
            self._clock = None  # do not count the time of an evaluation as that of a step
        elif kind in ("also", "samples"):
            self._clock = None
        elif kind in ("prune", "gauge"):
            # a new mapping each time: the display may be reading the old one in its own thread
            self.ranks = {**dict.fromkeys(self.ranks, 0), **event["ranks"]} if event.get("ranks") else self.ranks
            self.latest |= {key: event[key] for key in ("components", "parameters") if event.get(key) is not None}
            if kind == "prune":
                self.last_event = f"{_fall(event, 'components')} at step {event['step']:,}"

    @property
    def steps(self) -> int:
        return int(self.run.get("steps") or 0)

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining steps take at the pace of the last ones; evaluations are not counted."""
        return None if self._step_seconds is None else max(0, self.steps - self.step) * self._step_seconds

    def line(self, event: Event) -> str | None:
        """The event as one line of plain text, or None if it is only for the live view."""
        kind = event["event"]
        if kind == "train":
            return self._train_line(event)
        if kind == "eval":
            extra = [f"accuracy {percent(event['accuracy'])}"] if event.get("accuracy") is not None else []
            extra += [f"margin {number(event['margin'])}"] if event.get("margin") is not None else []
            extra += ["best"] if event.get("best") else []
            return "  ".join(
                [
                    f"eval  {self._at(event)}  held-out {number(event.get('loss'))}",
                    *extra,
                    duration(event.get("seconds")),
                ]
            )
        if kind == "also":
            losses = [f"{printable(name)} {number(loss)}" for name, loss in event["losses"].items()]
            return "  ".join([f"also  {self._at(event)}", *losses])
        if kind == "samples":
            return "\n".join(f"      {label:<8}  {text}" for label, text, _ in sample_rows(event, WIDEST_ANSWER))
        if kind == "prune":
            return self._prune_line(event)
        if kind == "refused":
            cost = f"fewer would add {event['measured_loss_change']:+.4f} to the held-out loss"
            return f"keep  {self._at(event)}  {cost}{_found(event)}"
        if kind == "checkpoint":
            return f"saved {self._at(event)}  {event['path']}"
        return f"{kind}: {event['text']}" if kind in ("note", "warning") else None

    def _begin(self, event: Event) -> None:
        self.run = event.get("run") or {}
        self.start = {layer["name"]: layer["components"] for layer in event.get("layers") or ()}
        self.ranks = dict(self.start)
        self.latest = {key: self.run[key] for key in ("components", "parameters") if self.run.get(key) is not None}
        for result in self.run.get("held_out") or ():  # on resuming: the first and the newest result
            self._measured(result)

    def _measured(self, held_out: Event) -> None:
        """Takes in a held-out result with the step that it was measured at."""
        self.held_out, self.accuracy = held_out.get("loss"), held_out.get("accuracy")
        self.held_out_step = held_out.get("step")
        if self.held_out_first is None:
            self.held_out_first = self.held_out

    def _advance(self, event: Event) -> None:
        self.latest |= {key: event[key] for key in OF_STEP if event.get(key) is not None}
        if event["event"] == "tick" and event.get("loss") is not None:
            self.losses = (*self.losses[-239:], event["loss"])
        now, steps = time.monotonic(), event["step"] - self.step
        if self._clock is not None and steps > 0:
            pace = (now - self._clock) / steps
            self._step_seconds = pace if self._step_seconds is None else 0.9 * self._step_seconds + 0.1 * pace
        if steps > 0 or self._clock is None:
            self._clock = now
        self.step = event["step"]

    def _at(self, event: Event) -> str:
        total = f"{self.steps or MISSING}"
        return f"{event['step']:>{len(total)}}/{total}"

    def _measured_at(self) -> str:
        """`(at 200)`: the step of the held-out result, as wide at every step."""
        width = len(str(self.steps)) + 5
        return (f"(at {self.held_out_step})" if self.held_out_step is not None else "").ljust(width)

    def _train_line(self, event: Event) -> str:
        speed = event.get("tokens_per_second")
        parts = [
            f"step  {self._at(event)}",
            f"loss {self.loss(event)}",
            f"held-out {number(self.held_out):<6} {self._measured_at()}",
            f"lr {rate(event.get('learning_rate'))}",
            f"{count(speed):>6} tok/s",
        ]
        if self.run.get("components"):
            started = str(self.run["components"])
            parts.append(f"components {self.latest.get('components', MISSING):>{len(started)}}/{started}")
        return "  ".join([*parts, duration(event.get("seconds"))])

    def loss(self, event: Event) -> str:
        """The loss in training; with its unit where it is not in nats, as the held-out loss beside it is."""
        unit = plugins.unit(self.run.get("objective"))
        return f"{number(event.get('loss'))}{f' {unit}' if unit else ''}"

    def _prune_line(self, event: Event) -> str:
        parts = [f"prune {self._at(event)}", f"components {_fall(event, 'components')}"]
        parts.append(f"parameters {with_budget(event.get('parameters'), self.run)}")
        if event.get("measured_loss_change") is not None:
            parts.append(f"loss {event['measured_loss_change']:+.4f}")
        if event.get("predicted_loss_change") is not None:
            parts.append(f"predicted {event['predicted_loss_change']:+.4f}")
        return "  ".join(parts) + _found(event)


def _found(event: Event) -> str:
    return "; the rank is found" if event.get("ended") else ""


def start_rows(event: Event) -> list[tuple[str, str]]:
    """What is about to be trained, as (label, value) rows of the `start` event."""
    run, layers = event.get("run") or {}, event.get("layers") or []
    epochs = run.get("epochs")
    started = f"{count(run.get('components'))} components in {count(len(layers))} layers" if layers else None
    machine = f"{run['dtype']} on {run['device']}" if run.get("dtype") and run.get("device") else None
    to_train = "to train at first, more while training" if run.get("stream") else "to train"
    rows_held = f"{count(run.get('train_rows'))} rows {to_train}, {count(run.get('val_rows'))} held out"
    objective = run.get("objective") if run.get("objective") != plugins.OBJECTIVE else None
    targets = run.get("supervised_tokens") and f"{short(run['supervised_tokens'])} supervised tokens"
    rows = [
        ("model", joined(run.get("model"), run.get("task"), objective, machine)),
        ("data", joined(rows_held, targets)),
        ("adapter", joined(run.get("variant"), run.get("policy"), started)),
        ("parameters", with_budget(trained(run), run)),
        (
            "steps",
            joined(count(run.get("steps")), epochs and f"{round(epochs, 2):g} epoch{'' if epochs == 1 else 's'}"),
        ),
        ("output", str(run.get("output_dir") or "")),
    ]
    return [(label, value) for label, value in rows if value]


def sample_rows(event: Event, width: int) -> Iterator[tuple[str, str, bool]]:
    """Of each answer three rows, each in one line of at most `width` characters: (label, text, whether it is right)."""
    for sample in event["samples"]:
        asked, *said = (printable(" ".join(sample[key].split())) for key in ("prompt", "expected", "answer"))
        expected, answer = (text if len(text) <= width else f"{text[: width - 1]}…" for text in said)
        yield "asked", asked if len(asked) <= width else f"…{asked[1 - width :]}", False
        if sample.get("picture"):
            yield "drawn", answer, False
            continue
        yield "expected", expected, False
        yield "answered", answer or "(nothing)", sample["right"]


def trained(run: dict[str, Any]) -> int | None:
    """How many numbers train: those of components, or of whatever trains in their place."""
    return run.get("parameters") or run.get("trainable_parameters")


def with_budget(parameters: float | None, run: dict[str, Any]) -> str:
    """A parameter count, and the budget of the run where it has one."""
    budget = run.get("budget_parameters")
    return f"{short(parameters)}, budget {short(budget)}" if budget else short(parameters)


def sparkline(values: tuple[float, ...], width: int) -> str:
    """The values as a row of `width` blocks or fewer, the highest full; each block is the mean of its share."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2:
        return ""
    n = min(width, len(finite))
    means = [_mean(finite[i * len(finite) // n : (i + 1) * len(finite) // n]) for i in range(n)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((mean - low) / (high - low) * 7)] if high > low else blocks[3] for mean in means)


def printable(value: object) -> str:
    """Text from outside with its control characters made visible, so that no row of data can steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: _visible(ord(match[0])), str(value))


def middle_cut(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {count(len(text) - 2 * half)} characters … {text[-half:]}"


def module_groups(modules: Iterable[dict[str, Any]]) -> dict[tuple[str, int, int, int], int]:
    """Layers that differ only by a number in their name: {(pattern, d_out, d_in, components): how many}."""
    groups: dict[tuple[str, int, int, int], int] = {}
    for module in modules:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", module["name"])
        key = (pattern, module["d_out"], module["d_in"], module["components"])
        groups[key] = groups.get(key, 0) + 1
    return groups


def joined(*parts: object) -> str:
    """The parts that say something, with dots between them."""
    return " · ".join(str(part) for part in parts if part)


def _visible(code: int) -> str:
    return chr(0x2400 + code) if code < 32 else f"\\x{code:02x}"


def _fall(event: Event, key: str) -> str:
    return f"{short(event.get(f'{key}_before'))} -> {short(event.get(key))}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
