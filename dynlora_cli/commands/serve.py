"""`dynlora serve`: answers over HTTP until somebody stops it. `run` is the table of contents."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynlora_cli.config.mix import AUTO, BASE
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.execution.interrupt import Stop, interruptible
from dynlora_cli.generation import engine as engines
from dynlora_cli.models.quiet import quiet
from dynlora_cli.serving.access import Guard
from dynlora_cli.serving.app import State, make_app
from dynlora_cli.serving.listen import HttpServer, address_of, bind, listening
from dynlora_cli.serving.metrics import Metrics
from dynlora_cli.serving.worker import Worker
from dynlora_cli.text import counted

Tell = Callable[[str], None]
GRACE = 30.0  # seconds for what was taken before the stop
MOST_NOTES = 100


@dataclass(frozen=True)
class Wanted:
    """What a person says of a server.

    Attributes:
        engine: base, adapters, library and router.
        host, port: where it answers; port 0: any that is free.
        keys: any of them opens; none: only this machine may ask.
        allow_loading: adapters of the library may be loaded and unloaded over HTTP.
        max_batch: answers that are written at once.
        max_queue: answers that may wait for that.
        timeout: seconds that a request may take.
    """

    engine: engines.Wanted
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    allow_loading: bool = False
    max_batch: int = 16
    max_queue: int = 128
    timeout: float = 300.0


@quiet
def run(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM; what was taken is answered then.

    Args:
        wanted: what the person says.
        tell: takes a line for people.

    Returns:
        How many requests were answered.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
        DynloraError: with the exit code that fits.
    """
    began = time.monotonic()
    with bind(wanted.host, wanted.port) as door, engines.Engine.open(wanted.engine, tell) as engine:
        address = address_of(door)
        state = _state(wanted, engine, tell)
        app = Guard(make_app(state), wanted.keys)
        with interruptible() as stop, listening(app, door) as server:
            turn = _Turn(stop, server, state.worker, engine, tell)
            turn.tell_notes()
            tell(f"answers at {address}/v1; Ctrl-C ends it")
            state.worker.run(turn, grace=GRACE)
    if server.failed:
        raise DynloraError("the HTTP server has ended by itself", "look at what it said above")
    if stop.by_keyboard:
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    return {"ok": True, "url": address, "answered": state.metrics.answered, "seconds": seconds}


def _state(wanted: Wanted, engine: engines.Engine, tell: Tell) -> State:
    """What the server's addresses share."""
    metrics = Metrics(
        known=lambda: [engine.base_name, BASE, AUTO, *engine.names],
        waiting=lambda: worker.waiting,
        running=lambda: worker.running,
        tell=tell,
    )
    worker = Worker(engine, max_queue=wanted.max_queue, max_batch=wanted.max_batch, tally=metrics)
    library = wanted.engine.library if wanted.allow_loading else None
    roots = {name: str(engine.adapter(name).folder) for name in engine.names}
    return State(engine, worker, metrics, wanted.timeout, library, roots, auto=_can_route(wanted, engine, tell))


def _can_route(wanted: Wanted, engine: engines.Engine, tell: Tell) -> bool:
    """Whether `auto` can be asked for; the router is opened now, and not on somebody's first request.

    Raises:
        UsageError: a router is named, and cannot be opened.
    """
    try:
        engine.use(AUTO)
    except UsageError as error:
        if wanted.engine.router:
            raise
        if engine.names:
            tell(f"note: auto cannot be asked for: {error.message}")
        return False
    return True


class _Turn:
    """Asked in each turn of the worker whether to end; tells people what has come up meanwhile.

    Args:
        stop: whether somebody has asked for the end.
        server: it may have ended by itself.
        worker, engine: have something to tell.
        tell: takes a line.
    """

    def __init__(self, stop: Stop, server: HttpServer, worker: Worker, engine: engines.Engine, tell: Tell) -> None:
        self._stop, self._server, self._worker, self._engine, self._tell = stop, server, worker, engine, tell
        self._said = False
        self._told: set[str] = set()

    def __call__(self) -> bool:
        self.tell_notes()
        if self._stop() and not self._said:
            self._said = True
            if left := self._worker.waiting + self._worker.running:
                self._tell(f"{counted(left, 'answer')} to be written still; once more ends at once")
        return self._stop() or self._server.failed

    def tell_notes(self) -> None:
        """The engine's notes, each once. They come with requests, so neither they nor our memory of them may grow."""
        for note in self._engine.notes:
            if note not in self._told and len(self._told) < MOST_NOTES:
                self._told.add(note)
                self._tell(f"note: {note}")
        self._engine.notes.clear()
