"""The routing proxy: `model: auto` becomes the adapter that a request is about; all else passes through.

POST with a JSON body whose `model` is `auto`   routed: `model` is rewritten (llama-server: `lora` is added)
GET /v1/models, /v1/models/auto                 the upstream's answer with `auto` in it
anything else                                   as it came
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dynlora_cli.config.mix import AUTO
from dynlora_cli.errors import DynloraError
from dynlora_cli.serving.access import SECONDS_TO_SEND
from dynlora_cli.serving.body import Body, NoTextError
from dynlora_cli.serving.choosing import Choice, Chooser
from dynlora_cli.serving.pass_through import Header, PassThrough, UpstreamError, send_error, send_json
from dynlora_cli.serving.upstreams import CannotError, Upstream, ask

MODELS = "/v1/models"
LARGEST_BODY = 64 << 20  # bytes of a request that is looked into
SOMETIMES_JSON = (b"", b"text/plain", b"application/x-www-form-urlencoded")  # the last is what curl -d says
FRESH_SECONDS = 10.0  # after which the upstream is asked again which adapters it has


@dataclass
class Proxy:
    """The proxy as an ASGI application.

    Attributes:
        through: the way to the upstream.
        upstream: as it last answered.
        wanted: names of the library's adapters.
        chooser: decides.
        log: takes a line.
    """

    through: PassThrough
    upstream: Upstream
    wanted: Sequence[str]
    chooser: Chooser
    log: Callable[[str], None]
    _asked: float = field(default_factory=time.monotonic)
    _asking: anyio.Lock = field(default_factory=anyio.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["method"] == "GET" and scope["path"] in (MODELS, f"{MODELS}/{AUTO}"):
            await self._models(scope, receive, send)
        elif scope["method"] == "POST" and _may_be_json(scope["headers"]):
            await self._post(scope, receive, send)
        else:
            await self.through(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Nothing to begin; in the end the connections to the upstream are closed."""
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await self.through.transport.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raw = await asyncio.wait_for(_whole(receive), SECONDS_TO_SEND)
        except ClientDisconnect:
            return
        except asyncio.TimeoutError:
            await send_error(send, 408, f"the body had not come after {SECONDS_TO_SEND:g} s", "request_too_slow")
            return
        if raw is None:
            await send_error(send, 413, f"the request has more than {LARGEST_BODY >> 20} MiB", "request_too_large")
            return
        body = Body.read(raw)
        if body is None or body.form.get("model") != AUTO:
            await self.through(scope, receive, send, raw)
            return
        try:
            choice, rewritten = await self._routed(body)
        except (NoTextError, CannotError) as error:
            self.log(f"{_asked(scope)}: auto refused: {error}")
            await send_error(send, 400, f"model `auto`: {error}", "cannot_route")
            return
        except (UpstreamError, DynloraError) as error:
            self.log(f"{_asked(scope)}: {error.message}")
            status, code = (error.status, error.code) if isinstance(error, UpstreamError) else (502, "upstream_changed")
            await send_error(send, status, error.message, code)
            return
        except Exception as error:  # of a router: plug-ins may fail in any way, and the next request may go well
            self.log(f"{_asked(scope)}: the router failed: {type(error).__name__}: {error}")
            await send_error(send, 500, "the router failed; the proxy's log says how", "router_failed")
            return
        self.log(f"{_asked(scope)}: auto -> {choice.name} ({choice.reason})")
        await self.through(scope, receive, send, rewritten, _told(choice))

    async def _routed(self, body: Body) -> tuple[Choice, bytes]:
        """What answers a request, and the request for it."""
        upstream = await self._now()
        if own := next((key for key in upstream.own_keys if body.form.get(key)), None):
            raise CannotError(f"{own!r} chooses adapters too: leave out one of the two")
        choice = await self.chooser.choose(body.asked(), upstream)
        unless = {key: value for key, value in upstream.unless_given.items() if key not in body.form}
        return choice, body.edited(upstream.values(choice.mix) | unless)

    async def _now(self) -> Upstream:
        """The upstream as it is now: it may have been started anew with other adapters, under other numbers."""
        async with self._asking:
            if time.monotonic() - self._asked > FRESH_SECONDS:
                found = await ask(getter(self.through), self.wanted, self.upstream.kind)
                if found != self.upstream:
                    self.log(f"the upstream has changed: {describe(found, self.wanted)}")
                self.upstream, self._asked = found, time.monotonic()
            return self.upstream

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The upstream's list with `auto` in it, or `auto` alone."""
        try:
            response = await self.through.get(MODELS, scope["headers"])
        except UpstreamError as error:
            await send_error(send, error.status, error.message, error.code)
            return
        listed = _listed(response.content) if response.status_code == 200 else None
        if listed is None:  # whatever it says, it says it itself
            await self.through(scope, receive, send)
            return
        card = {"id": AUTO, "object": "model", "created": int(time.time()), "owned_by": "dynlora"}
        listed["data"].append(card)
        await send_json(send, 200, listed if scope["path"] == MODELS else card)


def getter(through: PassThrough) -> Callable[[str], Any]:
    """Asks the upstream for JSON; None where it has no such path.

    The function raises DynloraError where it answers something else.
    """

    async def get(path: str) -> Any:
        response = await through.get(path)
        if response.status_code == 404:
            return None
        if response.status_code in (401, 403):
            raise DynloraError(
                f"the upstream asks for a key ({response.status_code} at {path})", "set DYNLORA_UPSTREAM_API_KEY"
            )
        if response.status_code != 200:
            raise DynloraError(f"the upstream answers {response.status_code} at {path}", "look at what it says itself")
        try:
            return json.loads(response.content)
        except ValueError:
            raise DynloraError(f"the upstream answers no JSON at {path}", "is this the address of a model?") from None

    return get


def describe(upstream: Upstream, wanted: Sequence[str]) -> str:
    """What was found, in a line."""
    missing = [name for name in wanted if name not in upstream.has]
    has = ", ".join(upstream.has) or "no adapter of the library"
    lacks = f"; it lacks {', '.join(missing)}, which no request is sent to" if missing else ""
    return f"{upstream.kind} with the base {upstream.base} and {has}{lacks}"


def _listed(content: bytes) -> dict[str, Any] | None:
    try:
        listed = json.loads(content)
    except ValueError:
        return None
    return listed if isinstance(listed, dict) and isinstance(listed.get("data"), list) else None


def _may_be_json(headers: Sequence[Header]) -> bool:
    """Whether a body is worth a look: it says that it is JSON, or what clients send that forget to say so."""
    told = {name.lower(): value.lower() for name, value in headers}
    kind = told.get(b"content-type", b"").partition(b";")[0].strip()
    return b"content-encoding" not in told and (kind in SOMETIMES_JSON or kind.endswith(b"json"))


def _asked(scope: Scope) -> str:
    """Method and path on one line, whatever a client has put into the path."""
    return " ".join(f"{scope['method']} {scope['path']}".split())


def _told(choice: Choice) -> list[Header]:
    """The decision as headers of the answer: ASCII, one line."""
    reason = " ".join(choice.reason.split()).encode("ascii", "backslashreplace")[:1000]
    return [(b"x-dynlora-model", choice.name.encode("ascii", "backslashreplace")), (b"x-dynlora-decision", reason)]


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request; None where it is too large.

    Raises:
        ClientDisconnect: nobody is there for an answer.
    """
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(pieces)
