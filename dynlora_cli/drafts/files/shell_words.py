"""The training command of a shell script, read as text: which one it is, its options and their lines.

Nothing is run. A variable is put in where the script sets it to a plain text (`NAME=value`, on a line of its own or by
`export`) before it is used; any other stays as it is written, and whoever reads it says so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynlora_cli.config import strict_yaml
from dynlora_cli.errors import UsageError

# Programs that train; what stands before them (`torchrun --nproc 2`, `accelerate launch`, `CUDA_VISIBLE_DEVICES=0`)
# says where, and not what.
TRAINERS = re.compile(
    r"^(?:\S*/)?(swift|megatron|trl|llamafactory-cli|lmf|axolotl|tune|unsloth|\S+\.py|(?:swift|trl|axolotl|llamafactory)\.\S+)$"
)
ENDS = {";", "&", "&&", "||", "|", ">", ">>", "2>&1", "&>", "<"}
QUOTIENT = re.compile(r"\$\((?:expr |\()\s*(\d+|\$\w+|\$\{\w+\})\s*/\s*(\d+|\$\w+|\$\{\w+\})\s*\)?\)")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Command:
    """A command of a script: the words before its options, the options, and what could not be read."""

    words: tuple[str, ...]
    options: list[tuple[str, Any, int]]
    faults: list[tuple[int | None, str]] = field(default_factory=list)
    processes: tuple[int, int] | None = None  # how many train together, and the line


def read(text: str, path: Path) -> Command:
    """The command that trains.

    Raises:
        UsageError: there is none, several, or the script's quotes do not close.
    """
    try:
        commands = [command for words in _commands(text) if (command := _training(words))]
    except ValueError as error:
        raise UsageError(f"--from {path}: not to be read as a shell script: {error}", "mend the file") from None
    if not commands:
        tools = "swift, trl, llamafactory-cli, accelerate launch ... sft.py"
        raise UsageError(f"--from {path}: no command of a tool that is known ({tools})", "name a training script")
    first, *more = commands
    for other in more:
        line = other.options[0][2] if other.options else None
        first.faults.append((line, f"a further command, which is not read: {' '.join(other.words)}"))
    return first


def _commands(text: str) -> Iterator[list[tuple[str, int]]]:
    """The commands of a script, as words with their lines.

    Raises:
        ValueError: a quote is not closed.
    """
    marked = []
    for line in text.splitlines():
        line = _quotients(line)
        bare = line.strip()
        if bare.startswith("#"):
            line, bare = "", ""
        comment = re.search(r"\s#(\s.*)?$", line)
        if comment and not {line[: comment.start()].count(sign) % 2 for sign in "\"'"} & {1}:
            line = line[: comment.start()]
            bare = line.strip()
        continues = bare.endswith("\\") and not bare.endswith("\\\\")
        marked.append(line.rstrip()[:-1].rstrip() if continues else f"{line} {_END}")
    lexer = shlex.shlex("\n".join(marked), posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""  # `name#500` is one word
    known: dict[str, str] = {}
    words: list[tuple[str, int]] = []
    while True:
        number: int = lexer.lineno
        word = lexer.get_token()
        if word is None:
            break
        if word in (_END, *ENDS) or word.endswith(";"):
            _note_variable(words, known)
            if "NPROC_PER_NODE" in known and words:
                words.insert(0, (f"NPROC_PER_NODE={known['NPROC_PER_NODE']}", words[0][1]))
            yield words
            words = []
            continue
        words.append((_divided(_put_in(word.replace(f" {_END}\n", "\n"), known)), number))
    yield words


_END = "\u241e"  # stands where a line of the script ends its command


def _note_variable(words: list[tuple[str, int]], known: dict[str, str]) -> None:
    for word, _ in words[1:] if words and words[0][0] == "export" else words[:1]:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier() and "$" not in value and "`" not in value and len(words) <= 2:
            known[name] = value


def _put_in(word: str, known: dict[str, str]) -> str:
    return VARIABLE.sub(lambda match: known.get(match[1] or match[2], match[0]), word)


def _quotients(line: str) -> str:
    """`$(expr 16 / 4)` and `$((16 / 4))`, as scripts write the number of passes, without the blanks inside."""
    return QUOTIENT.sub(lambda match: f"$(({match[1]}/{match[2]}))", line)


def _divided(word: str) -> str:
    """A quotient of two whole numbers, once its variables are put in."""
    found = re.fullmatch(r"\$\(\((\d{1,9})/(\d{1,9})\)\)", word)
    return str(int(found[1]) // int(found[2])) if found and int(found[2]) else word


def _training(words: list[tuple[str, int]]) -> Command | None:
    """The part of a command that a training tool sees; None where it is of another program."""
    places = [at for at, (word, _) in enumerate(words) if TRAINERS.match(word)]
    if not places:
        return None
    start = places[0]
    before = [words[start]]
    rest = words[start + 1 :]
    while rest and not rest[0][0].startswith("-") and "=" not in rest[0][0]:
        before.append(rest.pop(0))
    text = "a variable of the shell, whose value only a run would tell"
    faults: list[tuple[int | None, str]] = [(line, f"{text}: {word}") for word, line in rest if VARIABLE.search(word)]
    return Command(tuple(word for word, _ in before), list(_options(rest)), faults, _processes(words[:start]))


def _processes(words: list[tuple[str, int]]) -> tuple[int, int] | None:
    """How many processes train together, by what stands before the program."""
    for at, (word, line) in enumerate(words):
        name, _, value = word.partition("=")
        if name.lstrip("-").replace("-", "_").lower() in ("num_processes", "nproc_per_node"):
            value = value or (words[at + 1][0] if at + 1 < len(words) else "")
            return (int(value), line) if re.fullmatch(r"\d{1,4}", value) else None
    return None


def _options(words: Iterable[tuple[str, int]]) -> Iterator[tuple[str, Any, int]]:
    """`--key value`, `--key=value`, `--flag` and `key=value`; several words after an option are a list."""
    key, line, values = "", 0, list[str]()
    for word, at in [*words, ("--", 0)]:
        if word.startswith("--") or (not key and "=" in word):
            if key:
                yield key.replace("-", "_"), _value(values), line
            name, equals, value = word.removeprefix("--").partition("=")
            key, line, values = name, at, [value] if equals else []
        elif key:
            values.append(word)


def _value(values: list[str]) -> Any:
    read = [_scalar(text) for text in values]
    return True if not read else read[0] if len(read) == 1 else read


def _scalar(text: str) -> Any:
    """A word as YAML reads it: a number, a truth value, JSON, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", text) or text[:1] in "[{":
        try:
            node, problems = strict_yaml.parse(text, "", numbered=False)
        except yaml.YAMLError:
            return text
        return node.plain() if node is not None and not problems else text
    return text
