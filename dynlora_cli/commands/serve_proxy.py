"""`dynlora serve --upstream`: a proxy that routes, until somebody stops it. `run` is the table of contents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from dynlora_cli.config.mix import AUTO
from dynlora_cli.config.options import given
from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.execution.interrupt import interruptible
from dynlora_cli.library.activation import Decision
from dynlora_cli.library.library import Library
from dynlora_cli.library.loaded import refuse_empty
from dynlora_cli.models.quiet import quiet
from dynlora_cli.routing.light import light_context
from dynlora_cli.routing.router import Asked, default_router, open_router, unit_of
from dynlora_cli.serving.access import Guard
from dynlora_cli.serving.choosing import Chooser, Decide, possible
from dynlora_cli.serving.listen import address_of, bind, listening
from dynlora_cli.serving.pass_through import PassThrough, UpstreamError, transport
from dynlora_cli.serving.proxy import Proxy, describe, getter
from dynlora_cli.serving.upstreams import UNTOLD, CannotError, Upstream, ask

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a person says of a proxy.

    Attributes:
        upstream: its address.
        library: whose keys and calibration decide.
        router: by name; None: the library's default.
        options: of the router, KEY=VALUE each.
        kind: of the upstream, or `auto`: as it says itself.
        upstream_key: that the upstream asks for: for the proxy's own questions and, where `keys` has any, for clients.
        host, port: where the proxy answers; port 0: any that is free.
        keys: any of them opens; none: only this machine may ask, and what clients send as a key goes on.
        timeout: seconds without a byte from the upstream after which it is given up.
    """

    upstream: str
    library: Path
    router: str | None = None
    options: Sequence[str] = ()
    kind: str = UNTOLD
    upstream_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    timeout: float = 300.0


@quiet
def run(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Route and pass on until Ctrl-C or SIGTERM.

    Args:
        wanted: what the person says.
        tell: takes a line for people.

    Returns:
        Where it answered.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
        DynloraError: with the exit code that fits.
    """
    began = time.monotonic()
    url = address(wanted.upstream)
    library, name, options = _chosen(wanted, tell)
    names = [entry.name for entry in library.entries]
    with bind(wanted.host, wanted.port) as door:
        where = address_of(door)
        upstream = asyncio.run(_ask(_through(wanted, url, tell), names, wanted.kind))
        tell(f"the upstream is {describe(upstream, names)}")
        decide, notes = _router(wanted.library, name, options)
        _refuse_impossible(name, decide, upstream)
        for note in [*upstream.notes, *notes]:
            tell(f"note: {note}")
        proxy = Proxy(_through(wanted, url, tell), upstream, names, Chooser(decide), tell)
        app = Guard(proxy, wanted.keys, largest_body=None, json_only=False)
        with interruptible() as stop, listening(app, door, date=False, lifespan=True) as server:
            tell(f"answers at {where}/v1, model `{AUTO}` by the router {name}; Ctrl-C ends it")
            while not (stop() or server.failed):
                time.sleep(0.1)
    if server.failed:
        raise DynloraError("the HTTP server has ended by itself", "look at what it said above")
    if stop.by_keyboard:
        raise KeyboardInterrupt
    found = {"kind": upstream.kind, "base": upstream.base, "adapters": sorted(upstream.has)}
    return {"ok": True, "url": where, "upstream": found, "router": name, "seconds": time.monotonic() - began}


def address(text: str) -> httpx2.URL:
    """The upstream's address, without the /v1 that clients are given.

    Raises:
        UsageError: it is no such address.
    """
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UsageError(f"--upstream {text}: {error}", "for example http://127.0.0.1:8000") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError(f"--upstream {text} is no address of a server", "for example http://127.0.0.1:8000")
    if url.userinfo:
        raise UsageError("--upstream holds a name or a password", "set DYNLORA_UPSTREAM_API_KEY instead")
    return url.copy_with(raw_path=url.raw_path.rstrip(b"/").removesuffix(b"/v1") or b"/")


def _chosen(wanted: Wanted, tell: Tell) -> tuple[Library, str, Any]:
    """The library, the router's name and its options; nothing heavy loads.

    Raises:
        UsageError: one of them is not to be had, or the router decides inside the model.
    """
    library = Library.open(wanted.library)
    refuse_empty(library)
    usual, why = default_router(library)
    name = wanted.router or usual
    if unit_of(name) == "token":
        raise UsageError(
            f"the router {name} decides on every token, inside the model, and a proxy sees the request alone",
            "leave --router out, or serve the model here: dynlora serve without --upstream",
        )
    if why and wanted.router is None:
        tell(f"note: {why}")
    return library, name, given("routers", name, wanted.options)


def _through(wanted: Wanted, url: httpx2.URL, tell: Tell) -> PassThrough:
    """A way to the upstream, with connections of its own: they belong to one event loop."""
    keeps = bool(wanted.keys)  # then what a client sends as its key is the proxy's
    return PassThrough(url, transport(), wanted.timeout, wanted.upstream_key, keeps, tell)


async def _ask(through: PassThrough, names: Sequence[str], kind: str) -> Upstream:
    """What the upstream is.

    Raises:
        MachineError: it cannot be reached.
        DynloraError: it answers something else.
    """
    async with through.transport:
        try:
            return await ask(getter(through), names, kind)
        except UpstreamError as error:
            raise MachineError(error.message, "start it first, and look at its address") from None


def _router(root: Path, name: str, options: Any) -> tuple[Decide, list[str]]:
    """The router in memory, and what it has to say."""
    router = open_router(name, replace(light_context(root, name), options=options))

    def decide(texts: Sequence[str]) -> list[Decision]:
        return router.decide([Asked(text) for text in texts])

    return decide, router.notes


def _refuse_impossible(name: str, decide: Decide, upstream: Upstream) -> None:
    """Check that an upstream can do what a person has fixed for all requests.

    Raises:
        UsageError: it cannot.
    """
    if name != "fixed":
        return
    (decision,) = decide(["?"])
    choice = possible(decision, upstream)
    try:
        if choice.mix != decision.mix:
            raise CannotError(choice.reason)
        upstream.values(choice.mix)
    except CannotError as error:
        raise UsageError(f"the upstream cannot do what the router fixed says: {error}", "choose another mix") from None
