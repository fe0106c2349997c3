"""`auto`: a router decides on each request which adapters answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.config import options
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.opening import Opened, Wanted
from dynlora_cli.library.activation import Decision
from dynlora_cli.routing.router import (
    BASE_MODEL,
    Asked,
    Context,
    RequestRouter,
    TokenRouter,
    default_router,
    needs_of,
    open_router,
    unit_of,
)


@dataclass
class Deciding:
    """The router of an engine, opened when it is first asked.

    Args:
        opened, bank: what is in memory.
        wanted: says which router, and its options.

    Attributes:
        name: of the router.
        notes: for people; more when it is opened.
    """

    opened: Opened
    bank: Bank
    wanted: Wanted
    notes: list[str] = field(default_factory=list)
    _router: RequestRouter | TokenRouter | None = None

    @property
    def name(self) -> str | None:
        """What decides; None where there is nothing to choose among."""
        if self.wanted.router or not self.opened.adapters:
            return self.wanted.router
        return default_router(self.opened.library)[0]

    @property
    def router(self) -> RequestRouter | TokenRouter:
        """The router.

        Raises:
            UsageError: there is no such router, or it needs what is not there.
        """
        if self._router is None:
            if self.name is None:
                raise UsageError("auto: there is no adapter to choose", "name some: --adapter FOLDER or --library L")
            if not self.wanted.router and (note := default_router(self.opened.library)[1]):
                self.notes.append(note)
            context = Context(
                library=self.opened.library,
                adapters=self.opened.adapters,
                bank=self.bank,
                base=self.opened.base,
                encoder=self.opened.encoder,
                options=options.given("routers", self.name, self.wanted.options),
            )
            self._router = open_router(self.name, context)
            self.notes += self._router.notes
        return self._router

    def forget(self) -> None:
        """Open it anew next time: the adapters are others."""
        self._router = None

    def decide(self, text: str, ids: Callable[[], tuple[int, ...]]) -> Decision:
        """Which adapters answer a request.

        Args:
            text: what the person asks, without a template's words around it.
            ids: gives the prompt in tokens, where the router looks at that.
        """
        assert self.name is not None
        reads = unit_of(self.name) == "request" and BASE_MODEL in needs_of(self.name)
        return self.router.decide([Asked(text, ids() if reads else ())])[0]
