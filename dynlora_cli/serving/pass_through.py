"""A request goes to the upstream as it came, and the answer comes back as it is written: byte for byte, piece by piece.

    headers     all of them, but those that are about one connection (RFC 9110, 7.6.1); Host is the upstream's
    body        as it is read; nothing is held back or decoded, so an event stream arrives token by token
    hang-up     a client that goes takes its request to the upstream along, at once
    faults      before the answer has begun: 502 or 504 with an error as OpenAI words them; later the connection is cut,
                so that nobody takes half an answer for a whole one

The HTTP client's transport is used without the client around it: that would keep cookies, follow redirects and add
headers of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
from starlette.types import Message, Receive, Scope, Send

from dynlora_cli.errors import without_secrets

Header = tuple[bytes, bytes]
PER_CONNECTION = {
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip
CONNECT_SECONDS = 10.0
# vLLM's and SGLang's own server (uvicorn) ends a connection that is idle for five seconds.
IDLE_SECONDS = 2.0


class UpstreamError(Exception):
    """The upstream did not answer.

    Args:
        status: 502 or 504; 400 where it was not asked.
        code: in a word.
        message: for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def transport() -> httpx2.AsyncHTTPTransport:
    """Connections to the upstream: as many as there are requests, never by way of the environment's proxy."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE_SECONDS)
    return httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)


@dataclass
class PassThrough:
    """The way to the upstream.

    Attributes:
        url: of the upstream, without a path.
        transport: its connections.
        seconds: without a byte of the answer after which the upstream is given up.
        key: that the upstream asks for. The proxy's own questions have it; a client's request only where the proxy asks
            for a key itself, since else it would let in whoever reaches the proxy.
        keeps_key: the proxy asks for a key itself: a client's Authorization is for it, and goes no further.
        log: takes a line.
    """

    url: httpx2.URL
    transport: httpx2.AsyncBaseTransport
    seconds: float = 600.0
    key: str | None = None
    keeps_key: bool = False
    log: Callable[[str], None] = lambda line: None  # noqa: ARG005

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, body: bytes | None = None, more: Iterable[Header] = ()
    ) -> None:
        """Pass a request on, and its answer back.

        Args:
            scope, receive, send: of the request, as ASGI has them.
            body: of the request where it was read already; None: it goes on as it comes.
            more: headers for the answer, errors too.
        """
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        async with anyio.create_task_group() as group:
            writer, reader = anyio.create_memory_object_stream[bytes](0)
            is_read = body is not None or not _has_body(scope)
            group.start_soon(_client, receive, writer, is_read, group.cancel_scope)
            try:
                with reader:
                    content = (body or b"") if is_read else _pieces(reader)
                    await self._exchange(scope, content, answer, list(more))
            except UpstreamError as error:
                self.log(" ".join(f"{scope['method']} {scope['path']}: {error.message}".split()))
                if not begun:
                    await send_error(send, error.status, error.message, error.code, more)
            group.cancel_scope.cancel()

    async def get(self, path: str, client: Iterable[Header] | None = None) -> httpx2.Response:
        """Ask the upstream something; the whole answer.

        Args:
            path: what.
            client: headers of the client that it is for; None: it is for the proxy itself.

        Raises:
            UpstreamError: there is no answer.
        """
        headers = self._own_key() if client is None or self.keeps_key else authorization(client)
        response = await self._sent(self._request("GET", path.encode(), headers, b""))
        try:
            await response.aread()
        except httpx2.TransportError as error:
            raise self._fault(error, "broke off its answer") from None
        except httpx2.DecodingError as error:
            message = f"{self._where} has packed its answer at {path} in a way that nobody can open: {error}"
            raise UpstreamError(502, "upstream_broke_off", message) from None
        finally:
            await response.aclose()
        return response

    async def _exchange(
        self, scope: Scope, content: bytes | AsyncIterator[bytes], send: Send, more: list[Header]
    ) -> None:
        path = self._path(scope)
        headers = self._headers(scope["headers"], len(content) if isinstance(content, bytes) else None)
        response = await self._sent(self._request(scope["method"], path, headers, content))
        try:
            answered = [*passed_on(response.headers.raw), *more]
            await send({"type": "http.response.start", "status": response.status_code, "headers": answered})
            async for piece in response.stream:  # type: ignore[union-attr]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx2.TransportError as error:
            raise self._fault(error, "broke off its answer") from None
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    def _path(self, scope: Scope) -> bytes:
        """What is asked for, to the letter.

        Raises:
            UpstreamError: it is no path, or leads out of the part of the upstream's host that is passed on to.
        """
        path: bytes = scope["raw_path"] or scope["path"].encode()
        if not path.startswith(b"/"):
            raise UpstreamError(400, "bad_path", "a request names a path here, which begins with /")
        if self._prefix and ".." in re.split(r"[/\\]", scope["path"]):
            raise UpstreamError(400, "bad_path", "the path leads upwards, out of the upstream's address")
        return path + b"?" + scope["query_string"] if scope["query_string"] else path

    @property
    def _prefix(self) -> bytes:
        return self.url.raw_path.rstrip(b"/")

    def _headers(self, given: Iterable[Header], length: int | None) -> list[Header]:
        """Those that go to the upstream."""
        dropped = {b"host", b"expect"}  # the proxy itself has told the client to go on
        if length is not None:
            dropped.add(b"content-length")
        if self.keeps_key:
            dropped |= {b"authorization", b"x-api-key"}
        headers = [(name, value) for name, value in passed_on(given) if name.lower() not in dropped]
        if self.keeps_key:
            headers += self._own_key()
        if length:
            headers.append((b"content-length", str(length).encode()))
        return headers

    def _own_key(self) -> list[Header]:
        return [(b"authorization", f"Bearer {self.key}".encode())] if self.key else []

    def _request(
        self, method: str, path: bytes, headers: list[Header], content: bytes | AsyncIterator[bytes]
    ) -> httpx2.Request:
        wait = math.inf if self.seconds <= 0 else self.seconds
        read = None if math.isinf(wait) else wait
        times = {"connect": CONNECT_SECONDS, "read": read, "write": read, "pool": CONNECT_SECONDS}
        # As a URL the path would be put in order: a/../b becomes b, and some of its letters others.
        extensions = {"timeout": times, "target": self._prefix + path}
        return httpx2.Request(method, self.url, headers=headers, content=content, extensions=extensions)

    async def _sent(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await self.transport.handle_async_request(request)
        except httpx2.TransportError as error:
            raise self._fault(error, "ended the connection without an answer") from None

    @property
    def _where(self) -> str:
        return f"the upstream {without_secrets(str(self.url)).rstrip('/')}"

    def _fault(self, error: httpx2.TransportError, what: str) -> UpstreamError:
        """A fault of the connection as an answer of ours."""
        where = self._where
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol):
            return UpstreamError(502, "upstream_unreachable", f"{where} cannot be reached: {error or 'no answer'}")
        if isinstance(error, httpx2.TimeoutException):
            return UpstreamError(504, "upstream_timeout", f"{where} was silent for {self.seconds:g} seconds")
        return UpstreamError(502, "upstream_broke_off", f"{where} {what}: {error or type(error).__name__}")


def authorization(headers: Iterable[Header]) -> list[Header]:
    """Those by which a client says who it is."""
    return [(name, value) for name, value in headers if name.lower() in (b"authorization", b"x-api-key")]


def passed_on(headers: Iterable[Header]) -> list[Header]:
    """Headers without those about one connection, which `Connection` may name more of.

    A body that comes in chunks has no other length (RFC 9112, 6.3), so one beside it is a mistake or a trick.
    """
    headers = list(headers)
    named = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    if any(name.lower() == b"transfer-encoding" for name, _ in headers):
        named.add(b"content-length")
    return [(name, value) for name, value in headers if name.lower() not in PER_CONNECTION | named]


async def send_error(send: Send, status: int, message: str, code: str, more: Iterable[Header] = ()) -> None:
    """Answer with an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    await send_json(send, status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, more)


async def send_json(send: Send, status: int, value: Any, more: Iterable[Header] = ()) -> None:
    """Answer with JSON."""
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _has_body(scope: Scope) -> bool:
    return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _pieces(reader: Any) -> AsyncIterator[bytes]:
    async for piece in reader:
        yield piece


async def _client(receive: Receive, writer: Any, is_read: bool, exchange: anyio.CancelScope) -> None:
    """Hand on the request's body as it comes, then wait for the client to hang up: that ends the exchange."""
    async with writer:
        while not is_read:
            message = await receive()
            if message["type"] == "http.disconnect":
                exchange.cancel()
                return
            try:
                await writer.send(message.get("body", b""))
            except anyio.BrokenResourceError:  # the upstream has answered without reading on
                break
            is_read = not message.get("more_body", False)
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.cancel()
