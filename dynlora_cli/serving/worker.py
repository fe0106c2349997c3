"""Waiting requests, and the one thread that answers them: several at once, whatever adapters they want.

    any thread        submit, cancel, call
    the main thread   run: prepare what is new, choose a batch, generate, and again

A batch is of one group (`Engine.group`): the requests that may share a forward pass. Whoever has waited longest decides
on the group, so none starves. A batch pauses where somebody waits: after SLICE_TO_JOIN tokens where there is room in
it, after SLICE_TO_YIELD for another group. What was paused goes on from its tokens (no cache outlives a batch, so
nothing of one request is there for another), and stands behind those who wait.

The engine runs in the main thread, since what others wrote (chat templates) is stopped by the clock's signal there.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from dynlora_cli.config.mix import AUTO
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.serving.jobs import Errand, Failed, Finished, Job, Piece, Prepared, Tally
from dynlora_cli.serving.refusals import Refusal, in_words, no_model, stopping

if TYPE_CHECKING:
    from dynlora_cli.generation.engine import Answer, Engine, Request, Use

SLICE_TO_JOIN, SLICE_TO_YIELD = 16, 64  # tokens; to go on costs reading prompt and tokens again
SECONDS_TO_PREPARE = 0.5  # in which new prompts become tokens while others wait for a batch
IDLE = 0.2  # seconds between two looks at whether to stop
T = TypeVar("T")


class Worker:
    """Answers jobs with an engine.

    Args:
        engine: the base and its adapters.
        max_queue: jobs that may wait; what comes then is refused.
        max_batch: jobs that are answered at once.
        tally: counts.
    """

    def __init__(self, engine: Engine, *, max_queue: int, max_batch: int, tally: Tally | None = None) -> None:
        self.engine, self.max_queue, self.max_batch = engine, max_queue, max_batch
        self.tally = tally or Tally()
        self._changed = threading.Condition()
        self._turns = itertools.count(1)
        self._new: deque[Job] = deque()  # not yet tokens
        self._ready: list[Job] = []  # waiting for a batch; those that were paused too
        self._running: list[Job] = []
        self._calls: deque[Errand] = deque()
        self._leaving: set[str] = set()
        self._stopping = False
        self._stop: Callable[[], bool] = lambda: False
        self._grace = self._last_moment = 0.0

    # -- any thread --------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        with self._changed:
            return len(self._new) + sum(not job.begun for job in self._ready)

    @property
    def running(self) -> int:
        """Jobs of the batch that is being written, and those that have begun and wait for their next turn."""
        with self._changed:
            return len(self._running) + sum(job.begun for job in self._ready)

    @property
    def leaving(self) -> frozenset[str]:
        """Adapters that go once the requests for them are answered."""
        with self._changed:
            return frozenset(self._leaving)

    @property
    def stopping(self) -> bool:
        """Whether nothing new is taken."""
        return self._stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn, all or none of them.

        Raises:
            Refusal: the queue is full, the server is stopping, or an adapter is being unloaded.
        """
        with self._changed:
            if self._stopping:
                raise stopping()
            if leaving := sorted({name for job in jobs for name in job.names} & self._leaving):
                raise _left(leaving[0])
            waiting = self.waiting
            if waiting + len(jobs) > self.max_queue:
                raise Refusal(
                    429,
                    f"{waiting} requests are waiting, and at most {self.max_queue} may: try again later",
                    code="queue_full",
                    retry_after=1 + waiting // self.max_batch,
                )
            for job in jobs:
                job.turn = next(self._turns)
            self._new.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these jobs any more; one that is being written ends at its next token."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._new:
                    self._new.remove(job)
                elif job in self._ready:
                    self._ready.remove(job)
            self._changed.notify_all()

    def call(self, do: Callable[[], T], *, free_of: str | None = None) -> Future[T]:
        """Have something done with the engine, in its thread, between two batches.

        Args:
            do: what.
            free_of: an adapter that is to go: new requests for it are refused from now on, and `do` waits until those
                that have been taken are answered.

        Raises:
            Refusal: the server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise stopping()
            result: Future[T] = Future()
            self._calls.append(Errand(do, free_of, result))
            if free_of is not None:
                self._leaving.add(free_of)
            self._changed.notify_all()
        return result

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool], *, grace: float = 0.0) -> None:
        """Answer, until asked to stop; what was taken is answered then, nothing new is taken.

        Args:
            stop: asked between batches, and several times a second where there is nothing to do.
            grace: seconds in which what was taken must be answered after that.
        """
        self._stop, self._grace = stop, grace
        try:
            while not self._is_done():
                self._do_calls()
                self._prepare()
                batch = self._choose()
                if batch:
                    self._answer(batch)
                else:
                    with self._changed:
                        if not (self._new or self._ready or self._can_call()):
                            self._changed.wait(IDLE)
        finally:
            self._end()

    def _is_over(self) -> bool:
        """Take nothing new once a stop is asked, and say whether the time for the rest is over. Asked at each token."""
        if not self._stopping and self._stop():
            with self._changed:
                self._stopping, self._last_moment = True, time.monotonic() + self._grace
        return self._stopping and time.monotonic() > self._last_moment

    def _is_done(self) -> bool:
        """Whether a stop is asked, and all is answered or the time is over."""
        if self._is_over():
            return True
        with self._changed:
            return self._stopping and not (self._new or self._ready or self._calls)

    def _end(self) -> None:
        """Let nobody wait for ever."""
        with self._changed:
            self._stopping = True
            left = [*self._new, *self._ready, *self._running]
            self._new.clear()
            self._ready, self._running = [], []
            calls = list(self._calls)
            self._calls.clear()
        for job in left:
            job.listener(Failed(stopping()))
        for call in calls:
            call.result.set_exception(stopping())

    def _can_call(self) -> bool:
        return any(call.free_of is None or not self._in_use(call.free_of) for call in self._calls)

    def _in_use(self, name: str) -> bool:
        return any(name in job.names for job in [*self._new, *self._ready, *self._running])

    def _do_calls(self) -> None:
        with self._changed:
            due = [call for call in self._calls if call.free_of is None or not self._in_use(call.free_of)]
            for call in due:
                self._calls.remove(call)
        for call in due:
            if not call.result.set_running_or_notify_cancel():
                continue
            try:
                call.result.set_result(call.do())
            except Exception as error:
                call.result.set_exception(error)
            finally:
                self._leaving.discard(call.free_of or "")

    def _prepare(self) -> None:
        """Make tokens of what is new, but of two batches at most: a flood must not keep the others waiting."""
        began = time.monotonic()
        for _ in range(2 * self.max_batch):
            with self._changed:
                if not self._new or (self._ready and time.monotonic() - began > SECONDS_TO_PREPARE):
                    return
                job = self._new[0]
            try:
                request = self.engine.request(self._use(job), job.content, job.sampling, raw=job.raw, **job.more)
                if gone := sorted((set(request.mix) - job.names) & self._leaving):
                    message = f"the router's choice, {gone[0]!r}, is being unloaded"
                    raise Refusal(503, message, code="adapter_unloading", retry_after=1)
                job.names |= set(request.mix)
                job.request, job.group = request, self.engine.group(request)
            except Exception as error:
                self._take_out(job)
                job.listener(Failed(self._refusal(error)))
                continue
            if self._take_out(job, and_wait=True):
                job.listener(Prepared(request))

    def _use(self, job: Job) -> Use:
        try:
            return self.engine.use(job.use)
        except UsageError as error:
            if job.use == AUTO and self.engine.router:  # the model is there, and what decides cannot be opened
                self.tally.fault(error)
                raise Refusal(503, f"auto cannot be decided: {in_words(error)}", code="router_unavailable") from None
            raise no_model(in_words(error)) from None

    def _take_out(self, job: Job, *, and_wait: bool = False) -> bool:
        """Take a job from the new ones; False where it was cancelled meanwhile."""
        with self._changed:
            if job.cancelled or job not in self._new:
                return False
            self._new.remove(job)
            if and_wait:
                self._ready.append(job)
            return True

    def _choose(self) -> list[Job]:
        """The next batch: whoever has waited longest, and those that can share it."""
        with self._changed:
            self._ready.sort(key=lambda job: job.turn)
            if not self._ready:
                return []
            first = self._ready[0]
            fitting = [job for job in self._ready if job.group == first.group and not (job.alone or first.alone)]
            batch = fitting[: self.max_batch] or [first]
            self._ready = [job for job in self._ready if job not in batch]
            self._running = batch
            return batch

    def _answer(self, batch: list[Job]) -> None:
        """Write on a batch, to its end or to a pause."""
        self.tally.batch(len(batch))
        watch = _Watch(self, batch)
        try:
            answers = self.engine.generate(
                [job.ready for job in batch],
                on_piece=watch.piece,
                on_done=watch.done,
                cancelled=lambda row: batch[row].cancelled or self._is_over(),
                paused=watch.pause,
            )
        except Exception as error:
            self._failed(watch, error)
        else:
            for row, answer in enumerate(answers):
                if answer.finish_reason == "paused":
                    self._put_back(batch[row], replace(batch[row].ready, state=answer.state))
                else:
                    watch.done(row, answer)
        with self._changed:
            self._running = []

    def _put_back(self, job: Job, request: Request) -> None:
        with self._changed:
            job.request, job.turn = request, next(self._turns)
            if not job.cancelled:
                self._ready.append(job)

    def _failed(self, watch: _Watch, error: Exception) -> None:
        """A batch broke, mostly at its first step: each row that it has given nothing of is tried again, alone.

        So a request that breaks the model breaks no other. What a row was given before, in another batch, still holds.
        """
        refusal = self._refusal(error)
        for row, job in enumerate(watch.batch):
            if row in watch.ended:
                continue
            if len(watch.batch) > 1 and row not in watch.given:
                job.alone = True
                self._put_back(job, job.ready)
            else:
                job.listener(Failed(refusal))

    def _refusal(self, error: Exception) -> Refusal:
        """An error as the client may see it: what nobody has foreseen may hold anything, so its text stays here."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, MachineError) or type(error).__name__ == "OutOfMemoryError":
            self.tally.fault(error)
            return Refusal(503, "the server lacks the memory for this", code="out_of_memory", retry_after=10)
        if isinstance(error, UsageError):
            return Refusal(400, in_words(error), code="invalid_request")
        self.tally.fault(error)
        return Refusal(500, "a fault of the server; its log says more", code="internal_error")


class _Watch:
    """Listens to a batch while it is written, and says when to pause.

    Args:
        worker: whose it is.
        batch: the jobs, in the order of the rows.
    """

    def __init__(self, worker: Worker, batch: list[Job]) -> None:
        self.worker, self.batch = worker, batch
        self.ended: set[int] = set()
        self.given: set[int] = set()  # rows of which there was some text
        self._steps = 0
        self._began = self._read = time.monotonic()  # and when the prompts were read

    def piece(self, row: int, text: str) -> None:
        """Some text of a row has come."""
        job = self.batch[row]
        if text and not job.cancelled:
            job.begun = True
            self.given.add(row)
            job.listener(Piece(text))

    def done(self, row: int, answer: Answer) -> None:
        """A row is complete, perhaps before the others are."""
        if row not in self.ended:
            self.ended.add(row)
            job = self.batch[row]
            if job.cancelled:
                return
            if answer.finish_reason == "cancelled":  # not by its client: the server has no more time
                job.listener(Failed(stopping()))
            elif answer.finish_reason == "failed":
                job.listener(
                    Failed(Refusal(500, "the model's numbers for this request are not finite", code="not_finite"))
                )
            else:
                job.listener(Finished(answer))

    def pause(self) -> bool:
        """Asked after each token."""
        self._steps += 1
        worker, now = self.worker, time.monotonic()
        if self._steps == 1:
            self._read = now
        # To go on, prompts are read again: of long ones that costs more than many tokens.
        if self._steps < SLICE_TO_JOIN or now - self._read < self._read - self._began:
            return False
        with worker._changed:
            if worker._calls and worker._can_call():
                return True
            others = [job.group for job in worker._ready]
            gone = sum(row in self.ended or job.cancelled for row, job in enumerate(self.batch))
            if len(self.batch) - gone < worker.max_batch and (worker._new or self.batch[0].group in others):
                return True
            late = self._steps >= SLICE_TO_YIELD
            return late and bool(worker._new or any(group != self.batch[0].group for group in others))


def _left(name: str) -> Refusal:
    return Refusal(404, f"the adapter {name!r} is being unloaded", code="model_not_found", param="model")
