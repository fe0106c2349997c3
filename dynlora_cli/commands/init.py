"""`dynlora init`: a first recipe for one's own rows, with what most people change next as comments.

Every row is read by the code that `train` reads it with, so what would be refused there is refused here. No tokenizer
is loaded: how long rows are in tokens is for `--dry-run` to say. What the recipe says is checked by the recipe's own
reader before it is written.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from dynlora_cli import plugins
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.sections import Model, Source
from dynlora_cli.data.chat.turns import PAIRS
from dynlora_cli.data.columns import Account, example_for, guessed, located, mark_of, renamed
from dynlora_cli.data.forms import Labelled, as_text, name_of
from dynlora_cli.data.read import fitting_formats
from dynlora_cli.data.row_files import Row
from dynlora_cli.data.sources import is_local, other_splits, tables
from dynlora_cli.data.splits import classes_of
from dynlora_cli.errors import DataError, DynloraError, UsageError
from dynlora_cli.files.whole import write_text
from dynlora_cli.models.find import find_model, has_chat_template, is_encoder_decoder, is_hub_name
from dynlora_cli.text import counted

TEMPLATE = """\
# Purpose:  fine-tune {model} on {data} ({rows})
# Command:  dynlora train {path}
# Hardware: what it needs of memory: dynlora train {path} --dry-run
# Time:     not run yet
# Result:   not run yet
model:
  name_or_path: {model_text}
{task}  # load_in_4bit: true            # QLoRA: the base in a quarter of bf16's memory
dataset:
  train: [{source}]
{held_out}  max_length: {length:<4}                # tokens; what is longer is cut, and counted
{chat}{separator}rank:
  budget: 8                       # average rank when training is done | 0.5 of the start | 2M parameters | auto
train:
{objective}  epochs: 1
  micro_batch_size: 8             # --dry-run says how many rows fit
  # gradient_checkpointing: true  # less memory, more time
  learning_rate: auto             # tries a few on the first batches; a number does without
output_dir: {output}
"""
_ASKED, _RANKED = {"query", "anchor", "question"}, {"positive", "passage", "document", "negative"}
CAUSAL, CLASSIFICATION, SEQ2SEQ = "causal-lm", "sequence-classification", "seq2seq-lm"  # the tasks it chooses among
CHAT = "  chat: auto                      # turns where the model has a chat template | true | false: bare text\n"
LENGTH = 1024
_SHORTEST = 16  # the fewest tokens of a piece of a text file
OBJECTIVE = """\
  objective: {name}                  # {learns}
  beta: 0.1                       # how dear it is to leave the model that training starts from
"""
LEARNS = {"dpo": "which of two answers is better | orpo | kto", "kto": "from answers that are good or bad"}
SEPARATOR = '  separator: "\\n"                 # behind each prompt; the trained model is to be asked with it too\n'
VAL_SIZE = "  val_size: {share:<4}                  # held out to measure on; rows with the same prompt stay together\n"
VAL = "  val: [{sources}]  # to measure on, never trained on\n"
TEST = "  # for the end, never trained on: dynlora eval --adapter {output} --data {file}\n"


@dataclass(frozen=True)
class _Base:
    """What the base model's files say; None where they are not looked at."""

    has_template: bool | None = None
    task: str | None = None

    @classmethod
    def of(cls, name: str) -> _Base:
        """Of the model with this name; one on the hub is not looked at.

        Raises:
            UsageError: there is none.
        """
        if is_hub_name(name):
            return cls()
        folder, _ = find_model(Model(name_or_path=name))
        return cls(has_chat_template(folder), SEQ2SEQ if is_encoder_decoder(folder) else None)


@dataclass(frozen=True)
class _Rows:
    """What the rows of a source are.

    Args:
        source: with the columns that were found.
        task: what they teach.
        form: their format's name.
        count: of rows; a text file is one.
        runs_together: there are prompts that their completions follow with nothing between the two.
        is_text: they are text files, to be cut into pieces.
        length: that examples and pieces may have, in tokens.
        objective: what is learned from them, where that is not to give their answers.
    """

    source: Source
    task: str = CAUSAL
    form: str | None = None
    count: int | None = None
    runs_together: bool = False
    is_text: bool = False
    length: int = LENGTH
    objective: str | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """The neutral forms that are learned from."""
        return _forms(self.task, self.objective)


def run(
    data: str, recipe: Path, *, model: str, columns: Mapping[str, str] | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a recipe.

    Args:
        data: a file, folder, hub data set or the built-in one; only what is on this machine is read.
        recipe: the file to be written.
        model: a folder, a hub id or builtin:tiny; a folder must hold a model.
        columns: our names to the data's.
        overwrite: replace the file.

    Raises:
        UsageError: the file exists, or a name leads nowhere. DataError: the rows cannot be read, or not trained on.
    """
    if recipe.exists() and not overwrite:
        raise UsageError(f"{recipe} exists", "choose another name with --out, or add --overwrite")
    if recipe.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {recipe}: a recipe's name ends in .yaml", f"for example --out {recipe}.yaml")
    for name, what, example in ((data, "DATA", "rows.jsonl"), (model, "--model", "builtin:tiny")):
        if not name:
            raise UsageError(f"{what} is empty", f"name it, such as {example}")
    base = _Base.of(model)
    rows = _Rows(Source(path=data, columns=dict(columns or {})))
    notes: list[str] = []
    val: list[Path] = []
    test: list[Path] = []
    if is_local(data):
        rows = _looked_at(rows.source, base, notes)
        val, test = (_beside(files, rows, base, notes) for files in other_splits(rows.source).values())
        _say_beside(val, test, notes)
    _write_checked(recipe, _as_recipe(recipe, data, model, rows, val, test))
    command = shlex.join(["dynlora", "train", str(recipe)])
    return {
        "ok": True,
        "recipe": str(recipe),
        "task": rows.task,
        "format": rows.form,
        "objective": rows.objective,
        "rows": rows.count,
        "columns": rows.source.columns,
        "val": [str(file) for file in val],
        "test": [str(file) for file in test],
        "notes": notes,
        "next": [f"{command} --dry-run", command],
    }


def _as_recipe(recipe: Path, data: str, model: str, rows: _Rows, val: list[Path], test: list[Path]) -> str:
    """The text of a recipe for these rows, measured on `val`, with `test` named for the end."""
    seen = "a hub data set, not looked at"
    if rows.count is not None:
        seen = f"{counted(rows.count, 'row')}, read as {rows.form}"
    output = f"out/{recipe.stem}"
    return TEMPLATE.format(
        model=_comment(model),
        model_text=_scalar(model),
        data=_comment(data),
        rows=seen,
        path=_comment(shlex.quote(str(recipe))),
        task="" if rows.task == CAUSAL else f"  task: {rows.task}\n",
        source=_source(rows.source),
        held_out=_held_out(rows, val, test, output),
        length=rows.length,
        chat=CHAT if rows.task == CAUSAL and rows.form in PAIRS else "",
        separator=SEPARATOR if rows.runs_together else "",
        objective=OBJECTIVE.format(name=rows.objective, learns=LEARNS[rows.objective]) if rows.objective else "",
        output=_scalar(output),
    )


def _write_checked(recipe: Path, text: str) -> None:
    """Write a recipe that its own reader takes.

    Raises:
        UsageError: it does not; nothing is written.
    """
    recipe.parent.mkdir(parents=True, exist_ok=True)
    draft = recipe.with_name(f".{recipe.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        load_recipe(draft)
    finally:
        draft.unlink(missing_ok=True)
    write_text(recipe, text)


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class _Look:
    """What is seen of a source, row by row."""

    base: _Base
    count: int = 0
    runs_together: bool = False
    labels: set[str | int | None] = field(default_factory=set)
    signs: int = 0  # characters of text files

    def read(self, form: ModuleType, place: str, row: Row, account: Account) -> None:
        """Read a row as `train` does, with columns renamed.

        Raises:
            DataError: `train` would refuse it.
        """
        example = located(form, place, row, self.base.has_template is not False, account).form
        self.count += 1
        if isinstance(example, Labelled):
            self.labels.add(example.label)
        if name_of(form) == "completion":
            prompt, completion = as_text(row["prompt"]), as_text(row["completion"])
            if isinstance(prompt, str) and isinstance(completion, str) and prompt and completion:  # else turns
                self.runs_together |= not (prompt[-1].isspace() or completion[0].isspace())


def _looked_at(source: Source, base: _Base, notes: list[str]) -> _Rows:
    """The rows of a local source.

    Raises:
        DataError: they cannot be read, are of several kinds, or too few to learn from.
    """
    found: dict[tuple[str, str | None, str, str], tuple[str, Source]] = {}
    look, account, is_text = _Look(base), None, False
    for table in tables(source, notes, held_out=False):
        rows = table.read()
        place, first = next(rows)  # a table without rows has raised
        task, objective, form, named = _fit(place, first, source, base)
        found.setdefault((task, objective, name_of(form), str(named.columns)), (table.name, named))
        account = account or Account(named)
        look.read(form, place, renamed(first, named.columns, place), account)
        for place, row in rows:
            look.read(form, place, renamed(row, named.columns, place), account)
        if table.whole_text:
            is_text, look.signs = True, look.signs + len(first["text"])
    if len(found) > 1:
        kinds = "; ".join(f"{name}: {form}" for (_, _, form, _), (name, _) in found.items())
        raise DataError(f"{source.path}: its files hold rows of different kinds ({kinds})", "name one of the files")
    ((task, objective, name, _), (_, named)) = next(iter(found.items()))
    if account:
        account.settle(notes)
    if look.count == 1 and not is_text:
        raise DataError(f"{source.path}: one row is all there is to learn from", "add rows")
    if look.labels:
        classes_of(look.labels)
    together = task == CAUSAL and base.has_template is not True and look.runs_together
    notes += _said(source, named, together)
    length = _piece(source, look.signs) if is_text else LENGTH
    notes += [f"{source.path}: rows of the format {name}, for train.objective: {objective}"] if objective else []
    return _Rows(named, task, name, look.count, together, is_text, length, objective)


def _piece(source: Source, signs: int) -> int:
    """Tokens of a piece of texts with so many characters: several pieces, also where a token is four of them.

    Raises:
        DataError: there is too little to be cut into pieces.
    """
    if signs < 16 * _SHORTEST:
        raise DataError(f"{source.path}: {counted(signs, 'character')} of text are too few to learn from", "add text")
    length = LENGTH
    while length * 16 > signs:
        length //= 2
    return length


def _said(source: Source, named: Source, together: bool) -> list[str]:
    """Sentences about what was guessed of rows."""
    notes = []
    if named.columns != source.columns:
        shown = ", ".join(f"{ours}: {theirs}" for ours, theirs in named.columns.items())
        notes.append(f"{source.path}: columns known by their names, ours to the data's: {shown}")
    if together:
        says = "dataset.separator puts a newline between them, with which the trained model is to be asked as well"
        notes.append(f"{source.path}: prompts and completions would run together as bare text; {says}")
    return notes


def _fit(place: str, row: Row, source: Source, base: _Base) -> tuple[str, str | None, ModuleType, Source]:
    """The task, the objective and the format that rows such as this one are for, and the source, its columns named."""
    missing = [theirs for theirs in source.columns.values() if theirs not in row]
    if missing:
        raise UsageError(f"--columns: {place} has no {missing[0]!r}", f"columns there: {', '.join(row)}")
    # A text with a label could be learned as text, but whoever labels it wants a classifier.
    tasks = [CLASSIFICATION, CAUSAL] if "label" in {*row, *source.columns} else [CAUSAL, CLASSIFICATION]
    tasks = [base.task] if base.task else tasks
    if not (base.task or source.columns) and _RANKED & row.keys() and _ASKED & row.keys():
        tasks = ["embedding", *tasks]  # passages to be found, which no language model writes
    if CAUSAL in tasks and (prefers := _preferring(row, source)):
        return CAUSAL, *prefers, source
    ways = [(task, source) for task in tasks]
    if not source.columns:
        known = [(task, source.model_copy(update={"columns": guessed(row, _forms(task))})) for task in sorted(tasks)]
        ways += sorted(known, key=lambda way: set(way[1].columns) == {"text"})  # two columns say more than one
    for task, named in ways:
        for form in fitting_formats(_forms(task), {*row, *named.columns}):
            return task, None, form, named
    Account(source).enter(place, row, None)  # refuses what no naming of columns helps
    example = ",".join(f"{ours}={theirs}" for ours, theirs in example_for(row, _forms(tasks[0])).items())
    way = f"say which is which, ours to theirs, such as --columns {shlex.quote(example)}"
    raise DataError(
        f"{place}: the columns {', '.join(sorted(row))} fit no format",
        way if example else "none of them holds a text; rows have prompt and completion, messages, or text",
    )


def _preferring(row: Row, source: Source) -> tuple[str, ModuleType] | None:
    """The objective and the format of rows that compare or judge answers; None for others."""
    named = renamed(row, source.columns, "")
    judges = mark_of(named.get("label", named.get("kto_tag"))) in (0, 1)  # another label is a class
    ways = [(name, form) for name in LEARNS for form in fitting_formats(_forms(CAUSAL, name), set(named))]
    return next((way for way in ways if judges or way[0] == "dpo"), None)


def _forms(task: str, objective: str | None = None) -> tuple[str, ...]:
    """The neutral forms that a task learns from, or an objective that has forms of its own."""
    own = plugins.declared("objectives", objective, "FORMS") if objective else None
    return tuple(own or plugins.declared("tasks", task, "FORMS"))


# -- rows to measure on ----------------------------------------------------------------------------------------------


def _beside(files: list[Path], rows: _Rows, base: _Base, notes: list[str]) -> list[Path]:
    """Those of some files that hold rows of the same kind; of the others a note says why not."""
    fitting = []
    for file in files:
        try:
            source = rows.source.model_copy(update={"path": str(file)})
            for table in tables(source, [], held_out=True):
                look, account = _Look(base), Account(source)
                for place, row in table.read():
                    named = renamed(row, source.columns, place)
                    forms = fitting_formats(rows.forms, set(named))
                    if not forms or name_of(forms[0]) != rows.form:
                        raise DataError(f"{place}: its columns are not those of {rows.form} rows")
                    look.read(forms[0], place, named, account)
            fitting.append(file)
        except DynloraError as error:
            notes.append(f"{file} is left aside: {error.message}")
    return fitting


def _say_beside(val: list[Path], test: list[Path], notes: list[str]) -> None:
    if val:
        notes.append(f"held-out loss is measured on {', '.join(map(str, val))} (dataset.val)")
    if test:
        notes.append(f"not trained on, left for `dynlora eval --data`: {', '.join(map(str, test))}")


def _held_out(rows: _Rows, val: list[Path], test: list[Path], output: str) -> str:
    """The recipe's lines about rows that are not trained on."""
    sources = [_source(rows.source.model_copy(update={"path": str(file)})) for file in val]
    few = rows.count is not None and rows.count < 3 and not rows.is_text  # one of two would leave one
    lines = VAL.format(sources=", ".join(sources)) if val else VAL_SIZE.format(share="0" if few else "0.05")
    for file in test:
        lines += TEST.format(output=shlex.quote(output), file=_comment(shlex.quote(str(file))))
    return lines


# -- text of the recipe ----------------------------------------------------------------------------------------------


def _source(source: Source) -> str:
    columns = ", ".join(f"{ours}: {_scalar(theirs)}" for ours, theirs in source.columns.items())
    return f"{{path: {_scalar(source.path)}" + (f", columns: {{{columns}}}" if columns else "") + "}"


def _comment(text: str) -> str:
    """Text that stays on the line of its comment."""
    return " ".join(text.split())


def _scalar(text: str) -> str:
    """Text as YAML: as it is where that is read back, in quotes elsewhere."""
    if re.fullmatch(r"[A-Za-z./~][\w./~:-]*", text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()
