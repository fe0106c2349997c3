"""The thresholds of `dynlora eval`, from its options."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from dynlora_cli.cli.values import share
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.thresholds import METRICS, Baseline, Thresholds
from dynlora_cli.text import did_you_mean

DEFAULT_REGRESSION = "1%"


def read_thresholds(
    *,
    fail_above: Iterable[str] = (),
    fail_below: Iterable[str] = (),
    baseline: Path | None = None,
    max_regression: str | None = None,
) -> Thresholds:
    """Thresholds as a person writes them.

    Args:
        fail_above: each a loss, as a number or `loss=X`; or `forgetting=X`, or `forgetting:SET=X`.
        fail_below: `METRIC=X` texts.
        baseline: a file made by --json.
        max_regression: `1%` or `0.01`; None: 1 %.

    Raises:
        UsageError: one of them cannot be understood.
    """
    if max_regression is not None and baseline is None:
        raise UsageError("--max-regression needs something to compare with", "add --baseline REPORT.json")
    most = dict(_most(text) for text in fail_above)
    return Thresholds(
        fail_above=most.pop("loss", None),
        forgetting={name.removeprefix("forgetting").removeprefix(":"): limit for name, limit in most.items()},
        fail_below=dict(_bound(text) for text in fail_below),
        baseline=Baseline.read(baseline) if baseline is not None else None,
        max_regression=_regression(max_regression or DEFAULT_REGRESSION),
    )


def _most(text: str) -> tuple[str, float]:
    """What `--fail-above` limits, and the limit; a bare number is of the loss."""
    number, example = text.strip(), "for example --fail-above 2.1, or --fail-above forgetting=0.05"
    what, equals, value = (part.strip() for part in number.rpartition("="))
    what = what if equals else "loss"
    if what not in ("loss", "forgetting") and not what.startswith("forgetting:"):
        raise UsageError(f"--fail-above {text}: it limits loss or forgetting, not {what!r}", example)
    try:
        limit = float(value)
    except ValueError:
        raise UsageError(f"--fail-above {text}: {value!r} is no number", example) from None
    if not math.isfinite(limit):
        raise UsageError(f"--fail-above {text} is no {'loss' if what == 'loss' else 'limit'}", example)
    return what, limit


def _bound(text: str) -> tuple[str, float]:
    metric, equals, value = (part.strip() for part in text.partition("="))
    example = "for example --fail-below accuracy=0.8"
    if not equals:
        raise UsageError(f"--fail-below {text} must be written METRIC=X", example)
    if metric not in METRICS:
        hint = f"metrics: {', '.join(METRICS)}; of the loss: --fail-above"
        raise UsageError(f"--fail-below {text}: unknown metric {metric!r}{did_you_mean(metric, METRICS)}", hint)
    try:
        bound = float(value)
    except ValueError:
        raise UsageError(f"--fail-below {text}: {value!r} is no number", example) from None
    least = -1 if math.isfinite(METRICS[metric]) else -math.inf
    if not least <= bound <= METRICS[metric]:
        raise UsageError(f"--fail-below {text}: {metric} goes up to {METRICS[metric]}", example)
    return metric, bound


def _regression(text: str) -> float:
    value = share(text, "--max-regression")
    if value >= 1 and not text.strip().endswith("%"):
        raise UsageError(f"--max-regression {text} is no share", "write 1% or 0.01")
    return value
