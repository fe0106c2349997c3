"""Numbers as people read them: `12.3 k`, `4.1 M`, `1 h 02 min`, `512 MB`. A missing number is shown as `-`.

Also commands as people type them, and names that are much alike.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Iterable
from typing import NamedTuple

MISSING = "-"


def to_type(*words: object) -> str:
    """A command of dynlora as it can be copied into a shell, whatever its paths are."""
    return shlex.join(["dynlora", *map(str, words)])


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8. Other bytes of a command line stand in it as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with a fixed count of decimals; NaN stays visible as `nan`."""
    return MISSING if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators: `42,061`."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def counted(value: float | None, thing: str, things: str | None = None) -> str:
    """A whole number of things: `1 step`, `42,061 steps`. `things`: the plural, where it is no `s` more."""
    return f"{count(value)} {thing if value == 1 else things or f'{thing}s'}"


def short(value: float | None) -> str:
    """A count in three digits or so: `512`, `9,408`, `12.3 k`, `4.1 M`, `7.0 B`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    return _scaled(value, ("k", "M", "B", "T"))


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units: `512 MB`, `1.5 GB`."""
    if n_bytes is None or not math.isfinite(n_bytes):
        return MISSING
    return f"{n_bytes:.0f} B" if abs(n_bytes) < 1000 else _scaled(n_bytes, ("kB", "MB", "GB", "TB"))


def duration(seconds: float | None) -> str:
    """Time with its two largest units: `85 ms`, `12.3 s`, `4 min 05 s`, `1 h 02 min`, `2 d 03 h`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds > 0 else "0 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def rate(value: float | None) -> str:
    """A learning rate: `1.8e-04`."""
    return MISSING if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A share between 0 and 1 as `93.4 %`."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def change(before: float | None, after: float | None) -> str:
    """The relative change as `-23.1 %`, or an empty string where it means nothing."""
    if not before or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    return f"{100 * (after - before) / abs(before):+.1f} %"


class Measure(NamedTuple):
    """A number of held-out rows as people read it.

    Args:
        key: in results.
        label: in tables.
        show: makes text of it.
        rises: it is better the higher it is; None: neither way is better by itself.
    """

    key: str
    label: str
    show: Callable[[float | None], str]
    rises: bool | None


def two_digits(value: float | None) -> str:
    """A number with two decimals."""
    return number(value, 2)


# What is told of held-out rows before and after; those that a run has not are left out.
MEASURES = (
    Measure("loss", "loss", number, rises=False),
    Measure("accuracy", "accuracy", percent, rises=True),
    Measure("perplexity", "perplexity", two_digits, rises=False),
    Measure("margin", "margin", number, rises=True),
    Measure("reward_chosen", "reward of chosen", number, rises=True),
    Measure("reward_rejected", "reward of rejected", number, rises=None),
    Measure("recall@1", "recall@1", percent, rises=True),
    Measure("recall@5", "recall@5", percent, rises=True),
    Measure("recall@10", "recall@10", percent, rises=True),
    Measure("mrr", "MRR", number, rises=True),
    Measure("ndcg@10", "nDCG@10", number, rises=True),
    Measure("spearman", "rank correlation", number, rises=True),
    Measure("loss_band_0", "loss, least noise", number, rises=False),
    Measure("loss_band_1", "loss, less noise", number, rises=False),
    Measure("loss_band_2", "loss, more noise", number, rises=False),
    Measure("loss_band_3", "loss, most noise", number, rises=False),
)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """`value` / 1000^n with the first unit in which it reads below 1000 after rounding."""
    for unit in units:
        value /= 1000
        digits = 1 if abs(value) < 99.95 else 0
        if round(abs(value), digits) < 1000 or unit == units[-1]:
            break
    return f"{value:.{digits}f} {unit}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest choice, or an empty string where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def show(value: object) -> str:
    """A value in YAML's words, short enough for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, int) and value.bit_length() > 200:  # Python writes out no more than some thousand digits
        return f"a whole number of some {round(value.bit_length() * 0.30103)} digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "...'"
