"""Who may ask, and how much: an ASGI layer before a server's own routes, which it knows nothing of.

key           `Authorization: Bearer KEY`, compared in constant time; /health alone is open
host          without a key, only a request that was addressed to this very machine: else a web page could ask,
              under a name of its own that leads here (DNS rebinding)
content type  application/json: a browser asks before it sends that to another site, and nobody answers it
size, time    a body is read whole, so far and so long, before anybody looks at it
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynlora_cli.serving.hosts import is_loopback, name_of
from dynlora_cli.serving.refusals import Refusal

OPEN = ("/health",)
LARGEST_BODY = 4 << 20  # bytes: a prompt of a million tokens has as many
DISCARDED = 64 << 20  # of a body that is too large, read so that its sender gets to read the answer
SECONDS_TO_SEND = 30.0


class _HungUp(Exception):  # noqa: N818 - an end, not a fault
    pass


@dataclass(frozen=True)
class Guard:
    """The layer.

    Args:
        app: what is behind it.
        keys: any of them opens; none: the door is open, to this machine.
        largest_body: bytes; None: the body is left to the app.
        seconds: in which a body must have come.
        json_only: refuse bodies of any other type.
    """

    app: ASGIApp
    keys: Sequence[str] = ()
    largest_body: int | None = LARGEST_BODY
    seconds: float = SECONDS_TO_SEND
    json_only: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no websockets
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._admit(scope["path"], headers)
            if self.largest_body is not None:
                receive = _again(await self._body(scope["method"], headers, receive, self.largest_body), receive)
        except Refusal as refusal:
            await refuse(refusal, send)
        except _HungUp:
            return
        else:
            await self.app(scope, receive, send)

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse whoever may not ask.

        Raises:
            Refusal: the key is wrong or missing, or the request is meant for another host.
        """
        if not self.keys:
            if not is_loopback(name_of(headers.get(b"host", b"").decode("latin-1"))):
                raise Refusal(403, "this server answers under the name localhost alone; it needs an API key for others")
        elif path not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            message = "the API key is wrong or missing: send it as `Authorization: Bearer KEY`"
            raise Refusal(401, message, code="invalid_api_key")

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        # Digests are of one length, so that the time tells nothing of the keys' either; all keys are looked at.
        digest = sha256(given.strip()).digest()
        right = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in self.keys]
        return any(right) and scheme.lower() == b"bearer"

    async def _body(self, method: str, headers: dict[bytes, bytes], receive: Receive, largest: int) -> bytes:
        """The body.

        Raises:
            Refusal: it is no JSON, too large, or too slow.
        """
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        is_wrong = self.json_only and method not in ("GET", "HEAD") and kind != b"application/json"
        try:
            body = await asyncio.wait_for(self._read(receive, 0 if is_wrong else largest), self.seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body had not come after {self.seconds:g} s") from None
        if is_wrong:
            raise Refusal(415, "send JSON, with the header `Content-Type: application/json`")
        if body is None:
            raise Refusal(413, f"the body is larger than {largest} bytes", code="request_too_large")
        return body

    async def _read(self, receive: Receive, largest: int) -> bytes | None:
        """The body; None of one that is too large, of which nothing is kept."""
        body, size, more = bytearray(), 0, True
        while more and size <= DISCARDED:
            message = await receive()
            if message["type"] != "http.request":
                raise _HungUp
            part = message.get("body", b"")
            size += len(part)
            if size <= largest:
                body += part
            else:
                body.clear()
            more = message.get("more_body", False)
        return bytes(body) if size <= largest else None


async def refuse(refusal: Refusal, send: Send) -> None:
    """Answer with an error, and close the connection: a body may be on its way still."""
    content = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives out a body that was read already, and then what comes."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
