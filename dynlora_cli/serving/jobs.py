"""What a worker takes: answers to be written, with what is told of them on the way, and errands between two batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynlora_cli.serving.refusals import Refusal

if TYPE_CHECKING:
    from dynlora_cli.decoding.sampling import Sampling
    from dynlora_cli.generation.engine import Answer, Request

Content = str | list[dict[str, str]]


@dataclass(frozen=True)
class Prepared:
    """A request has become tokens, and it is known who will answer."""

    request: Request


@dataclass(frozen=True)
class Piece:
    """Some text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """An answer is complete."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """There will be no answer."""

    refusal: Refusal


Event = Prepared | Piece | Finished | Failed
Listener = Callable[[Event], None]


class Job:
    """One answer to be written.

    Args:
        use: whom to ask: a mix, or `auto`.
        content: a text, or a conversation.
        sampling: how to write.
        listener: told what happens, in the worker's thread; it must not wait.
        names: the adapters in `use`, where they are known.
        raw: the text as it is, without a chat template.
        more: tools and variables of the chat template, where there are any.

    Attributes:
        cancelled: nobody waits for it any more.
        turn: a number; the smallest is served first.
        request: the prompt in tokens, and how far the answer has come; None before that.
        group: of the requests that it can share a batch with.
        begun: some of the answer was given out.
        alone: the batch that it was in has failed, and it is tried again by itself.
    """

    def __init__(
        self,
        use: str,
        content: Content,
        sampling: Sampling,
        listener: Listener,
        *,
        names: Iterable[str] = (),
        raw: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.more = dict(more or {})
        self.use, self.content, self.sampling, self.raw = use, content, sampling, raw
        self.listener, self.names = listener, frozenset(names)
        self.turn = 0
        self.request: Request | None = None
        self.group: Hashable = None
        self.cancelled = self.begun = self.alone = False

    @property
    def ready(self) -> Request:
        """What the engine takes."""
        assert self.request is not None
        return self.request


@dataclass
class Errand:
    """Something to be done with the engine between two batches.

    Attributes:
        do: this.
        free_of: an adapter that no request may be using then.
        result: of it.
    """

    do: Callable[[], Any]
    free_of: str | None
    result: Future[Any]


class Tally:
    """Is told what the worker does, to be counted; this one counts nothing."""

    def batch(self, size: int) -> None:
        """A forward pass over some requests begins."""

    def fault(self, error: Exception) -> None:
        """A batch has failed in a way that nobody has foreseen."""
