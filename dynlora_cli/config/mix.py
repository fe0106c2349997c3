"""A mix: which adapters speak together, each with its weight. One grammar for the command line, chat and the server.

base             the model alone
a                one adapter
a+b              their sum, weight 1 each
0.7*a-0.3*b      with weights; `-` is a sign
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from dynlora_cli.errors import UsageError
from dynlora_cli.text import did_you_mean

BASE = "base"
AUTO = "auto"  # not a mix: a router decides
RESERVED = (BASE, AUTO)
LARGEST = 3.4e38  # beyond it fp32 has no number
EXAMPLE = "write base, NAME, NAME+NAME or 0.7*NAME+0.3*NAME"
_SIGN = re.compile(r"\s*([+-])\s*")
_WEIGHT = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?|nan|inf)\s*\*\s*", re.IGNORECASE)
_WORD = re.compile(r"[^+]*")


def parse_mix(text: str, names: Sequence[str]) -> dict[str, float]:
    """The weight of each adapter that a text names; {} is the base.

    Args:
        text: as above. A name may hold any character, signs too: the longest name that fits is taken.
        names: of the adapters that there are.

    Raises:
        UsageError: it is no mix, names an adapter that there is not, or one twice, or a weight is beyond fp32.
    """
    whole = text.strip()
    for name in (text, whole):  # a name may even begin with a space
        if name in names:
            return {name: 1.0}
    if whole == BASE:
        return {}
    found: dict[str, float] = {}
    at, sign = 0, 1.0
    if (first := _SIGN.match(whole)) and first[1]:
        at, sign = first.end(), -1.0 if first[1] == "-" else 1.0
    while True:
        name, weight, at = _term(whole, at, names)
        if name in found:
            raise UsageError(f"{text!r}: {name} is there twice", "add its weights up and name it once")
        found[name] = sign * weight
        if at == len(whole):
            return {name: weight for name, weight in found.items() if weight}
        between = _SIGN.match(whole, at)
        assert between is not None  # a term ends at a sign or at the end
        sign, at = -1.0 if between[1] == "-" else 1.0, between.end()


def mix_text(mix: Mapping[str, float], names: Sequence[str] = ()) -> str:
    """A mix as a text that `parse_mix` reads back.

    Args:
        names: of all adapters there are, where one may be called as a sum of others is written (`a+b`).
    """
    text = _written(mix, "+")
    return text if not names or parse_mix(text, names) == mix else _written(mix, " + ")


def _written(mix: Mapping[str, float], plus: str) -> str:
    terms: list[str] = []
    for name, weight in mix.items():
        size = abs(weight)
        # With spaces around a minus, since names have hyphens: `my - run` is a difference, `my-run` may be a name.
        sign = (" - " if terms else "-") if weight < 0 else plus if terms else ""
        terms.append(f"{sign}{name}" if size == 1 else f"{sign}{_number(size)}*{name}")
    return "".join(terms) or BASE


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and value < 1e15 else repr(float(value))


def _term(text: str, at: int, names: Sequence[str]) -> tuple[str, float, int]:
    """The name and the weight of the term that begins at a place, and where it ends."""
    if name := _name(text, at, names):
        return name, 1.0, at + len(name)
    weight = 1.0
    if match := _WEIGHT.match(text, at):
        try:
            weight = float(match[1])
        except ValueError:
            weight = math.nan
        if not abs(weight) <= LARGEST:
            hint = f"a weight is a number of {LARGEST:.1e} at most, such as 0.7*NAME"
            raise UsageError(f"{text!r}: {match[1]} is no weight", hint)
        at = match.end()
    if name := _name(text, at, names):
        return name, weight, at + len(name)
    raise _unknown(text, text[at:], names)


def _name(text: str, at: int, names: Sequence[str]) -> str:
    """The longest name that stands at a place, with a sign or nothing behind it."""
    fitting = [name for name in names if text.startswith(name, at)]
    ends = (name for name in fitting if at + len(name) == len(text) or _SIGN.match(text, at + len(name)))
    return max(ends, key=len, default="")


def _unknown(text: str, rest: str, names: Sequence[str]) -> UsageError:
    word = (_WORD.match(rest) or [""])[0].strip()
    there = f"there are: {', '.join(names)}" if names else "no adapter is loaded"
    if not word:
        return UsageError(f"{text!r} is no mix: a name is missing", f"{EXAMPLE}; {there}")
    if word in RESERVED:
        alone = "the model alone" if word == BASE else "the router's choice"
        return UsageError(f"{text!r}: {word} is {alone}, and has no weight beside adapters", EXAMPLE)
    if did_you_mean(text.strip(), names):  # a name with a hyphen, misspelt, rather than a difference
        word = text.strip()
    near = did_you_mean(word, [*names, *RESERVED]) or did_you_mean(re.split(r"[*\s]", word)[-1], names)
    said = f"{text!r}: " if word != text.strip() else ""
    return UsageError(f"{said}there is no adapter {word!r}{near}", f"{EXAMPLE}; {there}")
