"""Servers on real sockets for the tests of the proxy: a pretended upstream, and whatever ASGI application one has."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn

from dynlora_cli.library.activation import Decision
from dynlora_cli.serving.choosing import Chooser
from dynlora_cli.serving.pass_through import PassThrough, transport
from dynlora_cli.serving.proxy import Proxy, getter
from dynlora_cli.serving.upstreams import Upstream, ask

WANTED = ["law", "cooking"]
VLLM_CARDS = [
    {"id": "the-base", "object": "model", "owned_by": "vllm", "root": "the-base", "parent": None},
    {"id": "law", "object": "model", "owned_by": "vllm", "root": "/adapters/law", "parent": "the-base"},
    {"id": "cooking", "object": "model", "owned_by": "vllm", "root": "/adapters/cooking", "parent": "the-base"},
]

CHAT = "/v1/chat/completions"


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], **more}


def post(address: str, form: Any, path: str = CHAT, **options: Any) -> httpx2.Response:
    return httpx2.post(address + path, json=form, timeout=10, trust_env=False, **options)


def until(condition: Any, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def listening(app: Any, lifespan: str = "off") -> Iterator[str]:
    """Serve an application from a thread of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = {"log_level": "error", "lifespan": lifespan, "ws": "none"}
        # Setting logging up anew closes the handlers of everybody, and absl's closes its stream: a capture of pytest.
        options |= {"log_config": None, "timeout_graceful_shutdown": 2}
        config = uvicorn.Config(app, server_header=False, date_header=False, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@dataclass
class Received:
    """A request as it came to the upstream."""

    method: str
    path: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def form(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> list[bytes]:
        return [value for each, value in self.headers if each.lower() == name.encode()]


@dataclass
class FakeUpstream:
    """Answers as vLLM does, and records what it gets.

    Attributes:
        cards: of /v1/models.
        received: all requests but those for /v1/models.
        answers: by path, a function that takes (scope, receive, send) after the body was read; else a chat answer.
        hung_up: how many clients have gone before their answer was whole.
    """

    cards: list[dict[str, Any]] = field(default_factory=lambda: list(VLLM_CARDS))
    received: list[Received] = field(default_factory=list)
    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    hung_up: int = 0
    asked_for_models: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if scope["path"] in self.answers:
            self._note(scope, body)
            await self.answers[scope["path"]](scope, receive, send)
        elif scope["path"] == "/v1/models":
            self.asked_for_models += 1
            await reply(send, 200, {"object": "list", "data": self.cards})
        else:
            self._note(scope, body)
            form = json.loads(body) if body.startswith(b"{") else {}
            await reply(send, 200, chat(form.get("model")))

    def _note(self, scope: Any, body: bytes) -> None:
        path = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        self.received.append(Received(scope["method"], path, list(scope["headers"]), body))

    async def events(self, scope: Any, receive: Any, send: Any, pieces: int = 20, pause: float = 0.05) -> None:
        """An event stream, which notes when its client hangs up."""
        gone = asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        watcher = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(pieces):
            if gone.is_set():
                self.hung_up += 1
                return
            await send({"type": "http.response.body", "body": event(f"w{number} "), "more_body": True})
            await asyncio.sleep(pause)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        watcher.cancel()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def event(text: str) -> bytes:
    """One chunk of a streamed chat."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return (
        b"data: " + json.dumps(chat("m") | {"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
    )


def chat(model: Any) -> dict[str, Any]:
    """A whole chat answer that says which model was asked."""
    message = {"role": "assistant", "content": f"I am {model}."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}


async def reply(send: Any, status: int, value: Any, *more: tuple[bytes, bytes]) -> None:
    """Answer with JSON."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def by_word(texts: Any) -> list[Decision]:
    """A router for tests: the adapter whose name stands in the text."""
    found = []
    for text in texts:
        chosen = tuple(name for name in (*WANTED, "gone") if name in text)
        found.append(Decision(chosen, dict.fromkeys(chosen, 0.9), f"{'+'.join(chosen) or 'base'}: by its word"))
    return found


def proxy_of(url: str, *, wanted: Any = WANTED, kind: str = "auto", **options: Any) -> Proxy:
    """A proxy before an upstream, with the router for tests; what it logs is in `lines`."""
    lines: list[str] = []

    def through() -> PassThrough:
        return PassThrough(httpx2.URL(url), transport(), log=lines.append, **options)

    async def asked() -> Upstream:
        way = through()
        async with way.transport:
            return await ask(getter(way), wanted, kind)

    upstream = asyncio.run(asked())
    proxy = Proxy(through(), upstream, wanted, Chooser(by_word), lines.append)
    proxy.lines = lines  # type: ignore[attr-defined]
    return proxy


@contextmanager
def proxied(fake: Any, **options: Any) -> Iterator[tuple[str, Proxy]]:
    """A pretended upstream with a proxy before it; the proxy's address."""
    with listening(fake) as url:
        proxy = proxy_of(url, **options)
        with listening(proxy, "on") as address:
            yield address, proxy
