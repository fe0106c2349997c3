"""Values by regular expressions that somebody else wrote, as of `rank_pattern` in PEFT, in bounded time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import shown
from dynlora_cli.files.time_limit import matches_in_time

PATTERN_SECONDS = 5.0  # for all patterns of one file on all modules; honest ones take milliseconds
LONGEST_PATTERN = 10_000
_LITERAL = re.compile(r"(?:\\[^\w\s]|[\w|-])+")


class PatternMap:
    r"""The first value whose pattern matches the end of a module's name, from a full word on, as PEFT finds it.

    PEFT runs `re.match(rf"(.*\.)?({pattern})$", name)`, in which a pattern of few characters can take forever. Names
    that dynlora and PEFT write out are compared as texts, and anything else may take so long and no longer.

    Args:
        patterns: values by regular expressions.
        source: where they stand, for messages.

    Raises:
        UsageError: a pattern is no regular expression.
    """

    def __init__(self, patterns: Mapping[str, Any], source: str) -> None:
        self.source, self._left = source, PATTERN_SECONDS
        self._rules = [(key, _literal(key) or _compiled(key, source), value) for key, value in patterns.items()]

    def first(self, name: str, default: Any) -> Any:
        """The value for a module, or the default where no pattern matches.

        Raises:
            UsageError: the patterns take too long.
        """
        ends = {name, *(name[at + 1 :] for at, letter in enumerate(name) if letter == ".")}
        for key, rule, value in self._rules:
            if not rule.isdisjoint(ends) if isinstance(rule, frozenset) else self._matches(rule, name, key):
                return value
        return default

    def _matches(self, rule: re.Pattern[str], name: str, key: str) -> bool:
        began = time.monotonic()
        refusal = UsageError(
            f"{self.source}: the pattern {shown(key)} takes too long to compare with the names of the layers; it was "
            f"stopped after {PATTERN_SECONDS:g} s",
            "write the layers' names out instead",
        )
        found = matches_in_time(rule, name, max(self._left, 1e-3), refusal)
        self._left -= time.monotonic() - began
        return found


def _literal(pattern: str) -> frozenset[str]:
    """The names in a pattern that is nothing but names with `|` between them; empty where it is more than that."""
    if not _LITERAL.fullmatch(pattern):
        return frozenset()
    return frozenset(re.sub(r"\\(.)", r"\1", name) for name in pattern.split("|"))


def _compiled(pattern: str, source: str) -> re.Pattern[str]:
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise re.error(f"it has more than {LONGEST_PATTERN:,} characters")
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{source}: the pattern {shown(pattern)} is no regular expression that can be used: {error}",
            "write the layers' names out instead",
        ) from None
