"""A request on its way: its jobs, what has come of them, and how much time is left. All of it in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest

from dynlora_cli.config.mix import AUTO, BASE, parse_mix
from dynlora_cli.errors import UsageError
from dynlora_cli.serving import openai_forms as forms
from dynlora_cli.serving.answers import Reply, Shape, event
from dynlora_cli.serving.jobs import Content, Event, Failed, Finished, Job, Piece, Prepared
from dynlora_cli.serving.metrics import GONE, Metrics
from dynlora_cli.serving.refusals import Refusal, in_words, no_model, too_slow
from dynlora_cli.serving.worker import Worker

if TYPE_CHECKING:
    from dynlora_cli.generation.engine import Engine

SECONDS_OF_SILENCE = 15.0  # after which a stream gets a comment, so that proxies keep it open
SILENCE = b": waiting\n\n"


class HungUp(Exception):  # noqa: N818 - an end, not a fault
    """The client is gone."""


class Watched:
    """A client that may hang up while one waits for something else.

    Args:
        request: whose client; its body was read.
    """

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self._gone: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watched:
        self._gone = asyncio.create_task(self._until_gone())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._gone is not None
        self._gone.cancel()
        with suppress(asyncio.CancelledError):
            await self._gone

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def next(self, inbox: asyncio.Queue[Numbered], seconds: float) -> Numbered | None:
        """What comes into an inbox; None after so many seconds.

        Raises:
            HungUp: the client was gone before.
        """
        assert self._gone is not None
        wanted = asyncio.ensure_future(inbox.get())
        try:
            await asyncio.wait({wanted, self._gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
            if self._gone.done():
                raise HungUp
            return None
        finally:
            wanted.cancel()


@dataclass(frozen=True)
class Asked:
    """What a client has asked.

    Attributes:
        shape: chat or text.
        body: the request.
        contents: conversations or texts, each of which is answered `n` times.
    """

    shape: Shape
    body: forms.ChatBody | forms.CompletionBody
    contents: Sequence[Content]


Numbered = tuple[int, Event]


class Call:
    """A request on its way.

    Args:
        engine: names of models; everything else of it belongs to the worker.
        worker: answers.
        metrics: counts.
        asked: what.
        timeout: seconds that it may take.

    Attributes:
        goes_on: a stream has taken it over.
    """

    def __init__(self, engine: Engine, worker: Worker, metrics: Metrics, asked: Asked, timeout: float) -> None:
        self.engine, self.worker, self.metrics, self.asked, self.timeout = engine, worker, metrics, asked, timeout
        self.began = time.monotonic()
        self.label = metrics.label(asked.body.model)
        self.reply = Reply(asked.shape, asked.body.model, len(asked.contents), asked.body.n or 1, asked.body.tool_names)
        self.jobs: list[Job] = []
        self.goes_on = False
        self._inbox: asyncio.Queue[Numbered] = asyncio.Queue()
        self._early: list[Numbered] = []  # what has come before all prompts were known
        self._shown = self._ended = False

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever happens in this block, the call ends with it, unless a stream goes on."""
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        if not self.goes_on:
            self.end()

    def submit(self) -> None:
        """Let the jobs wait for their turn.

        Raises:
            Refusal: there is no such model, there are too many answers, or the queue is full.
        """
        body, n = self.asked.body, self.reply.n
        use = BASE if body.model == self.engine.base_name else body.model
        try:
            names = [] if use == AUTO else list(parse_mix(use, self.engine.names))
        except UsageError as error:
            raise no_model(in_words(error)) from None
        self.label = self.metrics.label(body.model, is_model=True)
        if n * len(self.asked.contents) > self.worker.max_queue:
            raise Refusal(400, f"n: at most {self.worker.max_queue} answers at once", code="invalid_value", param="n")
        try:
            ways = [forms.sampling(body, choice) for choice in range(n)]
        except UsageError as error:
            raise Refusal(400, in_words(error), code="invalid_value") from None
        raw = not self.asked.shape.is_chat
        self.jobs = [
            Job(use, content, ways[choice], self._listener(number * n + choice), names=names, raw=raw, more=body.more)
            for number, content in enumerate(self.asked.contents)
            for choice in range(n)
        ]
        self.worker.submit(self.jobs)

    def _listener(self, number: int) -> Callable[[Event], None]:
        loop, put = asyncio.get_running_loop(), self._inbox.put_nowait

        def listen(happened: Event) -> None:  # in the worker's thread
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(put, (number, happened))

        return listen

    async def known(self, watched: Watched) -> None:
        """Wait until all prompts are tokens, so that what is wrong with them is answered with the right status.

        Raises:
            Refusal: a job has failed, or the time is over.
            HungUp: the client is gone.
        """
        missing = len(self.jobs)
        while missing:
            number, happened = await self._next(watched)
            if isinstance(happened, Prepared):
                self.reply.prepared(happened.request, number)
                missing -= 1
            else:
                self._early.append((number, happened))

    async def whole(self, watched: Watched) -> dict[str, Any]:
        """The answer, when all of it is there.

        Raises:
            Refusal, HungUp: as above.
        """
        while len(self.reply.answers) < len(self.jobs):
            number, happened = self._early.pop(0) if self._early else await self._next(watched)
            if isinstance(happened, Finished):
                self.reply.answers[number] = happened.answer
        return self.reply.whole()

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer in events. An error in the middle is an event too, and the last one."""
        reply = self.reply
        try:
            if opening := reply.opening():
                yield opening
            while len(reply.answers) < len(self.jobs):
                number, happened = self._early.pop(0) if self._early else await self._next_or_silence()
                if happened is None:
                    yield SILENCE
                elif isinstance(happened, Piece):
                    if piece := reply.piece(number, happened.text):
                        yield piece
                elif isinstance(happened, Finished):
                    reply.answers[number] = happened.answer
                    yield reply.end(number)
            yield reply.closing(with_usage=self.asked.body.with_usage)
        except Refusal as refusal:
            self.end(refusal)
            yield event(refusal.body)
        else:
            self.end()

    async def _next(self, watched: Watched) -> Numbered:
        got = await watched.next(self._inbox, self._left())
        if got is None:
            raise too_slow(self.timeout)
        return self._seen(got)

    async def _next_or_silence(self) -> tuple[int, Event | None]:
        left = self._left()
        try:
            return self._seen(await asyncio.wait_for(self._inbox.get(), min(left, SECONDS_OF_SILENCE)))
        except asyncio.TimeoutError:
            if left > SECONDS_OF_SILENCE:
                return 0, None
            raise too_slow(self.timeout) from None

    def _left(self) -> float:
        return max(0.0, self.began + self.timeout - time.monotonic())

    def _seen(self, got: Numbered) -> Numbered:
        """Look at what has come.

        Raises:
            Refusal: a job has failed.
        """
        if isinstance(got[1], Failed):
            raise got[1].refusal
        if isinstance(got[1], Piece) and not self._shown:
            self._shown = True
            self.metrics.first_text(self.label, time.monotonic() - self.began)
        return got

    def end(self, error: BaseException | None = None) -> None:
        """Whatever has happened: nothing is written for nobody, and it is counted, once."""
        if self._ended:
            return
        self._ended = True
        self.worker.cancel(self.jobs)
        status = 200
        if error is not None:
            status = error.status if isinstance(error, Refusal) else 500
            status = GONE if isinstance(error, (HungUp, asyncio.CancelledError, GeneratorExit)) else status
        else:
            usage = self.reply.usage
            self.metrics.tokens(self.label, usage["prompt_tokens"], usage["completion_tokens"])
        self.metrics.ended(self.label, status, time.monotonic() - self.began)
