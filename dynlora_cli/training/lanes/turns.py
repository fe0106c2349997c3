"""Runs that take turns: each is a thread, and exactly one of them computes at any time.

A thread is used as a coroutine here, so that a run's walk needs to know nothing of the others: it stands still in the
middle of a step, deep inside its own calls, until the pass for all is made. While it waits, torch's random numbers are
not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import Interrupted
from dynlora_cli.execution.interrupt import Stop, ask_here, interruptible
from dynlora_cli.training.lanes.base import SharedBase
from dynlora_cli.training.lanes.joint import Asked, Joint

if TYPE_CHECKING:
    from torch import Tensor

    from dynlora_cli.data.batches import Batch
    from dynlora_cli.training.run import Run

BESIDE = "trained side by side with other runs: seconds and tokens per second are of a clock that ran for all of them"
NOT_BEGUN = "interrupted before it began"


class Lane:
    """The place of one run among others.

    Args:
        number: of the run, from 0.
        base: for all runs.
        walk: trains the run, and is given this object: it takes the base from `load_base`, and calls `join` before the
            first step.

    Attributes:
        asked: what the run waits for; None: nothing, it has not begun, or it has ended.
        run: once it has joined.
        result: what `walk` returned, or what it raised.
        ended: nothing more will come.
    """

    def __init__(self, number: int, base: SharedBase, walk: Callable[[Lane], Any]) -> None:
        self.number, self.load_base = number, base.load
        self.asked: Asked | None = None
        self.run: Run | None = None
        self.result: Any = None
        self.ended = self._begun = self._at_work = False
        self._walk = walk
        self._stop: Stop | None = None
        self._answer: Tensor | BaseException | None = None
        self._turn, self._over = Semaphore(0), Semaphore(0)

    # -- called by the run, in its thread -----------------------------------------------------------------------------

    def join(self, run: Run) -> None:
        """The gradients of this run are computed beside those of others from now on."""
        self.run, run.pass_back = run, self._pass_back
        run.data.notes.append(BESIDE)

    def _pass_back(self, run: Run, batch: Batch, supervised: float) -> Tensor:
        """As `step.backward`, when it is this run's turn again."""
        self.asked = Asked(self.number, run, batch, supervised)
        with run.random.exchanged():
            self._over.release()
            self._turn.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        assert answer is not None
        if self._stop is not None and self._stop():
            ask_here()
        return answer

    def _live(self) -> None:
        try:
            self.result = self._walk(self)
        except BaseException as error:
            self.result = error
        finally:
            self.ended, self.run = True, None
            self._over.release()

    # -- called by whoever leads the runs -----------------------------------------------------------------------------

    def go_on(self, stop: Stop, answer: Tensor | BaseException | None = None) -> None:
        """Let the run compute until it asks for the next gradient, or ends; `answer` is to what it asked last."""
        self._stop, self._answer, self.asked = stop, answer, None
        if stop() and not self._begun:
            self.ended, self.result = True, Interrupted(NOT_BEGUN, "go on with --resume")
            return
        self._at_work = True
        if self._begun:
            self._turn.release()
        else:
            self._begun = True
            Thread(target=self._live, daemon=True).start()
        self._wait()

    def _wait(self) -> None:
        self._over.acquire()
        self._at_work = False

    def leave(self, stop: Stop) -> None:
        """End the run where it stands, as a second Ctrl-C does."""
        if self._at_work:
            self._wait()
        if self._begun and not self.ended:
            self.go_on(stop, KeyboardInterrupt())


def walk_together(lanes: Sequence[Lane], base: SharedBase) -> None:
    """Let all runs walk to their ends; Ctrl-C asks each of them to stop after its step.

    Raises:
        KeyboardInterrupt: a second Ctrl-C; every run has ended where it stood.
    """
    joint: Joint | None = None
    with interruptible() as stop:
        try:
            answers: dict[int, Any] = {}
            while going := [lane for lane in lanes if not lane.ended]:
                for lane in going:
                    lane.go_on(stop, answers.pop(lane.number, None))
                asked = [lane.asked for lane in going if lane.asked]
                if asked:
                    joint = joint or Joint(base.model(), {each.lane: each.run for each in asked})
                    joint.keep({each.lane for each in asked})
                    given = joint.answer(asked)
                    answers = {each.lane: answer for each, answer in zip(asked, given, strict=True)}
        except BaseException:
            for lane in lanes:
                lane.leave(stop)
            raise
        finally:
            if joint is not None:
                joint.close()
