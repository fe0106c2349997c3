"""Commands that are killed: before any change to the disk, inside a write, at a random moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import made as runs
from .child import Answer, changes_of, command, kill_at_byte, kill_at_change
from .trial import Kind, Lost, ProvesNothing, Trial, pick

LONGEST = 1.2  # seconds; most commands here take less on an idle machine


class Case(NamedTuple):
    """A command that is killed.

    Attributes:
        arguments: by the folder of what was made, and its output folder.
        old: what lies in the output folder before, by its name in the folder of what was made.
        new: what lies there if nothing befalls it, likewise.
    """

    arguments: Callable[[Path, Path], list[object]]
    old: str | None
    new: str


def _writer(*words: object) -> Callable[[Path, Path], list[object]]:
    return lambda made, out: [words[0], "--adapter", made / "new", *words[1:], "--out", out, "--overwrite"]


CASES = {
    "train": Case(runs.train, None, "new"),
    "train --overwrite": Case(lambda made, out: runs.train(made, out, "--overwrite"), "old", "new"),
    "prune --overwrite": Case(_writer("prune", "--budget", "1"), "old", "pruned"),
    "merge --overwrite": Case(_writer("merge"), "old", "merged"),
    "export --overwrite": Case(_writer("export", "--to", "peft"), "old", "exported"),
}


def ready(made: Path, name: str) -> int:
    """What a command makes if nothing befalls it, made once; returns how many changes to the disk it makes on its way."""
    case, known = CASES[name], made / f"changes of {name.partition(' ')[0]} {bool(CASES[name].old)}"
    if known.exists():
        return int(known.read_text())
    out = made / "counted" / "out"
    runs.remove(made / "counted")
    out.parent.mkdir()
    if case.old:
        runs.copy(made / case.old, out)
    changes = changes_of(case.arguments(made, out), made)
    if not (made / case.new).exists():
        out.rename(made / case.new)
    runs.remove(made / "counted")
    known.write_text(str(changes))
    return changes


def run(trial: Trial) -> str:
    """Three of five trials are of one change to the disk each, one of a write, one of the clock."""
    group, place = divmod(trial.number, 5)
    names = list(CASES)
    if place < 3:
        turn, case = divmod(3 * group + place, len(names))
        name = names[pick("kills", trial.seed, case, len(names))]
        changes = ready(trial.made, name)
        change = 1 + pick(f"kills {name}", trial.seed, turn, changes)
        return _survive(trial, name, f"before change {change} of {changes} of {name}", fault=kill_at_change(change))
    name = trial.chance.choice(names)
    ready(trial.made, name)
    if place == 3:
        size = int(2 ** trial.chance.uniform(0, 18))
        return _survive(trial, name, f"{name}, at byte {size} of a file", fault=kill_at_byte(size))
    seconds = trial.chance.uniform(0.02, LONGEST)
    return _survive(trial, name, f"{name}, after {seconds:.2f} s", kill_after=seconds)


def _survive(trial: Trial, name: str, moment: str, **how: object) -> str:
    case, out = CASES[name], trial.work / "out"
    if case.old:
        runs.copy(trial.made / case.old, out)
    source = runs.contents(trial.made / "new")
    answer = command(case.arguments(trial.made, out), trial.work, **how)
    try:
        if not answer.killed:
            _ended(answer, trial, case, out)
            raise ProvesNothing("it was done before it could be killed")
        _readable(out)
        gone_on = (after_train if name.startswith("train") else after_writing)(trial, case, out)
        runs.alone(trial.work, "out")
        if runs.contents(trial.made / "new") != source:
            raise Lost("what the command reads was changed")
    except Lost as lost:
        raise Lost(f"killed {moment}: {lost}") from None
    return gone_on


def _ended(answer: Answer, trial: Trial, case: Case, out: Path) -> None:
    answer.must(0)
    if case.new == "new":
        runs.same_run(out, trial.made / "new")
    else:
        is_new(out, trial.made / case.new)


def _readable(out: Path) -> None:
    """What a killed command leaves is read whole, or refused in words."""
    from dynlora_cli.adapters.read import read_adapter
    from dynlora_cli.errors import DynloraError

    try:
        read_adapter(out)
    except DynloraError as refused:
        if refused.exit_code != 2:
            raise Lost(f"reading what is left: {refused.message}") from None


def after_train(trial: Trial, case: Case, out: Path) -> str:
    """`--resume` goes on to the same bytes; where nothing was saved it says so, and the old run is whole."""
    again = command(runs.train(trial.made, out, "--resume"), trial.work).must(0, 2)
    if again.code == 0:
        runs.same_run(out, trial.made / case.new)
        return "went on to the same bytes"
    if case.old and out.exists():
        runs.same_files(out, trial.made / case.old)
    command(runs.train(trial.made, out, "--overwrite"), trial.work).must(0)
    runs.same_run(out, trial.made / case.new)
    return "the old run was whole" if case.old else "nothing was saved yet; it began anew to the same bytes"


def after_writing(trial: Trial, case: Case, out: Path) -> str:
    """The old or the new is there whole; the same command then makes the new."""
    runs.settled(out)
    try:
        runs.same_files(out, trial.made / str(case.old))
        found = "the old folder was whole"
    except Lost:
        is_new(out, trial.made / case.new)
        found = "the new folder was whole"
    command(case.arguments(trial.made, out), trial.work).must(0)
    is_new(out, trial.made / case.new)
    return found


def is_new(out: Path, reference: Path) -> None:
    now, before = runs.contents(out), runs.contents(reference)
    if now.keys() != before.keys():
        raise Lost(f"the files are neither the old nor the new ones: {sorted(now.keys() ^ before.keys())}")
    for name, content in before.items():
        if name.endswith(".safetensors") and now[name] != content:
            raise Lost(f"{name} has other bytes than what nothing befell")


KIND = Kind(
    name="kills",
    what="`train`, `prune`, `merge` and `export` are killed: before each change to the disk, inside a write, at any time",
    tried=100,
    bounded=2,
    batch=5,
    seconds=400,
    prepare=runs.prepare,
    run=run,
)
