"""What a file of another tool says, as keys, values and lines; and the choice of how it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora_cli.config import strict_yaml
from dynlora_cli.config.strict_yaml import Node
from dynlora_cli.drafts.files import python_calls, shell_words
from dynlora_cli.errors import UsageError
from dynlora_cli.files.strict_json import BadJsonError, loads

LARGEST = 4_000_000  # bytes; notebooks hold pictures
KINDS = (".yaml", ".yml", ".json", ".sh", ".bash", ".py", ".ipynb")


@dataclass(frozen=True)
class Entry:
    """A key of the file.

    Args:
        key: with dots where it lies in sections: `optimizer.lr`.
        value: plain: a scalar, a list, or a dict inside a list.
        line: of the file; None for what the tool does where the file says nothing.
        part: what the line is of, where a file has parts: the cell of a notebook.
    """

    key: str
    value: Any
    line: int | None
    part: str = ""

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"{self.part}line {self.line}" if self.line else "not in the file"


@dataclass(frozen=True)
class ForeignFile:
    """A file, read.

    Args:
        path: of it.
        kind: yaml, shell or python.
        entries: its keys, in its order; of several with one key the last one counts, and the others are faults.
        words: of a shell script: the command and what stands before its options, such as (`swift`, `sft`).
            Of Python: the calls that were found, such as `SFTConfig`.
        faults: what could not be read, with the line.
        text: all of it.
        processes: of a shell script: how many train together, and the line that says so; None: it does not say.
    """

    path: Path
    kind: str
    entries: dict[str, Entry]
    words: tuple[str, ...] = ()
    faults: list[tuple[int | None, str]] = field(default_factory=list)
    text: str = ""
    processes: tuple[int, int] | None = None

    def has(self, *keys: str) -> bool:
        """Whether one of some keys is there, as it is or as a section."""
        return any(key in self.entries or any(one.startswith(f"{key}.") for one in self.entries) for key in keys)

    def value(self, key: str) -> Any:
        """What a key holds; None where it is not there."""
        return self.entries[key].value if key in self.entries else None


def read_foreign(path: Path) -> ForeignFile:
    """Read a file of another tool, by its ending.

    Raises:
        UsageError: there is none, or it cannot be read as what it is.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UsageError(f"--from {path}: no configuration that is known by its name", f"known are {', '.join(KINDS)}")
    text = _text(path)
    if kind in (".py", ".ipynb"):
        calls = python_calls.read(text, path)
        taken = {key: Entry(key, value, line, part) for key, value, line, part in calls.settings}
        return ForeignFile(path, "python", taken, tuple(calls.names), calls.faults, text)
    if kind in (".sh", ".bash"):
        command = shell_words.read(text, path)
        given = {key: Entry(key, value, line) for key, value, line in command.options}
        return ForeignFile(path, "shell", given, command.words, command.faults, text, command.processes)
    if kind == ".json":
        try:
            loads(text)
        except BadJsonError as error:
            raise UsageError(f"--from {path}: not valid JSON: {error}", "mend the file") from None
        text = text.replace("\t", "  ")  # which YAML does not take; a text in JSON holds none
    root, problems = strict_yaml.parse(text, str(path))
    if root is None:
        raise UsageError("\n".join(map(str, problems)), "mend the file")
    if not isinstance(root.value, dict):
        raise UsageError(f"--from {path}: the file is no list of keys and values", "name a training configuration")
    found = {entry.key: entry for entry in _flat(root, ())}
    return ForeignFile(path, "yaml", found, (), [(one.place.line, one.text) for one in problems], text)


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read without an end
            raise UsageError(f"--from {path}: no file", "name a training configuration")
        if path.stat().st_size > LARGEST:
            raise UsageError(f"--from {path}: larger than any configuration", "name the configuration itself")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"--from {path}: the file is not UTF-8 text", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"--from {path}: {error.strerror}", "check the path") from None


def _flat(node: Node, path: tuple[str, ...]) -> Iterator[Entry]:
    """Keys of sections with dots between; a list, or a section that is empty, is a value."""
    if isinstance(node.value, dict) and (node.value or not path):
        for key, child in node.value.items():
            yield from _flat(child, (*path, key))
        return
    yield Entry(".".join(path), node.plain(), node.place.line)
