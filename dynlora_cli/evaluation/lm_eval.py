"""Hands a model in memory over to lm-evaluation-harness: its tasks by name, or a task of one's own from a file.

Reference: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import importlib.util
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = 'pip install "dynlora[harness]"'
FILES = (".yaml", ".yml")
FEWSHOT_SEED = 1234  # as the harness's own command has it, so that numbers compare


def require() -> None:
    """Refuse early what would fail late.

    Raises:
        MachineError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError("--tasks: the package lm_eval is not installed", INSTALL)


def split_tasks(text: str) -> list[str]:
    """`a,b` as a list of task names and task files.

    Raises:
        UsageError: it names nothing, or a file that is not there.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--tasks {text!r} names no task", "for example --tasks hellaswag,arc_easy")
    for name in names:
        if name.lower().endswith(FILES) and not Path(name).is_file():
            raise UsageError(f"--tasks: there is no task file {name}", "relative paths start at the current folder")
    return names


class Harness:
    """Tasks that are ready to be run on any number of models.

    Args:
        tasks: names or paths of task files, as `split_tasks` gives them.
        limit: at most so many documents of each task; None: all.
        batch_size: requests answered at once.

    Raises:
        UsageError: an unknown task, or a task file that the harness does not take.
        MachineError: a task whose data is neither here nor to be had.
    """

    def __init__(self, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> None:
        require()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with _quiet():
            from lm_eval.tasks import TaskManager

            files = [name for name in tasks if name.lower().endswith(FILES)]
            # Reading the shipped tasks takes seconds, and nobody asked for one of them.
            self.manager = TaskManager(include_defaults=len(files) < len(tasks))
        known = set(self.manager.all_tasks)
        for name in tasks:
            if name not in files and name not in known and "*" not in name:
                raise UsageError(
                    f"--tasks: the harness has no task {name!r}{did_you_mean(name, known)}",
                    "`python -m lm_eval ls tasks` lists them; a file of your own ends in .yaml",
                )
        self.tasks, self.limit, self.batch_size = list(tasks), limit, batch_size
        self._read()

    def _read(self) -> None:
        """Read every task once, so that a fault of one is told before a model is loaded."""
        for name in self.tasks:
            try:
                with _quiet():
                    self.manager.load(name)
            except OSError as error:  # of the hub and of data sets too: theirs are all OSErrors
                raise MachineError(
                    f"--tasks {name}: its data is neither here nor to be had: {str(error).strip().splitlines()[0]}",
                    "fetch it where there is a network, or write a task file with local data_files",
                ) from None
            except Exception as error:  # whatever a task's own file and code may raise
                raise UsageError(
                    f"--tasks {name}: the harness does not take it: {type(error).__name__}: {error}",
                    "how a task file is written: docs/task_guide.md of lm-evaluation-harness",
                ) from error

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
        """Numbers of each task (and group of tasks) on a model, by the harness's own names.

        Args:
            model: a causal language model in evaluation mode.
            tokenizer: its own.
        """
        with _quiet():
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            # Not `simple_evaluate`, which asks git and pip about the machine, and prints what they answer.
            loaded: Any = self.manager.load(self.tasks)
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            random.seed(0)
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
            found: Any = evaluate(wrapped, loaded, limit=self.limit, log_samples=False)
        return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": "N/A", ...}` as `{"acc": 0.5}`; other filters than none keep their name."""
    numbers = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, (int, float)):
            numbers[metric if filtered == "none" else key] = float(value)
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """What the harness warns its own authors of stays out of our output, and its progress bars out of files."""
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), bars:
        warnings.simplefilter("ignore")
        yield
