"""A configuration of another tool, as a recipe that trains the same thing, and what became of each of its keys.

Nothing of the file is run, and no path in it is followed; a list of data sets that lies beside it is the one exception
(drafts/importers/llama_factory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names
from dynlora_cli.config.load import problems_of
from dynlora_cli.config.sections import Settings
from dynlora_cli.config.strict_yaml import Node, Place
from dynlora_cli.drafts.files.entries import ForeignFile, read_foreign
from dynlora_cli.drafts.importer import Entry, Finding, Importer, Move, Setting
from dynlora_cli.drafts.text import comment, flow, scalar
from dynlora_cli.errors import UsageError
from dynlora_cli.text import counted, did_you_mean

SECTIONS = list(Settings.model_fields)
WIDTH = 34  # where comments begin


@dataclass(frozen=True)
class Converted:
    """A recipe made of a file.

    Args:
        tool: that the file is for.
        settings: keys of the recipe.
        unasked: keys that the file does not say, with the reason.
        findings: what became of each key of the file.
        path: the file.
    """

    tool: str
    settings: dict[str, Setting]
    unasked: dict[str, tuple[Any, str]]
    findings: list[Finding]
    path: Path

    def of_kind(self, kind: str) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def text(self, command: str) -> str:
        """The recipe; `command` trains with it."""
        head = [
            f"# Purpose:  trains what {comment(str(self.path))} trains; it was read as {self.tool}",
            f"# Command:  {comment(command)}",
            f"# Hardware: what it needs of memory: {comment(command)} --dry-run",
            "# Time:     not run yet",
            "# Result:   not run yet",
        ]
        for kind, title in (("lost", "Has no equivalent here:"), ("differs", "Is not quite the same:")):
            if found := self.of_kind(kind):
                head += [f"# {title}", *(f"#   {comment(str(finding))}" for finding in found)]
        return "\n".join([*head, *self._lines()]) + "\n"

    def _lines(self) -> Iterator[str]:
        values = {key: (one.value, one.remark) for key, one in self.settings.items()} | self.unasked
        for section in SECTIONS:
            if section in values:
                yield _line(section, *values[section])
                continue
            found = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
            fields = list(getattr(Settings.model_fields[section].annotation, "model_fields", ()))
            own = dict(sorted(found.items(), key=lambda one: fields.index(one[0]) if one[0] in fields else len(fields)))
            if own:
                yield f"{section}:"
            for key, (value, remark) in own.items():
                rows = section == "dataset" and key in ("train", "val")
                yield from _several(key, value) if rows else [f"  {_line(key, value, remark)}"]


def _line(key: str, value: Any, remark: str) -> str:
    shown = scalar(value) if isinstance(value, str) else flow(value)
    text = f"{key}: {shown}"
    return f"{text:<{WIDTH - 2}} # {comment(remark)}" if remark else text


def _several(key: str, sources: Any) -> Iterator[str]:
    yield f"  {key}:"
    for source in sources if isinstance(sources, list) else [sources]:
        items = source.items() if isinstance(source, dict) else [("path", source)]
        yield f"    - {{{', '.join(f'{name}: {flow(value)}' for name, value in items)}}}"


def convert(path: Path, tool: str | None = None, model: str | None = None, data: str | None = None) -> Converted:
    """Make a recipe of a file.

    Args:
        path: the file.
        tool: whose it is, by the name of its importer; None: found out by what the file says.
        model, data: in place of what the file names, or where it names none.

    Raises:
        UsageError: the file cannot be read, is of no tool that is known, or says what dynlora does not train.
    """
    file = read_foreign(path)
    name = _chosen(file, tool)
    importer = cast("Importer", plugins.load("importers", name))
    move = Move(file, importer.NAME, foreign_names.keys_of(name), importer.DEFAULTS)
    _refuse_unreadable(move)
    importer.convert(move)
    move.by_table()
    move.defaults_by_table()
    move.unasked = {key: one for key, one in move.unasked.items() if key not in move.recipe}  # the file decides
    _replace(move, model, data)
    named = move.file.value("config")
    if isinstance(named, str) and not {"model.name_or_path", "dataset.train"} <= move.recipe.keys():
        move.refuse("config", f"it trains with {named}", f"give that file: --from {named}")
    for key, what, option in (("model.name_or_path", "model", "--model NAME"), ("dataset.train", "rows", "DATA")):
        if key not in move.recipe:
            way = f"name it: dynlora init {'DATA ' if option == 'DATA' else ''}--from {path}"
            move.refuse("", f"the file names no {what}", f"{way}{' --model NAME' if what == 'model' else ''}")
    _settle(move)
    order = sorted(move.findings, key=lambda one: (one.entry.line is None, one.entry.part, one.entry.line or 0))
    return Converted(importer.NAME, move.recipe, move.unasked, order, path)


def _chosen(file: ForeignFile, tool: str | None) -> str:
    """The importer of a file.

    Raises:
        UsageError: there is none, or several claim it.
    """
    names = plugins.names("importers")
    if tool is not None:
        if tool not in names:
            raise UsageError(
                f"--from-tool {tool}: there is none{did_you_mean(tool, names)}", f"known: {', '.join(names)}"
            )
        return tool
    reading = [name for name in names if file.kind in plugins.declared("importers", name, "READS").split()]
    found = [name for name in reading if cast("Importer", plugins.load("importers", name)).recognises(file)]
    if not found:
        keys = ", ".join(list(file.entries)[:6]) or "none"
        raise UsageError(
            f"--from {file.path}: of no tool that is known (its keys: {keys})",
            f"say whose it is: --from-tool {' | '.join(names)}",
        )
    if len(found) > 1:
        text = f"--from {file.path}: may be of {' or '.join(found)}"
        raise UsageError(text, f"say which: --from-tool {found[0]}")
    return found[0]


def _refuse_unreadable(move: Move) -> None:
    """List what could not be read of the file at all."""
    if move.file.processes and move.file.processes[0] > 1:
        count, at = move.file.processes
        text = f"a step has the rows of {count}: --devices {count}, or gradient_accumulation_steps times {count} on one"
        move.findings.append(Finding(Entry("(processes)", count, at), "differs", text))
    for line, fault in move.file.faults:
        move.findings.append(Finding(Entry("(unread)", "", line or 0), "lost", fault))


def _replace(move: Move, model: str | None, data: str | None) -> None:
    """Put in the model and the rows that the command names."""
    for here, value in (("model.name_or_path", model), ("dataset.train", [{"path": data}] if data else None)):
        if value is None:
            continue
        old = move.recipe.get(here)
        move.recipe[here] = Setting(value, Entry(here, value, None), "named on the command line")
        if old:
            move.findings.append(Finding(old.entry, "differs", f"{here}: the command line's is taken instead"))
        if here == "dataset.train":
            move.recipe.pop("dataset.val", None)


def _settle(move: Move) -> None:
    """Have the recipe's own reader check it; what it refuses is taken out and listed.

    Raises:
        UsageError: what is left is no recipe.
    """
    for _ in range(len(move.recipe) + len(move.unasked) + 1):
        problems = problems_of(_tree(move))
        if not problems:
            return
        for key, text in problems:
            at = next((one for one in (key, *_parents(key)) if one in move.recipe or one in move.unasked), None)
            if at is None or at in ("model.name_or_path", "dataset.train"):
                move.refuse("", f"{key}: {text}", "mend the file, or write a recipe: dynlora init")
            if at in move.unasked:
                move.unasked.pop(at)
            elif setting := move.recipe.pop(at, None):
                others = [one for one in move.findings if one.entry != setting.entry]
                move.findings[:] = [*others, Finding(setting.entry, "lost", f"{at}: {text}")]
    move.refuse("", "its keys do not go together", "write a recipe: dynlora init")


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _tree(move: Move) -> Node:
    """The recipe as its reader takes it."""
    root = Node({}, Place(str(move.file.path)))
    values = {key: one.value for key, one in move.recipe.items()}
    for key, value in (values | {key: value for key, (value, _) in move.unasked.items()}).items():
        root.assign(key.split("."), _node(value))
    return root


def _node(value: Any) -> Node:
    place = Place("")
    if isinstance(value, dict):
        return Node({str(key): _node(one) for key, one in value.items()}, place)
    return Node([_node(one) for one in value] if isinstance(value, list) else value, place)


def summary(converted: Converted) -> str:
    """The counts, in words."""
    kinds = ("converted", "differs", "needless", "lost")
    words = {
        "converted": "converted",
        "differs": "not quite the same",
        "needless": "needless",
        "lost": "without equivalent",
    }
    found = {kind: len(converted.of_kind(kind)) for kind in kinds}
    shown = ", ".join(f"{found[kind]} {words[kind]}" for kind in kinds if found[kind])
    return f"{converted.path}: read as {converted.tool}; {counted(sum(found.values()), 'key')}: {shown}"
