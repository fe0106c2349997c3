"""A first recipe for one's own rows, with what most people change next as comments.

What the recipe says is checked by the recipe's own reader before it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynlora_cli.config.options import options
from dynlora_cli.config.sections import Source
from dynlora_cli.data.chat.turns import PAIRS
from dynlora_cli.data.sources import is_local, other_splits
from dynlora_cli.drafts.rows import CAUSAL, Base, Rows, beside, looked_at, say_beside, taught
from dynlora_cli.drafts.text import comment, scalar, source_text
from dynlora_cli.errors import UsageError
from dynlora_cli.text import counted

TEMPLATE = """\
# Purpose:  fine-tune {model} on {data} ({rows})
# Command:  {command}
# Hardware: what it needs of memory: {command} --dry-run
# Time:     not run yet
# Result:   not run yet
model:
  name_or_path: {model_text}
{task}  # load_in_4bit: true            # QLoRA: the base in a quarter of bf16's memory
dataset:
  train: [{source}]
{held_out}  max_length: {length:<4}                # tokens; what is longer is cut, and counted
{chat}{separator}rank:
  budget: {budget:<23} # average rank when training is done | 0.5 of the start | 2M parameters | 200kB | auto
train:
{objective}  epochs: auto                    # two passes, one over large data | a number
  micro_batch_size: 8             # --dry-run says how many rows fit
  # gradient_checkpointing: true  # less memory, more time
  learning_rate: auto             # a guess, checked by the run's first steps | a number
output_dir: {output}
"""
CHAT = "  chat: auto                      # turns where the model has a chat template | true | false: bare text\n"
OBJECTIVE = "  objective: {name:<20} # {learns}\n"
BETA = "  beta: {default:<25} # how dear it is to leave the model that training starts from\n"
SEPARATOR = '  separator: "\\n"                 # behind each prompt; the trained model is to be asked with it too\n'
VAL_SIZE = "  val_size: {share:<4}                  # held out to measure on; rows with the same prompt stay together\n"
VAL = "  val: [{sources}]  # to measure on, never trained on\n"
TEST = "  # for the end, never trained on: dynlora eval --adapter {output} --data {file}\n"


BUDGET = "8"


@dataclass(frozen=True)
class Draft:
    """A recipe that was made for rows.

    Args:
        model, data: as they were named.
        rows: what was found of them.
        val, test: files beside them, to measure on and for the end.
        notes: what was guessed or left aside, in sentences.
    """

    model: str
    data: str
    rows: Rows
    val: list[Path]
    test: list[Path]
    notes: list[str]

    def text(self, command: str, output: str, budget: str = BUDGET) -> str:
        """The recipe.

        Args:
            command: that trains with it.
            output: the run folder.
            budget: `rank.budget`, as YAML.
        """
        rows = self.rows
        seen = "a hub data set, not looked at"
        if rows.count is not None:
            seen = f"{counted(rows.count, 'row')}, read as {rows.form}"
        return TEMPLATE.format(
            model=comment(self.model),
            model_text=scalar(self.model),
            data=comment(self.data),
            rows=seen,
            command=comment(command),
            task="" if rows.task == CAUSAL else f"  task: {rows.task}\n",
            source=source_text(rows.source),
            held_out=_held_out(rows, self.val, self.test, output),
            length=rows.length,
            chat=CHAT if rows.task == CAUSAL and rows.form in PAIRS else "",
            separator=SEPARATOR if rows.runs_together else "",
            budget=budget,
            objective=_objective(rows.objective) if rows.objective else "",
            output=scalar(output),
        )


def draft(data: str, model: str, columns: Mapping[str, str] | None = None, option: str = "DATA") -> Draft:
    """Look at rows and model, and find out what to train.

    Args:
        data: a file, folder, hub data set or the built-in one; only what is on this machine is read.
        model: a folder, a hub id or builtin:tiny; a folder must hold a model.
        columns: our names to the data's.
        option: what the command calls the rows.

    Raises:
        UsageError: a name leads nowhere. DataError: the rows cannot be read, or not trained on.
    """
    for name, what, example in ((data, option, "rows.jsonl"), (model, "--model", "builtin:tiny")):
        if not name:
            raise UsageError(f"{what} is empty", f"name it, such as {example}")
    base = Base.of(model)
    rows = Rows(Source(path=data, columns=dict(columns or {})))
    notes: list[str] = []
    val: list[Path] = []
    test: list[Path] = []
    if is_local(data):
        rows = looked_at(rows.source, base, notes)
        val, test = (beside(files, rows, base, notes) for files in other_splits(rows.source).values())
        say_beside(val, test, notes)
    return Draft(model, data, rows, val, test, notes)


def name_for(data: str) -> str:
    """What a run on these rows is called: as their file, folder or hub data set, in signs that every disk takes."""
    name = Path(data.removeprefix("builtin:")).expanduser().absolute()
    stem = name.name if name.is_dir() else name.stem
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"


def _objective(name: str) -> str:
    """The lines about what is learned from rows of answers that are compared or judged."""
    line = OBJECTIVE.format(name=name, learns=taught(name))
    beta = options("objectives", name).get("beta")
    return line + (BETA.format(default=beta.default) if beta else "")


def _held_out(rows: Rows, val: list[Path], test: list[Path], output: str) -> str:
    """The recipe's lines about rows that are not trained on."""
    sources = [source_text(rows.source.model_copy(update={"path": str(file)})) for file in val]
    few = rows.count is not None and rows.count < 3 and not rows.is_text  # one of two would leave one
    lines = VAL.format(sources=", ".join(sources)) if val else VAL_SIZE.format(share="0" if few else "0.05")
    for file in test:
        lines += TEST.format(output=shlex.quote(output), file=comment(shlex.quote(str(file))))
    return lines
