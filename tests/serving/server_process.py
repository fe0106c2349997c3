"""`dynlora serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from openai import AsyncOpenAI, OpenAI


class ServerProcess:
    """A server that was started as a person would.

    Attributes:
        url: where it answers, once it does.
        said: the lines of its stderr.
    """

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "dynlora_cli", "serve", *map(str, arguments), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.said: list[str] = []
        self._clients: list[OpenAI] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(120), self.said
        found = [match for line in self.said if (match := re.search(r"answers at (http://\S+)/v1", line))]
        assert found, self.said
        self.url = found[0][1]

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if "answers at" in line:
                self._ready.set()
        self._ready.set()

    def client(self, key: str = "none") -> OpenAI:
        """A client, closed with the server at the latest."""
        self._clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60))
        return self._clients[-1]

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, line: str) -> float:
        """The number behind a line of /metrics; 0 where it has none."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return next((float(found.rpartition(" ")[2]) for found in lines if found.startswith(f"{line} ")), 0.0)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def end(self, number: int) -> tuple[int, dict[str, Any]]:
        """Send a signal; its exit code and what it printed."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, dict[str, Any]]:
        code = self.process.wait(60)
        self._reader.join(10)
        with self.process.stdout as out:
            printed = json.loads(out.read())
        self.process.stderr.close()
        return code, printed


@contextmanager
def server_process(*arguments: object, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    server = ServerProcess(*arguments, environment=environment)
    try:
        yield server
    finally:
        for client in server._clients:
            client.close()
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)
            server.process.stdout.close()
            server._reader.join(10)
            server.process.stderr.close()
