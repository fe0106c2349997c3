"""What an importer is: a file in drafts/importers that turns configurations of one tool into recipes.

NAME = "axolotl"
    What the tool is called.

READS = "yaml"
    The kinds of file that it knows, of yaml (which JSON is too), shell and python.

KEYS = \"\"\"
sequence_len       dataset.max_length
loss_watchdog      -nothing of the result depends on it
neftune_noise      !noise on the embeddings
\"\"\"
    Its keys, one a line, and what they are here: a key of the recipe; `-` and why nothing is lost without it; `!` and
    what is lost. After a `;` stands what differs. Keys that other tools have as well are in config/foreign_names.py.
    Wrong recipes are answered by the same lines.

DEFAULTS = {"micro_batch_size": 1}
    What the tool does where the file does not say, for keys that matter.

def recognises(file) -> bool
    Whether a file is one of this tool's.

def convert(move) -> None
    What the table alone cannot say. What it leaves is converted by the table.

NAME, READS, KEYS and DEFAULTS are literals, which are read without running the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NoReturn, Protocol

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names
from dynlora_cli.config.foreign_names import Alias
from dynlora_cli.config.options import options
from dynlora_cli.config.sections import Settings
from dynlora_cli.drafts.files.entries import Entry, ForeignFile
from dynlora_cli.drafts.files.python_calls import Unknown
from dynlora_cli.errors import UsageError
from dynlora_cli.text import show

# Sections of scripts and of Unsloth's YAML, whose keys have the names that they have elsewhere without a section.
_FLAT = ("train", "training", "lora", "model", "quantization", "logging")
OFF = (None, False, 0, "", "none", "no", "off", "false", "null")


@cache
def own_keys() -> dict[str, str]:
    """Our keys by their last word, such as `packing` to `dataset.packing`."""
    found = {}
    for section, declared in Settings.model_fields.items():
        inner = getattr(declared.annotation, "model_fields", None)
        for key in inner or ("",):
            found[key or section] = f"{section}.{key}" if key else section
    for objective in plugins.names("objectives"):
        found |= {key: f"train.{key}" for key in options("objectives", objective)}
    return found


class Importer(Protocol):
    """The module of an importer."""

    NAME: str
    READS: str
    KEYS: str
    DEFAULTS: Mapping[str, Any]

    def recognises(self, file: ForeignFile) -> bool:
        """Whether the file is one of this tool's."""
        ...

    def convert(self, move: Move) -> None:
        """Take the keys that the table alone cannot say."""
        ...


@dataclass(frozen=True)
class Finding:
    """What became of a key.

    Args:
        entry: the key.
        kind: converted, differs, needless or lost.
        text: what it is here, or why it is nothing.
    """

    entry: Entry
    kind: str
    text: str

    @property
    def as_data(self) -> dict[str, Any]:
        value = self.shown
        plain = value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
        return {"key": self.entry.key, "value": plain, "line": self.entry.line, "kind": self.kind, "text": self.text}

    @property
    def shown(self) -> Any:
        """The value, unless its key says that it is a secret."""
        secret = re.search(
            r"(^|[._])(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(token|api_key|password|secret)$", self.entry.key
        )
        return "***" if secret and isinstance(self.entry.value, str) else self.entry.value

    def __str__(self) -> str:
        return f"{self.entry.place}: {self.entry.key}: {show(self.shown)}: {self.text}"


@dataclass(frozen=True)
class Setting:
    """A key of the recipe, the value that it gets, where that is from, and what to say beside it."""

    value: Any
    entry: Entry
    remark: str = ""


@dataclass
class Move:
    """A file on its way to a recipe.

    Args:
        file: of the other tool.
        tool: the name of that tool.
        table: its keys; see KEYS.
        defaults: see DEFAULTS.
    """

    file: ForeignFile
    tool: str
    table: Mapping[str, Alias]
    defaults: Mapping[str, Any]
    recipe: dict[str, Setting] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    unasked: dict[str, tuple[Any, str]] = field(default_factory=dict)  # settings that no key of the file asks for

    # -- asking ------------------------------------------------------------------------------------------------------

    def entry(self, key: str) -> Entry:
        """The key as it is in the file, or as the tool takes it where it is not; its value is None where it is off."""
        found = self.file.entries.get(key)
        if found is None or isinstance(found.value, Unknown):
            return found or Entry(key, self.defaults.get(key), None)
        value = found.value
        if isinstance(value, str) and value.strip().lower() in ("none", "null", "~"):
            value = None
        if value is None and key in self.defaults:
            return Entry(key, self.defaults[key], found.line, found.part)
        return Entry(key, _truth(value), found.line, found.part)

    def value(self, key: str) -> Any:
        """What a key says, or what the tool does without it; None where only a run would tell."""
        value = self.entry(key).value
        return None if isinstance(value, Unknown) else value

    def has(self, key: str) -> bool:
        """Whether the file says something at a key."""
        return key in self.file.entries and self.value(key) is not None

    # -- answering ---------------------------------------------------------------------------------------------------

    def give(self, here: str, value: Any, key: str, remark: str = "", differs: str = "") -> None:
        """Set a key of the recipe.

        Args:
            here: our key.
            value: ours.
            key: theirs that it is made of.
            remark: for the recipe's line.
            differs: what is not the same.
        """
        entry = self.entry(key)
        self.recipe[here] = Setting(value, entry, remark)
        self.say(
            key, "differs" if differs else "converted", f"{here}: {show(value)}" + (f"; {differs}" * bool(differs))
        )

    def give_number(self, here: str, key: str) -> None:
        """Set a key to a number; what is none is left to the table, and the recipe's reader says what is wrong."""
        if (found := number(self.value(key))) is not None:
            self.give(here, found, key)

    def say(self, key: str, kind: str, text: str) -> None:
        """List a key under one of the four kinds; what the file does not say is listed where it matters alone."""
        self.used.add(key)
        entry = self.entry(key)
        if entry.line is None and kind == "needless":
            return
        self.findings.append(Finding(entry, kind, text))

    def needless(self, why: str, *keys: str) -> None:
        """List keys whose loss loses nothing."""
        for key in keys:
            if key in self.file.entries:
                self.say(key, "needless", why)

    def lost(self, why: str, *keys: str) -> None:
        """List keys that have no equivalent, where they are on."""
        for key in keys:
            if key in self.file.entries:
                off = _is_off(self.value(key)) and not isinstance(self.entry(key).value, Unknown)
                self.say(key, "needless" if off else "lost", "off, as here" if off else why)

    def refuse(self, key: str, text: str, hint: str) -> NoReturn:
        """Say why no recipe can be made of this file.

        Raises:
            UsageError: always.
        """
        entry = self.file.entries.get(key)
        where = f"{self.file.path}:{entry.line}" if entry and entry.line else str(self.file.path)
        raise UsageError(f"{where}: read as {self.tool}: {text}", hint)

    # -- by the table ------------------------------------------------------------------------------------------------

    def by_table(self) -> None:
        """Convert all keys that are left, by the importer's own table and by that of all tools."""
        for key, entry in self.file.entries.items():
            if key not in self.used:
                self._by_line(key, entry)

    def defaults_by_table(self) -> None:
        """Give what the tool does where the file says nothing."""
        for key in self.defaults:
            if key not in self.used and key not in self.file.entries and self.defaults[key] is not None:
                alias = self.find(key)
                if alias and alias.here and alias.here not in self.recipe and alias.here not in self.unasked:
                    self._assign(key, alias)

    def find(self, key: str) -> Alias | None:
        """The line of the tables for a key: the whole of it, its last word, or our own key of that name."""
        section, _, leaf = key.rpartition(".")
        names = (key, leaf) if section in ("", *_FLAT) else (key,)  # `lr` of some other section is not the run's
        for table in (self.table, foreign_names.KEYS):
            for name in names:
                if name in table:
                    return table[name]
            if pattern := next((name for name in table if "*" in name and fnmatchcase(key, name)), None):
                return table[pattern]
        here = own_keys().get(names[-1])
        return Alias(self.tool, here, "") if here else None

    def _by_line(self, key: str, entry: Entry) -> None:
        value = self.value(key)
        alias = self.find(key)
        if isinstance(entry.value, Unknown):
            where = f"; here it is `{alias.here}`" if alias and alias.here else ""
            if alias is None or alias.here or alias.lost:
                self.say(key, "lost", f"only running the file would tell its value{where}")
            else:
                self.say(key, "needless", alias.remark)
        elif value is None or value in ("", [], {}):
            self.say(key, "needless", "empty")
        elif alias is None:
            self.say(key, "lost", f"not known to dynlora as a key of {self.tool}")
        elif not alias.here:
            off = _is_off(value)
            kind = "lost" if alias.lost and not off else "needless"
            self.say(key, kind, "off, as here" if alias.lost and off else alias.remark)
        else:
            self._assign(key, alias)

    def _assign(self, key: str, alias: Alias) -> None:
        """Set the key that a line of a table names."""
        value = self.value(key)
        here, colon, ours = alias.here.partition(": ")
        own = key in self.table or key.rpartition(".")[2] in self.table
        taken = self.recipe.get(here)
        if colon and value is False:
            self.say(key, "needless", "off, as here")
        elif taken and value in (False, taken.value):
            self.say(key, "needless", f"{here} is set by {taken.entry.key}")
        elif taken:
            self.say(key, "differs", f"{here} is {show(taken.value)} already, by {taken.entry.key}")
        elif colon and value is True:
            self.give(here, _plain(ours), key, differs=alias.remark)
        elif colon:
            self.say(key, "lost", f"here it is `{alias.here}`; set it by hand")
        elif alias.remark and not own:
            self.say(key, "lost", f"here it is `{here}` ({alias.remark}); set it by hand")
        elif here not in own_keys().values():
            self.say(key, "lost", f"here it belongs to `{here}`; set it by hand")
        else:
            self.give(here, self.translated(here, value), key, differs=alias.remark)

    def translated(self, here: str, value: Any) -> Any:
        """A value of another tool in our words, where it has some."""
        ours = foreign_names.VALUES.get((here.rpartition(".")[2], str(value).lower()))
        return value if ours is None or "`" in ours or " " in ours else _plain(ours)


def _is_off(value: Any) -> bool:
    return (value.strip().lower() if isinstance(value, str) else value) in OFF or value in ([], {})


def _truth(value: Any) -> Any:
    """Words that YAML 1.1 reads as truth values, and numbers with `_` between thousands."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}(_\d{3})+", value):
        return int(value)
    words = {"yes": True, "on": True, "no": False, "off": False, "true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _plain(text: str) -> Any:
    return {"true": True, "false": False, "null": None, "[]": []}.get(text, text)


def listed(value: Any) -> list[Any]:
    """A list, or one item, or a text with commas, as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def number(value: Any) -> float | None:
    """A finite number, also where it is written as a text; None for anything else."""
    try:
        found = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found is not None and math.isfinite(found) else None


def whole_number(value: Any) -> int | None:
    """A number as a whole one; None where it is none."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() and abs(found) < 2**53 else None
