"""`dynlora train A.yaml B.yaml ...`: several runs at once, whose rows share each pass through one frozen base.

Each is an ordinary run in a folder of its own. One that fails ends alone; the others go on.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from dynlora_cli.errors import DynloraError, Interrupted
from dynlora_cli.text import counted
from dynlora_cli.training.lanes.base import SharedBase
from dynlora_cli.training.lanes.turns import Lane, walk_together

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.resume import Standing

GO_ON = "the same command with --resume goes on"


@dataclass(frozen=True)
class Planned:
    """One of the runs.

    Attributes:
        name: what it is called, beside the others.
        recipe: the complete one.
        standing: what is in its folder already.
    """

    name: str
    recipe: Recipe
    standing: Standing


class Train(Protocol):
    """Trains one run and returns its summary, as `train.run` does."""

    def __call__(self, planned: Planned, *, overwrite: bool, resume: bool, lane: Lane) -> dict[str, Any]:
        """`lane`: its place among the others."""


def run(runs: Sequence[Planned], train: Train, told: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Train all of them.

    Args:
        runs: which can train side by side, see config/side_by_side.py.
        train: trains one.
        told: is given the name of each run as it ends, and what has become of it: as in the result.

    Returns:
        `runs`: of each its name, output_dir, state (done, failed, interrupted), and summary or error; and `ok`. Where
        some have failed also `exit_code` and `error`.

    Raises:
        Interrupted: Ctrl-C; the runs are saved.
    """
    base = SharedBase()
    ends: dict[str, dict[str, Any]] = {}

    def walk(planned: Planned, lane: Lane) -> None:
        ends[planned.name] = found = _one(planned, train, lane)
        told(planned.name, found)

    lanes = [Lane(number, base, partial(walk, planned)) for number, planned in enumerate(runs)]
    walk_together(lanes, base)
    for planned in runs:  # not begun when Ctrl-C came
        ends.setdefault(planned.name, {"state": "interrupted"})
    states = [ends[planned.name]["state"] for planned in runs]
    if "interrupted" in states:
        count = states.count("interrupted")
        raise Interrupted(f"interrupted: {count} of {len(runs)} runs are not done; what they had is saved", GO_ON)
    rows = [{"name": one.name, "output_dir": one.recipe.output_dir, **ends[one.name]} for one in runs]
    return {"ok": "failed" not in states, "runs": rows, **_failures(rows)}


def _one(planned: Planned, train: Train, lane: Lane) -> dict[str, Any]:
    """One run from its beginning to its end; what became of it."""
    overwrite, resume = planned.standing == "anew", planned.standing in ("go on", "finished")
    try:
        return {"state": "done", "summary": train(planned, overwrite=overwrite, resume=resume, lane=lane)}
    except (Interrupted, KeyboardInterrupt):
        return {"state": "interrupted"}
    except DynloraError as error:
        return {"state": "failed", "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    except Exception as error:  # a fault of ours or of a library: it is shown whole, and costs this run alone
        traceback.print_exc(file=sys.stderr)
        return {"state": "failed", "error": f"{type(error).__name__}: {error}", "hint": None, "exit_code": 1}


def _failures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The exit code, and a sentence, where runs have failed."""
    failed = [row for row in rows if row["state"] == "failed"]
    if not failed:
        return {}
    codes = {row["exit_code"] for row in failed}
    names = ", ".join(row["name"] for row in failed)
    code = codes.pop() if len(codes) == 1 else DynloraError.exit_code
    return {"exit_code": code, "error": f"{len(failed)} of {counted(len(rows), 'run')} failed: {names}"}
