"""A port, and a server on it in a thread of its own.

bind       the port, before anything heavy loads
listening  an ASGI application on it
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from dynlora_cli.errors import DynloraError, MachineError, UsageError

MOST_CONNECTIONS = 1024
SECONDS_IDLE = 75  # for which a connection without a request stays open
SECONDS_TO_LEAVE = 5  # for answers that are on their way to clients when the server ends


@contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """Hold a port; 0: any that is free.

    Raises:
        UsageError: the address is none of this machine, the port is taken, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address: {error}", "for example --host 127.0.0.1") from None
    with socket.socket(family, kind, protocol) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(address)
        except OSError as error:
            raise _unusable(host, port, error) from None
        door.listen(0)  # else another process could still bind, and both would begin to load
        yield door


def _unusable(host: str, port: int, error: OSError) -> DynloraError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} of {host} is in use", "choose another --port; 0 takes any that is free")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"--host {host} is no address of this machine", "for example --host 127.0.0.1")
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} may not be used by this user", "choose a --port of 1024 or more")
    return MachineError(f"--host {host} --port {port}: {error.strerror}")


def address_of(door: socket.socket) -> str:
    """What to type to reach it."""
    host, port = door.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class HttpServer:
    """A server that runs in a thread.

    Args:
        app: answers.
        door: the port.
        date: whether it says the time; not where it passes on another server's answers.
        lifespan: whether the app is told of the beginning and the end.

    Attributes:
        failed: it has ended, and nobody has asked it to.
    """

    def __init__(self, app: ASGIApp, door: socket.socket, *, date: bool = True, lifespan: bool = False) -> None:
        import uvicorn

        from dynlora_cli.serving.heads import Impatient

        config = uvicorn.Config(
            app,
            http=Impatient,
            loop="asyncio",
            ws="none",
            lifespan="on" if lifespan else "off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=date,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=SECONDS_IDLE,
            timeout_graceful_shutdown=SECONDS_TO_LEAVE,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([door],), name="http", daemon=True)

    @property
    def failed(self) -> bool:
        return not self._thread.is_alive() and not self._server.should_exit

    def start(self) -> None:
        """Answer from now on.

        Raises:
            DynloraError: it cannot.
        """
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise DynloraError("the HTTP server did not start")

    def stop(self) -> None:
        """Take no new connections, let answers go out, and end."""
        self._server.should_exit = True
        self._thread.join(SECONDS_TO_LEAVE + 5)


@contextmanager
def listening(app: ASGIApp, door: socket.socket, *, date: bool = True, lifespan: bool = False) -> Iterator[HttpServer]:
    """Answer on a port while this lasts; arguments as above."""
    server = HttpServer(app, door, date=date, lifespan=lifespan)
    server.start()
    try:
        yield server
    finally:
        server.stop()
