"""What a router is: a file in routing/routers/ with these names; `--router` takes its file's name.

    make(context) -> RequestRouter | TokenGates
        The router, of what is in memory.

    UNIT = "request" | "token"
        What it decides on. By request: one mix of adapters for a request and its whole answer, which may be merged, and
        with which a cache of keys and values stays right. By token: weights of adapters for each token in each layer;
        then `make` gives what lora/multi.py calls TokenGates.

    NEEDS = ("keys", "factors", "base")
        Which of these `make` uses: the keys of a library and their encoder, the adapters in a bank, the base in memory.
        A router of keys alone opens where there is no model, as in a proxy.

    FINAL = True
        Optional: its own word on "none of them" stands. Any other router is, where the library is calibrated, asked
        only about requests on which some update passes the calibrated threshold: the base answers the rest.

    OPTIONS
        Optional: what `--set KEY=VALUE` may be, see config/options.py. They come as attributes of `context.options`.

What is made may have `notes`, a list of sentences for people, such as that a limit is a guess.

No torch here: which routers there are and what they need is known at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from dynlora_cli import plugins
from dynlora_cli.config import options
from dynlora_cli.errors import UsageError
from dynlora_cli.library.activation import Activator, Decision, calibration_of
from dynlora_cli.library.library import Library
from dynlora_cli.retrieval.encoders import Encoder
from dynlora_cli.text import did_you_mean, to_type

if TYPE_CHECKING:
    from torch import Tensor

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.adapters.bank import Bank
    from dynlora_cli.lora.multi import MultiLinear, TokenGates
    from dynlora_cli.models.load import Base

Unit = Literal["request", "token"]
KEYS, FACTORS, BASE_MODEL = "keys", "factors", "base"


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        text: what a person asks, without a template's words around it.
        ids: the prompt as the model reads it; () where nobody has made tokens of it.
    """

    text: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a router may use. Whoever opens it gives what there is.

    Attributes:
        library: with keys, and perhaps a calibration.
        adapters: in memory, by name.
        bank: has adapters on the base, these or more.
        base: in memory.
        encoder: of the library's keys.
        options: of the router; None: its defaults.
        must_choose: set by `open_router`: a calibration decides on "none of them", the router among the adapters.
        names: the adapters to choose among; (): all that there are.
    """

    library: Library | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    bank: Bank | None = None
    base: Base | None = None
    encoder: Encoder | None = None
    options: Any = None
    must_choose: bool = False
    names: tuple[str, ...] = ()


class RequestRouter(Protocol):
    """Decides by request.

    Attributes:
        notes: for people.
    """

    notes: list[str]

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """A decision for each request. It depends on this request alone, not on the others beside it."""
        ...


class TokenRouter:
    """Decides by token; itself what a bank is `routed` by.

    Args:
        inner: gives the weights, as TokenGates of lora/multi.py.
        names: of the adapters that may speak.
        notes: for people.
    """

    def __init__(self, inner: TokenGates, names: Sequence[str], notes: Sequence[str]) -> None:
        self.inner, self.names, self.notes = inner, tuple(names), list(notes)

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """The weights of a layer's adapters, or of its components, for each token."""
        return self.inner.gates(layer, x_NI, h_NR)

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """All requests are decided on token by token; under a calibration some are the base's."""
        return [Decision(self.names, {}, "decided on every token", by_token=True) for _ in requests]


class Guarded:
    """A request router that is asked only about requests on which some update passes the calibrated threshold.

    Args:
        inner: decides on those.
        activator: of the library.
    """

    def __init__(self, inner: RequestRouter | TokenRouter, activator: Activator) -> None:
        self.inner, self.activator = inner, activator
        self.notes = [*activator.notes, *inner.notes]

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """The base's decisions say what was nearest, and what it would have needed."""
        decisions = self.activator.decide([request.text for request in requests])
        passing = [row for row, decision in enumerate(decisions) if decision.chosen]
        for row, decision in zip(passing, self.inner.decide([requests[row] for row in passing]), strict=True):
            decisions[row] = decision
        return decisions


class GuardedTokenRouter(TokenRouter):
    """A token router for requests on which some update passes the calibrated threshold."""

    def __init__(self, inner: TokenRouter, activator: Activator) -> None:
        super().__init__(inner.inner, inner.names, inner.notes)
        self.guard = Guarded(inner, activator)
        self.notes = self.guard.notes

    def decide(self, requests: Sequence[Asked]) -> list[Decision]:
        """By token, or the base."""
        return self.guard.decide(requests)


def unit_of(name: str) -> Unit:
    """What a router decides on, without loading it."""
    return cast("Unit", plugins.declared("routers", _known(name), "UNIT", "request"))


def needs_of(name: str, library: Library | None = None) -> set[str]:
    """What opening a router takes: "keys", "factors", "base". A calibrated library's threshold takes its keys."""
    needs = set(plugins.declared("routers", _known(name), "NEEDS", ()))
    return needs | {KEYS} if _guards(name, library) else needs


def default_router(library: Library | None) -> tuple[str, str]:
    """The router that is used where nobody names one, and a sentence about it; empty where there is nothing to say."""
    if library is not None and library.calibration is not None:
        return "calibrated", ""
    if library is not None:
        again = to_type("library", "calibrate", library.root)
        return (
            "embedding",
            f"{library.root} is not calibrated, so the nearest update answers (router embedding): {again}",
        )
    return (
        "likelihood",
        "there is no library, so the adapter under which a prompt is likeliest answers (router likelihood)",
    )


def open_router(name: str, context: Context) -> RequestRouter | TokenRouter:
    """Make a router.

    Args:
        name: file of routing/routers/.
        context: what there is.

    Raises:
        UsageError: there is no such router, or it needs what is not there.
    """
    _refuse_missing(name, context)
    given = context.options if context.options is not None else options.given("routers", name, ())
    names, notes = _candidates(name, context)
    guards = _guards(name, context.library)
    context = replace(context, options=given, names=names, must_choose=guards)
    made = plugins.load("routers", name).make(context)
    told = [*notes, *getattr(made, "notes", ())]
    if unit_of(name) == "token":
        router: RequestRouter | TokenRouter = TokenRouter(made, getattr(made, "names", names), told)
    else:
        router, router.notes = made, told
    if not guards:
        return router
    assert context.library is not None
    assert context.encoder is not None
    activator = Activator(context.library, context.encoder)
    return GuardedTokenRouter(router, activator) if isinstance(router, TokenRouter) else Guarded(router, activator)


def _known(name: str) -> str:
    """The name, if there is such a router."""
    names = plugins.names("routers")
    if name not in names:
        raise UsageError(
            f"there is no router {name!r}{did_you_mean(name, names)}", f"choose one of: {', '.join(names)}"
        )
    return name


def _guards(name: str, library: Library | None) -> bool:
    """Whether a calibration decides on "none of them" for this router."""
    final = plugins.declared("routers", _known(name), "FINAL", False)
    return not final and library is not None and library.calibration is not None


def _candidates(name: str, context: Context) -> tuple[tuple[str, ...], list[str]]:
    """The adapters to choose among, and what to tell of those that are left out."""
    library = context.library
    there = context.names or context.adapters or (context.bank.names if context.bank else ())
    names = list(there) or [entry.name for entry in (library.entries if library else [])]
    notes = []
    if library is not None and _guards(name, library):
        seen = calibration_of(library).entries
        if strange := [each for each in names if each not in seen]:
            notes.append(f"the calibration has not seen {', '.join(strange)}, so no request is theirs")
        names = [each for each in names if each in seen]
    alone = dict(context.bank.alone) if context.bank is not None and unit_of(name) == "token" else {}
    notes += [f"{each} takes no part by token: {alone[each]}" for each in names if each in alone]
    return tuple(each for each in names if each not in alone), notes


def _refuse_missing(name: str, context: Context) -> None:
    """Check that all is there that a router needs.

    Raises:
        UsageError: something is not.
    """
    needs = needs_of(name, context.library)
    heavy = {FACTORS, BASE_MODEL}
    others = [each for each in plugins.names("routers") if heavy.isdisjoint(needs_of(each, context.library))]
    if KEYS in needs and (context.library is None or context.encoder is None):
        raise UsageError(
            f"the router {name} goes by the keys of a library, and there is none", "name one: --library LIB"
        )
    if KEYS in needs and context.library is not None and not context.library.entries:
        raise UsageError(f"the library {context.library.root} is empty", "dynlora library add LIB --adapter FOLDER")
    missing = (BASE_MODEL in needs and context.base is None) or (FACTORS in needs and context.bank is None)
    if missing:
        raise UsageError(
            f"the router {name} computes with base and adapters, which are not in memory here",
            f"choose one that goes by the request's text: {', '.join(others)}",
        )
