"""A server in this process, on a real port, with an engine that a test brings."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from dynlora_cli.serving.access import Guard
from dynlora_cli.serving.app import State, make_app
from dynlora_cli.serving.listen import address_of, bind, listening
from dynlora_cli.serving.metrics import Metrics
from dynlora_cli.serving.worker import Worker


@dataclass
class Server:
    """A server that runs, and its parts."""

    url: str
    worker: Worker
    engine: Any
    key: str
    said: list[str] = field(default_factory=list)
    clients: list[OpenAI] = field(default_factory=list)

    def client(self) -> OpenAI:
        """A client, closed with the server at the latest."""
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0))
        return self.clients[-1]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of an answer; a body is POSTed, bytes as they are."""
        own = {"Content-Type": "application/json"} if body is not None else {}
        own |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, own | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, _read(answer), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _read(error), dict(error.headers)

    def metric(self, line: str) -> float:
        """The number behind a line of /metrics; 0 where it has none."""
        lines = self.ask("/metrics")[1].splitlines()
        return next((float(found.rpartition(" ")[2]) for found in lines if found.startswith(f"{line} ")), 0.0)

    def until(self, true: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it has not come to be"
            time.sleep(0.01)

    def raw(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)


def _read(answer: Any) -> Any:
    content = answer.read().decode()
    return json.loads(content) if "json" in answer.headers.get("content-type", "") else content


@contextmanager
def serving(
    engine: Any,
    *,
    max_queue: int = 64,
    max_batch: int = 8,
    timeout: float = 20.0,
    key: str = "",
    library: Path | None = None,
    **guard: Any,
) -> Iterator[Server]:
    """Serve while this lasts."""
    said: list[str] = []
    known = lambda: [engine.base_name, "base", "auto", *engine.names]  # noqa: E731
    metrics = Metrics(known, lambda: worker.waiting, lambda: worker.running, said.append)
    worker = Worker(engine, max_queue=max_queue, max_batch=max_batch, tally=metrics)
    app = Guard(make_app(State(engine, worker, metrics, timeout, library)), keys=[key] if key else [], **guard)
    ended = threading.Event()
    thread = threading.Thread(target=worker.run, args=(ended.is_set,), daemon=True)
    with bind("127.0.0.1", 0) as door, listening(app, door):
        thread.start()
        server = Server(address_of(door), worker, engine, key, said)
        try:
            yield server
        finally:
            for client in server.clients:
                client.close()
            ended.set()
            thread.join(10)
            assert not thread.is_alive()
