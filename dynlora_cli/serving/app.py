"""The server's addresses, and what happens at each. `make_app` is the table of contents.

A request is checked here, in the event loop, which never waits for the model: jobs go to the worker, whose events come
back through an inbox. Whoever hangs up, or has waited for `timeout` seconds, has their jobs cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dynlora_cli.config.mix import AUTO, BASE
from dynlora_cli.errors import UsageError
from dynlora_cli.library.forms import is_name
from dynlora_cli.serving import openai_forms as forms
from dynlora_cli.serving.answers import CHAT, TEXT, model_card
from dynlora_cli.serving.call import Asked, Call, HungUp, Watched
from dynlora_cli.serving.loading import entry_at
from dynlora_cli.serving.metrics import CONTENT_TYPE_LATEST, GONE, Metrics
from dynlora_cli.serving.refusals import Refusal, in_words, no_model
from dynlora_cli.serving.worker import Worker

if TYPE_CHECKING:
    from dynlora_cli.generation.engine import Engine

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not collect the pieces
Handler = Callable[["State", HttpRequest], Awaitable[Response]]


@dataclass
class State:
    """What the addresses share.

    Attributes:
        engine: names of models; everything else of it belongs to the worker.
        worker: answers.
        metrics: counts.
        timeout: seconds that a request may take.
        library: where adapters may be loaded from; None: none may.
        roots: where each adapter lies.
        auto: whether a router can decide.
        started: when, in seconds since 1970.
    """

    engine: Engine
    worker: Worker
    metrics: Metrics
    timeout: float
    library: Path | None = None
    roots: dict[str, str] = field(default_factory=dict)
    auto: bool = True
    started: int = field(default_factory=lambda: int(time.time()))


def make_app(state: State) -> Starlette:
    """The addresses of a server."""

    def route(path: str, handler: Handler, method: str) -> Route:
        return Route(path, partial(_handle, state, handler), methods=[method])

    return Starlette(
        routes=[
            route("/health", _health, "GET"),
            route("/metrics", _metrics, "GET"),
            route("/v1/models", _models, "GET"),
            route("/v1/models/{name:path}", _model, "GET"),
            route("/v1/chat/completions", _chat, "POST"),
            route("/v1/completions", _complete, "POST"),
            route("/v1/load_lora_adapter", _load, "POST"),
            route("/v1/unload_lora_adapter", _unload, "POST"),
        ],
        exception_handlers={HTTPException: _no_route},
    )


async def _handle(state: State, handler: Handler, request: HttpRequest) -> Response:
    """An answer, whatever happens."""
    try:
        return await handler(state, request)
    except Refusal as refusal:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)
    except HungUp:
        return Response(status_code=GONE)  # nobody reads it
    except Exception as error:
        state.metrics.fault(error)
        return JSONResponse(Refusal(500, "a fault of the server; its log says more", code="internal_error").body, 500)


# -- small ones ------------------------------------------------------------------------------------------------------


async def _health(state: State, _request: HttpRequest) -> Response:
    if state.worker.stopping:
        return JSONResponse({"status": "stopping"}, status_code=503)
    return JSONResponse({"status": "ok"})


async def _metrics(state: State, _request: HttpRequest) -> Response:
    return Response(state.metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _cards(state: State) -> list[dict[str, Any]]:
    engine = state.engine
    card = partial(model_card, created=state.started, length=engine.context)
    cards = [card(engine.base_name, engine.base_name, None)]
    cards += [card(name, state.roots.get(name), engine.base_name) for name in engine.names]
    return cards + ([card(AUTO, None, engine.base_name)] if state.auto else [])


async def _models(state: State, _request: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": _cards(state)})


async def _model(state: State, request: HttpRequest) -> Response:
    name = request.path_params["name"]
    for card in _cards(state):
        if card["id"] == name:
            return JSONResponse(card)
    raise no_model(f"there is no model {name!r}")


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "there is nothing at this address" if error.status_code == 404 else str(error.detail)
    return JSONResponse(
        Refusal(error.status_code, f"{request.method} {request.url.path}: {text}").body, error.status_code
    )


# -- answers ---------------------------------------------------------------------------------------------------------


async def _chat(state: State, request: HttpRequest) -> Response:
    body = forms.read(forms.ChatBody, await request.body())
    return await _answer(state, request, Asked(CHAT, body, [body.turns]))


async def _complete(state: State, request: HttpRequest) -> Response:
    body = forms.read(forms.CompletionBody, await request.body())
    return await _answer(state, request, Asked(TEXT, body, body.prompts))


async def _answer(state: State, request: HttpRequest, asked: Asked) -> Response:
    """Answer: whole, or as a stream that begins once it is known who answers."""
    call = Call(state.engine, state.worker, state.metrics, asked, state.timeout)
    with call.ending():
        call.submit()
        async with Watched(request) as watched:
            await call.known(watched)
            if not asked.body.stream:
                return JSONResponse(await call.whole(watched), headers=call.reply.headers)
        call.goes_on = True
        return _Stream(call)


class _Stream(StreamingResponse):
    """An answer in pieces, as server-sent events.

    Args:
        call: that it answers. It ends with the stream, also where that never began.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call.stream(), media_type="text/event-stream", headers=STREAM_HEADERS | call.reply.headers)
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end(HungUp())  # unless it has ended


# -- loading ---------------------------------------------------------------------------------------------------------


def _may_load(state: State) -> Path:
    if state.library is None:
        raise Refusal(
            403,
            "adapters cannot be loaded: start the server with --library and --allow-loading",
            code="loading_disabled",
        )
    return state.library


async def _load(state: State, request: HttpRequest) -> Response:
    """Load an update of the library, under a name."""
    root = _may_load(state)
    body = forms.read(forms.LoadBody, await request.body())
    name = body.lora_name
    if not name or not body.lora_path:
        raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.", kind="InvalidUserInput")
    if name in (*state.engine.names, state.engine.base_name, BASE, AUTO):
        raise Refusal(400, f"The lora adapter '{name}' has already been loaded.", kind="InvalidUserInput")
    if not is_name(name):
        raise Refusal(400, f"{name[:60]!r} is no name: letters, digits, and . _ - within", param="lora_name")
    try:
        entry = await run_in_threadpool(entry_at, root, body.lora_path)
        await asyncio.wrap_future(state.worker.call(partial(state.engine.add, name, entry.folder)))
    except UsageError as error:
        raise Refusal(400, in_words(error)) from None
    state.roots[name] = str(entry.folder)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def _unload(state: State, request: HttpRequest) -> Response:
    """Take an adapter away, once the requests that it was asked for are answered."""
    _may_load(state)
    body = forms.read(forms.UnloadBody, await request.body())
    name = body.lora_name
    if not name:
        raise Refusal(400, "'lora_name' needs to be provided.", kind="InvalidUserInput")
    missing = Refusal(404, f"The lora adapter '{name}' cannot be found.", kind="NotFoundError")
    if name not in state.engine.names:
        raise missing
    try:
        await asyncio.wrap_future(state.worker.call(partial(state.engine.remove, name), free_of=name))
    except UsageError:  # somebody else was faster
        raise missing from None
    state.roots.pop(name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
