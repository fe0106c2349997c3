"""YAML for recipes: YAML 1.2 scalars, no repeated keys, and the place of every key and value.

PyYAML alone reads `1e-5` as text, `on` as true and `12:30` as 750, and accepts a key twice. Here

    1e-5  1E5  .5  5.   floats          on off yes no  12:30  1_000   text
    12  0x1F  0o17      whole numbers   true false                    booleans
    null  ~  (nothing)  null            << (merge key)                refused
"""

from __future__ import annotations

import itertools
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dynlora_cli.errors import RecipeError, UsageError
from dynlora_cli.text import did_you_mean, show

LARGEST_NUMBER = 1024  # bits; a float has no more
MAX_VALUES = 10_000  # anchors that repeat anchors can blow a short file up to any size


class Place(NamedTuple):
    """Where something was written: a file and its line, or a command line option, which has no line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Problem(NamedTuple):
    """One fault and its place; as text one line of the report."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass
class Node:
    """A value of the document and its place: that of the key in a mapping, that of the item in a list."""

    value: bool | int | float | str | dict[str, Node] | list[Node] | None
    place: Place

    def plain(self) -> Any:
        """The value as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: Sequence[str | int]) -> list[Node]:
        """The nodes along `path`, this one first, as far as the path exists."""
        nodes = [self]
        for step in path:
            value = nodes[-1].value
            if isinstance(value, dict) and step in value:
                nodes.append(value[str(step)])
            elif isinstance(value, list) and step in range(len(value)):
                nodes.append(value[int(step)])
            else:
                break
        return nodes

    def assign(self, path: Sequence[str], new: Node) -> str | None:
        """Puts `new` at `path`, making what lies between; returns why not, where the path is impossible."""
        node = self
        for depth, step in enumerate(path):
            child = node._child(step, new.place)
            if child is None:
                return f"{dotted(path[:depth])} is {show(node.plain())} and has no {step!r}"
            node = child
        node.value, node.place = new.value, new.place
        return None

    def _child(self, step: str, place: Place) -> Node | None:
        """The child at a key or list index, made where it is missing; an index may be at most one past the end."""
        if self.value is None:
            self.value = [] if step.isdecimal() else {}
        if isinstance(self.value, dict):
            return self.value.setdefault(step, Node(None, place))
        if isinstance(self.value, list) and step.isdecimal() and int(step) <= len(self.value):
            if int(step) == len(self.value):
                self.value.append(Node(None, place))
            return self.value[int(step)]
        return None


def dotted(path: Sequence[str | int]) -> str:
    """A path as it is written after `--set`: `dataset.train.0.path`."""
    return ".".join(map(str, path))


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: the file is not UTF-8.
    """
    try:
        if path.is_dir():
            inside = sorted(file.name for file in path.glob("*.y*ml"))
            hint = f"name one of its files: {', '.join(inside[:8])}" if inside else "name a recipe file"
            raise UsageError(f"{path} is a folder, not a recipe", hint)
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = (file.name for file in path.parent.glob("*.y*ml"))
        raise UsageError(f"no recipe at {path}{did_you_mean(path.name, beside)}", "check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError([f"{path}:{line}: the file is not UTF-8 text"], "save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None


def parse(text: str, source: str, numbered: bool = True) -> tuple[Node | None, list[Problem]]:
    """Reads one YAML document.

    Args:
        text: the document.
        source: what to call it in places: a file, or an option of the command line.
        numbered: whether places have line numbers.

    Returns:
        The document, or None where it is no YAML, and the problems found.
    """
    builder = _Builder(source, numbered)
    try:
        tree = yaml.compose(text, Loader=_Loader)
        root = Node(None, builder.place(None)) if tree is None else builder.build(tree, builder.place(tree.start_mark))
        return root, builder.problems
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        return None, [Problem(Place(source, line if numbered else None), fault)]
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_problem(error, builder)]
    except RecursionError:
        return None, [Problem(Place(source), "values lie too deep inside each other")]
    except _Refused as error:
        return None, [error.problem]


def from_plain(data: Any, source: str) -> tuple[Node | None, list[Problem]]:
    """The tree of values that a program has made; `source` is what to call them in places, which have no lines.

    Returns:
        The tree, or None where it cannot be one, and the problems found.
    """
    place, problems, count = Place(source), list[Problem](), itertools.count(1)

    def build(value: Any, path: tuple[str | int, ...]) -> Node:
        if next(count) > MAX_VALUES:
            raise _Refused(Problem(place, f"more than {MAX_VALUES:,} values"))
        if isinstance(value, Mapping):
            for key in (key for key in value if not isinstance(key, str)):
                problems.append(Problem(place, f"{dotted((*path, key))}: a key must be a text, not {show(key)}"))
            return Node({key: build(one, (*path, key)) for key, one in value.items() if isinstance(key, str)}, place)
        if isinstance(value, (list, tuple)):
            return Node([build(one, (*path, at)) for at, one in enumerate(value)], place)
        if isinstance(value, Path):
            return Node(str(value), place)
        if value is None or isinstance(value, (bool, int, float, str)):
            return Node(value, place)
        if isinstance(value, (numbers.Integral, numbers.Real)):  # NumPy's, say
            return Node(int(value) if isinstance(value, numbers.Integral) else float(value), place)
        if getattr(value, "shape", None) == () and hasattr(value, "item"):  # NumPy's bool, a tensor of one number
            return build(value.item(), path)
        problems.append(Problem(place, f"{dotted(path)}: got a {type(value).__name__}, which no recipe can hold"))
        return Node(None, place)

    try:
        return (build(data, ()) if isinstance(data, Mapping) else None), problems
    except RecursionError:
        return None, [Problem(place, "values lie too deep inside each other")]
    except _Refused as error:
        return None, [error.problem]


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to equal values, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own interface


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.2 or 1.1 would read as something else, and writes no anchors."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own interface
        first: _Loader.yaml_implicit_resolvers.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


class _Refused(Exception):  # noqa: N818 - never leaves this file
    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Builder:
    """Turns PyYAML's tree into ours and collects problems on the way."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source = source
        self.numbered = numbered
        self.problems: list[Problem] = []
        self.count = 0
        self.inside: list[yaml.Node] = []  # from the root to the node at work

    def place(self, mark: yaml.Mark | None) -> Place:
        return Place(self.source, (mark.line if mark else 0) + 1 if self.numbered else None)

    def build(self, tree: yaml.Node, place: Place, path: tuple[str | int, ...] = ()) -> Node:
        self.count += 1
        if self.count > MAX_VALUES:
            raise _Refused(Problem(place, f"more than {MAX_VALUES:,} values; anchors that repeat anchors?"))
        if any(tree is outer for outer in self.inside):
            raise _Refused(Problem(place, f"{dotted(path)}: an anchor that contains itself"))
        self.inside.append(tree)
        if isinstance(tree, yaml.MappingNode):
            node = Node(self.mapping(tree, path), place)
        elif isinstance(tree, yaml.SequenceNode):
            items = [self.build(item, self.place(item.start_mark), (*path, i)) for i, item in enumerate(tree.value)]
            node = Node(items, place)
        else:
            node = Node(self.scalar(tree, place, path), place)
        self.inside.pop()
        return node

    def mapping(self, tree: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        for key_tree, value_tree in tree.value:
            place = self.place(key_tree.start_mark)
            key = key_tree.value
            if not isinstance(key, str):
                self.problems.append(Problem(place, "a key must be a plain word, not a list or a mapping"))
            elif key == "<<":
                self.problems.append(Problem(place, "merge keys (`<<`) are not supported; write the keys out"))
            elif key in nodes:
                first = nodes[key].place.line
                where = f"; it is already on line {first}" if first else ""
                self.problems.append(Problem(place, f"{dotted((*path, key))}: repeated key{where}"))
            else:
                nodes[key] = self.build(value_tree, place, (*path, key))
        return nodes

    def scalar(self, tree: yaml.Node, place: Place, path: tuple[str | int, ...]) -> bool | int | float | str | None:
        kind, text = tree.tag.removeprefix("tag:yaml.org,2002:"), tree.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                if number.bit_length() > LARGEST_NUMBER:
                    raise ValueError
                return number
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except (ValueError, KeyError):
            self.problems.append(Problem(place, f"{dotted(path)}: {show(text)} cannot be read as {kind}"))
        if kind not in ("null", "bool", "int", "float", "str"):
            self.problems.append(Problem(place, f"{dotted(path)}: the tag {tree.tag!r} is not supported; leave it out"))
        return str(text)


# What PyYAML says, what it means, and whether the fault lies where the construct began (else where it was noticed).
_SYNTAX = (
    (r"character '\t'", "a tab where only spaces are allowed; indent with spaces", False),
    ("cannot start any token", "a value cannot start with this character; put the value in quotes", False),
    ("mapping values are not allowed", "check the indentation, and quote a text that holds `: `", False),
    ("expected <block end>", "the indentation does not fit the lines above", False),
    ("could not find expected ':'", "a line that is no `key: value`", True),
    ("expected ',' or", "a bracket or brace is not closed, or a comma is missing", True),
    ("unexpected end of stream", "a quote is not closed", True),
    ("undefined alias", "`*name` needs an anchor `&name` above it", False),
    ("another document", "a second document begins; a recipe is one document", False),
    ("second occurrence", "this anchor is defined twice", False),
    ("expected the node content", "a value is missing here, or a comma is too many", False),
    ("unknown escape", "a backslash in double quotes; use single quotes, or write it twice", False),
)  # fmt: skip


def _syntax_problem(error: yaml.MarkedYAMLError, builder: _Builder) -> Problem:
    """PyYAML's complaint as a plain sentence at the line to look at."""
    said = error.problem or "unreadable"
    for fragment, meaning, at_start in _SYNTAX:
        if fragment in said:
            mark = error.context_mark if at_start and error.context_mark else error.problem_mark
            return Problem(builder.place(mark), f"not valid YAML: {meaning}")
    return Problem(builder.place(error.problem_mark), f"not valid YAML: {said}")
