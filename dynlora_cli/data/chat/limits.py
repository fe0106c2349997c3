"""Chat templates in bounded size: they are programs of whoever made the tokenizer.

The sandbox in which transformers runs them keeps them from files and from code, and not from texts and numbers that
fill the memory. Here every value that grows faster than the template's own time is measured before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from threading import local
from types import BuiltinMethodType, FunctionType, SimpleNamespace
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10.0  # for one conversation
LONGEST = 20_000_000  # characters of a text, parts of a list
LARGEST = 10_000  # bits of a whole number
_WIDE = re.compile(r"\d{7,}|%[^a-z%]*\*")  # in a format: a width of millions, or one that an argument says
_here = local()  # whether templates of this thread are ours to run
_PADDING = ("center", "indent", "batch", "slice", "truncate", "wordwrap")


def joined(pieces: Iterable[Any]) -> str:
    """The pieces as one text, if that is not too long."""
    total, kept = 0, []
    for piece in map(str, pieces):
        total += len(piece)
        _refuse(total > LONGEST)
        kept.append(piece)
    return "".join(kept)


def _refuse(too_large: bool) -> None:
    if too_large:
        raise SecurityError(f"it makes a text of more than {LONGEST:,} characters, or a number of thousands of digits")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _refuse_wide(*arguments: Any) -> None:
    _refuse(any(isinstance(value, int) and abs(value) > LONGEST for value in arguments))


class _Generator(CodeGenerator):
    """Lets `a ~ b` be joined by `joined`; jinja's own function for it cannot be replaced."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Limited(ImmutableSandboxedEnvironment):
    """The sandbox with limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Generator
    concat = staticmethod(joined)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for name in _PADDING:
            self.filters[name] = _narrow(self.filters[name])
        self.filters["join"] = _checked_join(self.filters["join"])
        self.filters["format"] = lambda value, *args, **kwargs: self.call_binop(None, "%", str(value), kwargs or args)
        self.filters["replace"] = lambda text, old, new, count=None: _replaced(str(text), str(old), str(new), count)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, if that is not too large."""
        whole = [value for value in (left, right) if isinstance(value, int)]
        size = _size(left) + _size(right)
        if len(whole) == 2:
            bits = [abs(value).bit_length() for value in whole]
            _refuse((bits[0] * abs(right) if operator == "**" else sum(bits)) > LARGEST)
        elif operator == "*" and whole:
            _refuse(size * max(whole[0], 0) > LONGEST)
        elif operator == "%" and isinstance(left, str):
            _refuse(_WIDE.search(left) is not None)
        else:
            _refuse(size > LONGEST)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """The `format` of a text, unless its fields are millions wide, or as wide as an argument says."""
        text = getattr(value, "__self__", None)
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(text, str):
            _refuse(_WIDE.search(text) is not None or re.search(r":[^}]*\{", text) is not None)
        return super().wrap_str_format(value)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """A call, unless it is of a text's method that would make a text too long."""
        text = getattr(function, "__self__", None)
        if isinstance(function, BuiltinMethodType) and isinstance(text, str):
            _refuse_wide(*arguments, *named.values())
            if function.__name__ == "replace" and len(arguments) > 1:
                _refuse_replaced(text, *map(str, arguments[:2]))
            if function.__name__ == "join" and arguments:
                _refuse_joined(list(arguments[0]), text)
        return super().call(context, function, *arguments, **named)


def _narrow(function: Any) -> Any:
    """A filter that pads texts, without widths of millions."""

    @wraps(function)  # jinja's marks of what it must be given first are kept
    def narrow(*arguments: Any, **named: Any) -> Any:
        _refuse_wide(*arguments, *named.values())
        return function(*arguments, **named)

    return narrow


def _refuse_joined(parts: list[Any], between: str) -> None:
    _refuse(sum(len(part) if isinstance(part, str) else 1 for part in parts) + len(between) * len(parts) > LONGEST)


def _checked_join(function: Any) -> Any:
    @wraps(function)
    def join(context: Any, value: Any, between: str = "", attribute: Any = None) -> Any:
        value = list(value)
        _refuse_joined(value, str(between))
        return function(context, value, between, attribute)

    return join


def _refuse_replaced(text: str, old: str, new: str) -> None:
    _refuse((text.count(old) if old else len(text) + 1) * len(new) > LONGEST)


def _replaced(text: str, old: str, new: str, count: int | None) -> str:
    _refuse_replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@contextmanager
def in_bounds() -> Iterator[None]:
    """Chat templates that this thread has transformers run inside the block are compiled in `Limited`."""
    _install()
    before = getattr(_here, "bounded", False)
    _here.bounded = True
    try:
        yield
    finally:
        _here.bounded = before


@cache
def _install() -> None:
    """Let transformers ask `_here` how to compile a template; for everybody else it compiles as it always did."""
    from transformers.utils import chat_template_utils as library

    usual, plain = library._compile_jinja_template, library._cached_compile_jinja_template
    # The clock is looked up at each call, for `on_date` sets it (data/chat/template.py).
    clock = SimpleNamespace(now=lambda: library.datetime.now())
    own = {**plain.__globals__, "ImmutableSandboxedEnvironment": Limited, "datetime": clock}
    bounded = lru_cache(FunctionType(plain.__code__, own, plain.__name__, plain.__defaults__, plain.__closure__))

    def compiled(template: str) -> Any:
        return bounded(template) if getattr(_here, "bounded", False) else usual(template)

    setattr(library, "_compile_jinja_template", compiled)  # noqa: B010 - its type is that of one function
