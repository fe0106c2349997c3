"""A base with its adapters in memory, which answers: what `generate`, `chat` and `serve` are made of.

    engine.use("0.7*a+0.3*b")     what is to speak
    engine.request(use, "...")    a prompt in tokens, as that adapter's run wrote its own
    engine.generate([...])        answers; requests that can share a batch do

One thread at a time generates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.mix import AUTO, BASE, mix_text, parse_mix
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Reason, Written, own_ends, write
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.opening import Opened, Wanted, admit, open_all
from dynlora_cli.generation.voice import Messages, Voice, voice_of
from dynlora_cli.library.activation import Decision
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way
from dynlora_cli.models.load import precision_of
from dynlora_cli.models.quiet import quiet
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter

Tell = Callable[[str], None]
__all__ = ["Answer", "Engine", "Request", "Use", "Wanted"]


@dataclass(frozen=True)
class Use:
    """What is to speak.

    Attributes:
        text: as a person writes it.
        mix: weights by adapter; {} is the base. None: a router decides on each request.
    """

    text: str
    mix: Mapping[str, float] | None

    @property
    def auto(self) -> bool:
        return self.mix is None


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, and who answers it.

    Attributes:
        ids: the prompt.
        use: what was asked for.
        mix: what speaks: weights by adapter, {} is the base.
        sampling: how the answer is written.
        ends: tokens at which it ends.
        voice: whose form the prompt has.
        continues: the answer goes on in the middle of a text, so that a space before it is part of it.
        router: that decided, by name; None where nobody had to.
        decision: of that router.
    """

    ids: tuple[int, ...]
    use: Use
    mix: Mapping[str, float]
    sampling: Sampling
    ends: frozenset[int]
    voice: Voice
    continues: bool = False
    router: str | None = None
    decision: Decision | None = None


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        text: without special tokens, up to a stop string.
        ids: its tokens, without the one that ended it.
        prompt_tokens: how long the prompt was.
        finish_reason: stop, length or cancelled.
        mix: what spoke.
        decision: of the router, where one decided.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Reason
    mix: Mapping[str, float]
    decision: Decision | None = None


class Engine:
    """A base with adapters in memory. Made by `Engine.open`; a context manager.

    Attributes:
        notes: what a person should know, each once; new ones come with requests.
    """

    def __init__(self, opened: Opened, wanted: Wanted) -> None:
        self._opened, self._wanted = opened, wanted
        self.notes: list[str] = []
        self._voices: dict[str, Voice] = {}
        self._note(*opened.notes)

    @classmethod
    def open(cls, wanted: Wanted, tell: Tell = lambda _: None) -> Engine:
        """Read adapters and library, and load their base, once.

        Args:
            wanted: what the person says.
            tell: takes a line for each part that takes a while.

        Raises:
            UsageError: nothing is named; an adapter is damaged, a classifier, or of another base.
            MachineError: the base is not on this machine.
        """
        with quiet:
            opened = open_all(wanted)
        engine = cls(opened, wanted)
        tell(f"base {engine.base_name}, adapters: {', '.join(engine.names) or 'none'}")
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything off the base."""

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def base_name(self) -> str:
        """Folder or hub id of the base."""
        return str(self._opened.place.options.name_or_path)

    @property
    def names(self) -> list[str]:
        """Of the adapters."""
        return list(self._opened.adapters)

    @cached_property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where nobody knows."""
        return self._opened.base.files.context_length

    def adapter(self, name: str) -> Adapter:
        """The adapter of a name.

        Raises:
            UsageError: there is none.
        """
        if name not in self._opened.adapters:
            there = f"there are: {', '.join(self.names)}" if self.names else "no adapter is loaded"
            raise UsageError(f"there is no adapter {name!r}{did_you_mean(name, self.names)}", there)
        return self._opened.adapters[name]

    def add(self, name: str, folder: Path) -> None:
        """Load one more adapter of the same base.

        Raises:
            UsageError: the name is taken, or it is none of this base that writes text.
        """
        with quiet:
            admit(self._opened, name, read_adapter(folder, self._wanted.base), self._wanted)

    def remove(self, name: str) -> None:
        """Forget an adapter; requests that name it must have been answered.

        Raises:
            UsageError: there is none of that name.
        """
        self.adapter(name)
        del self._opened.adapters[name]
        self._voices.pop(name, None)

    # -- requests ----------------------------------------------------------------------------------------------------

    def use(self, text: str) -> Use:
        """What a text such as `base`, `NAME`, `0.7*a+0.3*b` or `auto` names.

        Raises:
            UsageError: no mix, an unknown name, or auto where nothing can decide.
        """
        if text.strip() == AUTO and AUTO not in self.names:
            raise UsageError("auto: no router can decide here yet", "name a mix, such as NAME or NAME+NAME")
        mix = parse_mix(text, self.names)
        if len(mix) > 1:
            with quiet:
                self._blend(mix)  # refused now where they cannot be added
        return Use(text.strip(), mix)

    def voice(self, mix: Mapping[str, float]) -> Voice:
        """How a mix is asked: as the adapters in it were trained; a blend of those that disagree as the base."""
        voices = [self._voice(name) for name in mix] or [self._voice(BASE)]
        if len({voice.form for voice in voices}) == 1:
            return voices[0]
        self._note(f"{mix_text(mix)}: these adapters are asked in different ways, so this is asked as the base is")
        return self._voice(BASE)

    def request(
        self,
        use: Use,
        content: str | Messages,
        sampling: Sampling,
        *,
        system: str | None = None,
        tools: list[Any] | None = None,
        bare: bool = False,
    ) -> Request:
        """A prompt as tokens.

        Args:
            use: who answers.
            content: a prompt; or the messages of a conversation, each with role and content.
            sampling: how the answer is written.
            system: a system message before it.
            tools: as the chat template takes them.
            bare: `content` is a text to go on with as it is, whatever the run learned from.

        Raises:
            UsageError: it cannot be asked so, or leaves no room in the context.
        """
        assert use.mix is not None
        with quiet:
            return self._request(use, content, sampling, system=system, tools=tools, bare=bare)

    def _request(
        self,
        use: Use,
        content: str | Messages,
        sampling: Sampling,
        *,
        system: str | None,
        tools: list[Any] | None,
        bare: bool,
    ) -> Request:
        mix = use.mix or {}
        voice = self.voice(mix)
        self._note(*voice.notes)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        continues = bare or not voice.chat
        if continues:
            ids = self._bare(voice, messages, tools, exact=bare)
        else:
            if not any(str(message.get("content") or "").strip() for message in messages):
                raise UsageError("the prompt is empty", "write something")
            ids, notes = voice.chat_ids(messages, tools)
            self._note(*notes)
        self._refuse_long(ids)
        return Request(ids, use, mix, sampling, voice.ends, voice, continues=continues)

    def _bare(self, voice: Voice, messages: Messages, tools: list[Any] | None, *, exact: bool) -> tuple[int, ...]:
        """Tokens of a prompt that is bare text."""
        if len(messages) != 1 or messages[0].get("role") != "user" or tools:
            what = "tools" if tools else "a system message" if len(messages) == 2 else "a conversation"
            raise UsageError(
                f"{voice.name} is asked in bare text, and takes no {what.removeprefix('a ')}",
                "give one prompt, with all that is to be said in it",
            )
        content = messages[0].get("content")
        if not isinstance(content, str):
            raise UsageError(f"the prompt is {type(content).__name__}, and no text")
        ids = voice.text_ids(content) if exact else voice.prompt_ids(content)
        if not ids:
            raise UsageError("the prompt is empty", "write something")
        return ids

    def _refuse_long(self, ids: Sequence[int]) -> None:
        if self.context is not None and len(ids) >= self.context and not self._two:
            raise UsageError(
                f"the prompt has {len(ids):,} tokens, and the model's context {self.context:,}: no room is left for an "
                "answer",
                "shorten it",
            )

    def group(self, request: Request) -> Hashable:
        """Requests of one group can be written in one batch."""
        return tuple(request.mix.items()), request.voice.words

    # -- answers -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        on_piece: Callable[[int, str], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Answer]:
        """Answer requests. Those of one group are written together.

        Args:
            requests: in any order.
            on_piece: takes the number of a request and a piece of its text, as it comes.
            cancelled: asked after each token whether a request's answer is still wanted.

        Returns:
            The answers in the order of the requests.
        """
        answers: dict[int, Answer] = {}
        groups: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self.group(request), []).append(number)
        with quiet:
            for numbers in groups.values():
                for number, written in zip(numbers, self._write(requests, numbers, on_piece, cancelled), strict=True):
                    one = requests[number]
                    answers[number] = Answer(
                        written.text, written.ids, written.prompt_tokens, written.finish_reason, one.mix, one.decision
                    )
        return [answers[number] for number in range(len(requests))]

    def _write(
        self,
        requests: Sequence[Request],
        numbers: Sequence[int],
        on_piece: Callable[[int, str], None] | None,
        cancelled: Callable[[int], bool] | None,
    ) -> list[Written]:
        base, chosen = self._opened.base, [requests[number] for number in numbers]
        with self._speaking(chosen), precision_of(base)():
            return write(
                base.model,
                chosen[0].voice.tokenizer,
                [request.ids for request in chosen],
                [request.sampling for request in chosen],
                [request.ends for request in chosen],
                context=self.context,
                continues=[request.continues for request in chosen],
                on_piece=on_piece and (lambda row, piece: on_piece(numbers[row], piece)),
                cancelled=cancelled and (lambda row: cancelled(numbers[row])),
            )

    @contextmanager
    def _speaking(self, requests: Sequence[Request]) -> Iterator[None]:
        """The model with the mix of a group inside the block."""
        mix = requests[0].mix
        if not mix:
            yield
            return
        with attached(self._opened.base.model, self._blend(mix)):
            yield

    def _blend(self, mix: Mapping[str, float]) -> Adapter:
        """A mix as one adapter, exactly: components side by side, weights in B."""
        adapters = [self.adapter(name) for name in mix]
        if list(mix.values()) == [1.0]:
            return adapters[0]
        if len(adapters) == 1:
            (adapter,), (weight,) = adapters, mix.values()
            return combine([adapter, adapter], Way(method="exact", weights=[weight, 0.0])).adapter
        return combine(adapters, Way(method="exact", weights=list(mix.values()))).adapter

    # -- voices and notes --------------------------------------------------------------------------------------------

    @property
    def _two(self) -> bool:
        return bool(self._opened.base.model.config.is_encoder_decoder)

    def _voice(self, name: str) -> Voice:
        """How an adapter is asked, or the base; read when it is first needed."""
        if name not in self._voices:
            place, base = self._opened.place, self._opened.base
            adapter = None if name == BASE else self.adapter(name)
            tokenizer = read_tokenizer(adapter, place) if adapter else place.files.tokenizer
            ends = own_ends(base.model, place.files.tokenizer)
            self._voices[name] = voice_of(name, adapter, tokenizer, place.options, ends)
        return self._voices[name]

    def _note(self, *notes: str) -> None:
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]
