"""`train --sweep KEY=A,B,C`: the grid of all combinations, each of them a recipe that is checked before anything runs.

What stands behind `=` is the inside of a YAML list, so values parse as after `--set`: numbers, texts, `null`, and lists
such as `[q_proj, v_proj],all-linear`.

A run's folder is named by its values alone. The same values get the same name in a larger sweep, so a sweep can grow.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora_cli.config import strict_yaml
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import RecipeError
from dynlora_cli.files.names import is_name

SEED = "seed"  # the key whose runs are averaged
OUT = "output_dir"
WRITTEN = "write it as --sweep KEY=VALUE,VALUE, such as --sweep rank.budget=2,4,8"
MOST = 1000  # runs: a comma too many should not plan a week
LONGEST_NAME = 64
# A recipe of some settings, `section.key=value`, that goes into a folder; None: the recipe's own.
Load = Callable[[Sequence[str], str | None], Recipe]


@dataclass(frozen=True)
class Axis:
    """One key of a sweep, and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: of its folder, which lies in the sweep's.
        values: of the keys that are swept, by key.
        settings: the same as `--set` takes them.
        recipe: the complete one.
    """

    name: str
    values: Mapping[str, Any]
    settings: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep, in the order of the options; the last key changes fastest."""

    folder: Path
    axes: tuple[Axis, ...]
    members: tuple[Member, ...]


def read_axes(texts: Sequence[str], changed: Sequence[str] = ()) -> tuple[Axis, ...]:
    """The keys and values of a sweep.

    Args:
        texts: `KEY=VALUE,VALUE`, one for each key.
        changed: settings that hold for all runs.

    Raises:
        RecipeError: every problem with how they are written.
    """
    axes, problems = [], list[str]()
    for text in texts:
        axis, faults = _axis(text)
        axes += [axis] if axis else []
        problems += faults
    keys = Counter(axis.key for axis in axes)
    problems += [
        f"--sweep {key}: given {times} times; name all its values in one" for key, times in keys.items() if times > 1
    ]
    fixed = {text.partition("=")[0].strip() for text in changed}
    problems += [
        f"--sweep {key}: --set gives this key one value as well; leave one of them out" for key in keys if key in fixed
    ]
    if problems:
        raise RecipeError(problems, WRITTEN)
    return tuple(axes)


def _axis(text: str) -> tuple[Axis | None, list[str]]:
    key, equals, listed = (part.strip() for part in text.partition("="))
    place = f"--sweep {text if len(text) <= 120 else text[:117] + '...'}"
    if not equals or not all(key.split(".")):
        return None, [f"{place}: must be written section.key=value,value"]
    if key == OUT:
        return None, [f"{place}: each run gets a folder of its own already, below that of the sweep"]
    root, problems = strict_yaml.parse(f"[{listed}]", place, numbered=False)
    if root is None or problems:
        return None, [str(problem) for problem in problems]
    values = root.plain()
    if not isinstance(values, list) or not values:
        return None, [f"{place}: names no value"]
    if len(values) == 1 and isinstance(values[0], list):
        return None, [f"{place}: is one value, a list; leave out the brackets to try its items one after the other"]
    if any(isinstance(value, dict) for value in values):
        return None, [f"{place}: a value may not be a section; sweep its keys"]
    return Axis(key, tuple(values)), []


def make_grid(axes: Sequence[Axis], load: Load) -> Grid:
    """All combinations, each as a checked recipe.

    Raises:
        RecipeError: every problem of any of them. One that not all have names those that do.
    """
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise RecipeError(
            [f"--sweep: {count:,} combinations; at most {MOST:,} are run"], "sweep fewer values at a time"
        )
    combinations = [
        dict(zip((axis.key for axis in axes), chosen, strict=True))
        for chosen in itertools.product(*(axis.values for axis in axes))
    ]
    names = [name_of(values) for values in combinations]
    checked = _Checked(load)
    for name, values in zip(names, combinations, strict=True):
        checked.add(name, values)
    checked.refuse()
    members = checked.members
    _refuse_twins(members)
    return Grid(members[0].folder.parent, tuple(axes), tuple(members))


class _Checked:
    """Recipes of a grid, and what is wrong with any of them."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.base: str | None = None  # the sweep's folder, once a recipe has told it
        self.members: list[Member] = []
        self.count = 0
        self.problems: dict[str, list[str]] = {}  # of which runs, by problem
        self.hint: str | None = None

    def add(self, name: str, values: Mapping[str, Any]) -> None:
        self.count += 1
        settings = tuple(f"{key}={_text(value)}" for key, value in values.items())
        try:
            if self.base is None:
                self.base = self.load(settings, None).output_dir
            recipe = self.load(settings, str(Path(self.base) / name))
        except RecipeError as error:
            self.hint = error.hint
            for problem in error.problems:
                self.problems.setdefault(problem, []).append(name)
            return
        self.members.append(Member(name, values, settings, recipe))

    def refuse(self) -> None:
        if self.problems:
            lines = [f"{problem}{self._whose(names)}" for problem, names in self.problems.items()]
            raise RecipeError(lines, self.hint)

    def _whose(self, names: Sequence[str]) -> str:
        """Whose problem it is, where it is not everybody's."""
        if len(names) == self.count:
            return ""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f" (in {names[0]}{more})"


def _refuse_twins(members: Sequence[Member]) -> None:
    """Refuse a grid in which two runs are the same one, or want the same folder."""
    seen: dict[str, Member] = {}
    problems = []
    for member in members:
        for what in (member.name.lower(), member.recipe.model_copy(update={OUT: ""}).model_dump_json()):
            twin = seen.setdefault(what, member)
            if twin is not member:
                problems.append(f"--sweep: {_said(twin.values)} and {_said(member.values)} are the same run")
                break
    if problems:
        raise RecipeError(problems, "name each value once")


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


# -- names -----------------------------------------------------------------------------------------------------------


def name_of(values: Mapping[str, Any]) -> str:
    """The folder of a run: `budget-8_seed-0`. What a folder cannot be called is replaced, and a hash tells it apart."""
    parts = [f"{word}-{_plain(value)}" for word, value in zip(_words(list(values)), values.values(), strict=True)]
    name = "_".join(parts)
    if len(name) > LONGEST_NAME or not is_name(name):
        name = f"{re.sub('^[^A-Za-z0-9]+', '', name)[: LONGEST_NAME - 9].rstrip('.-_')}-{_hash(_said(values))[:8]}"
    return name


def _words(keys: Sequence[str]) -> Iterator[str]:
    """What keys are called in a name: their last word, or all of it where two share that."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    for key in keys:
        word = key.rpartition(".")[2]
        yield _safe(word if last[word] == 1 else key)


def _plain(value: Any) -> str:
    """A value as part of a name; one that loses something in it gets a few digits of its hash."""
    text = value if isinstance(value, str) else _text(value)
    safe = _safe(text)
    return safe if safe == text else f"{safe}-{_hash(text)[:4]}".lstrip("-")


def _safe(text: str) -> str:
    return re.sub("[^A-Za-z0-9.+-]+", "-", text).replace("+", "").strip("-")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: Any) -> str:
    """A value as YAML in one line; JSON is YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)
