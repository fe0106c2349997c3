"""A base with its adapters in memory, which answers: what `generate`, `chat` and `serve` are made of.

    engine.use("0.7*a+0.3*b")     what is to speak
    engine.request(use, "...")    a prompt in tokens, as that adapter's run wrote its own
    engine.generate([...])        answers; requests that can share a batch do

One thread at a time generates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.adapters.base import read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.mix import AUTO, BASE, mix_text, parse_mix
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Listener, Row, Written, own_ends, refuse_full, write
from dynlora_cli.errors import UsageError
from dynlora_cli.generation.deciding import Deciding
from dynlora_cli.generation.opening import Opened, Wanted, admit, open_all
from dynlora_cli.generation.requests import Answer, Request, Use, answer_of, question_of, said_in
from dynlora_cli.generation.voice import Messages, Voice, voice_of
from dynlora_cli.models.load import precision_of
from dynlora_cli.models.quiet import quiet
from dynlora_cli.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.routing.router import TokenRouter

Tell = Callable[[str], None]
__all__ = ["Answer", "Engine", "Request", "Use", "Wanted"]


class Engine:
    """A base with adapters in memory. Made by `Engine.open`; a context manager.

    Attributes:
        names: of the adapters; another list after each `add` and `remove`, so that other threads may read it.
        bank: the adapters on the base.
        notes: what a person should know, each once; new ones come with requests.
    """

    def __init__(self, opened: Opened, wanted: Wanted) -> None:
        self._opened, self._wanted = opened, wanted
        self.bank = Bank(opened.base.model, opened.adapters)
        self.deciding = Deciding(opened, self.bank, wanted)
        self.names: list[str] = list(opened.adapters)
        self.notes: list[str] = []
        self._voices: dict[str, Voice] = {}
        self._note(*opened.notes, *self.bank.notes)

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
        self.bank.close()

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def base_name(self) -> str:
        """Folder or hub id of the base."""
        return str(self._opened.place.options.name_or_path)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first adapter's own, where its folder has one; else the base's."""
        return self._opened.base.tokenizer

    @property
    def router(self) -> str | None:
        """What decides on `auto`, by name; None: nothing can."""
        return self.deciding.name

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
            admit(self._opened, name, read_adapter(folder, self._wanted.base, routed=True), self._wanted)
            self.bank.add(name, self._opened.adapters[name])
        self._note(*self._opened.notes, *self.bank.notes)
        self._renew()

    def remove(self, name: str) -> None:
        """Forget an adapter; requests that name it must have been answered.

        Raises:
            UsageError: there is none of that name.
        """
        self.adapter(name)
        self.bank.remove(name)
        del self._opened.adapters[name]
        self._voices.pop(name, None)
        self._renew()

    def _renew(self) -> None:
        self.names = list(self._opened.adapters)
        self.deciding.forget()

    # -- requests ----------------------------------------------------------------------------------------------------

    def use(self, text: str) -> Use:
        """What a text such as `base`, `NAME`, `0.7*a+0.3*b` or `auto` names.

        Raises:
            UsageError: no mix, an unknown name, or auto where nothing can decide.
        """
        if text.strip() == AUTO:
            with quiet:
                self.deciding.router  # noqa: B018 - refused now where it cannot be opened
            return Use(AUTO, None)
        mix = parse_mix(text, self.names)
        for name in mix:
            if name in self.bank.alone and mix != {name: 1.0}:
                reason = self.bank.alone[name]
                raise UsageError(f"{name} cannot be blended: {reason}", f"use {name} by itself, with weight 1")
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
        kwargs: Mapping[str, Any] | None = None,
        raw: bool = False,
    ) -> Request:
        """A prompt as tokens.

        Args:
            use: who answers.
            content: a prompt; or the messages of a conversation, each with role and content.
            sampling: how the answer is written.
            system: a system message before it.
            tools: as the chat template takes them.
            kwargs: variables of the chat template, over those of training.
            raw: `content` is a text to go on with as it is, whatever the run learned from.

        Raises:
            UsageError: it cannot be asked so, or leaves no room in the context.
        """
        with quiet:
            return self._request(use, content, sampling, system=system, tools=tools, kwargs=kwargs, raw=raw)

    def _request(
        self,
        use: Use,
        content: str | Messages,
        sampling: Sampling,
        *,
        system: str | None,
        tools: list[Any] | None,
        kwargs: Mapping[str, Any] | None,
        raw: bool,
    ) -> Request:
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        decision = None
        if self.context is not None and not self._two:
            self._voice(BASE).refuse_endless(messages, self.context)
        if use.auto:
            everybody = dict.fromkeys(self.names, 1.0)
            decision = self.deciding.decide(
                question_of(messages), lambda: self._ids(self.voice(everybody), messages, tools, kwargs, raw=raw)
            )
            self._note(*self.deciding.notes)
        mix = use.mix if use.mix is not None else decision.weights if decision else {}
        voice = self.voice(mix)
        self._note(*voice.notes)
        ids = self._ids(voice, messages, tools, kwargs, raw=raw)
        if self.context is not None and not self._two:
            refuse_full(len(ids), self.context)
        return Request(
            ids,
            use,
            mix,
            sampling,
            voice.ends,
            voice,
            continues=raw or not voice.chat,
            router=self.router if decision else None,
            decision=decision,
        )

    def _ids(
        self,
        voice: Voice,
        messages: Messages,
        tools: list[Any] | None,
        kwargs: Mapping[str, Any] | None,
        *,
        raw: bool,
    ) -> tuple[int, ...]:
        """A prompt in tokens, in the form of a voice."""
        if raw or not voice.chat:
            if kwargs:
                text = f"{voice.name} is asked in bare text, for which chat_template_kwargs say nothing"
                raise UsageError(text, "leave them out")
            return self._bare(voice, messages, tools, exact=raw)
        if not any(str(message.get("content") or "").strip() for message in messages):
            raise UsageError("the prompt is empty", "write something")
        ids, notes = voice.chat_ids(messages, tools, kwargs)
        self._note(*notes)
        return ids

    def _bare(self, voice: Voice, messages: Messages, tools: list[Any] | None, *, exact: bool) -> tuple[int, ...]:
        """Tokens of a prompt that is bare text."""
        if len(messages) != 1 or messages[0].get("role") != "user" or tools:
            what = "tools" if tools else "a system message" if len(messages) == 2 else "a conversation"
            raise UsageError(
                f"{voice.name} is asked in bare text, and takes no {what.removeprefix('a ')}",
                "give one prompt, with all that is to be said in it",
            )
        content = said_in(messages[0].get("content"))
        ids = voice.text_ids(content) if exact else voice.prompt_ids(content)
        if not ids:
            raise UsageError("the prompt is empty", "write something")
        return ids

    def group(self, request: Request) -> Hashable:
        """Requests of one group can be written in one batch."""
        alone = next((name for name in request.mix if name in self.bank.alone), None)
        return alone, request.by_token, request.voice.words

    # -- answers -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        on_piece: Callable[[int, str], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
        *,
        on_done: Callable[[int, Answer], None] | None = None,
        paused: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answer requests. Those of one group are written together, one group after the other.

        Args:
            requests: in any order.
            on_piece: takes the number of a request and a piece of its text, as it comes.
            cancelled: asked after each token whether a request's answer has become unwanted.
            on_done: takes the number of a request and its answer, at once when that has ended.
            paused: asked after each token of a batch whether to stop here: what is not done comes back as "paused".

        Returns:
            The answers in the order of the requests.
        """
        answers: dict[int, Answer] = {}
        groups: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self.group(request), []).append(number)
        with quiet:
            for numbers in groups.values():
                if answers and paused is not None and paused():
                    waiting = [requests[number] for number in numbers]
                    states = [answer_of(one, self._row(one).written()) for one in waiting]
                    answers |= dict(zip(numbers, states, strict=True))
                    continue
                self._write(requests, numbers, answers, Listener(on_piece, None, cancelled, paused), on_done)
        return [answers[number] for number in range(len(requests))]

    def _write(
        self,
        requests: Sequence[Request],
        numbers: Sequence[int],
        answers: dict[int, Answer],
        heard: Listener,
        on_done: Callable[[int, Answer], None] | None,
    ) -> None:
        """Answers of one group."""
        base, chosen = self._opened.base, [requests[number] for number in numbers]

        def done(row: int, written: Written) -> None:
            if on_done:
                on_done(numbers[row], answer_of(chosen[row], written))

        listener = Listener(
            heard.piece and (lambda row, piece: heard.piece(numbers[row], piece)),  # type: ignore[misc]
            done,
            heard.cancelled and (lambda row: heard.cancelled(numbers[row])),  # type: ignore[misc]
            heard.paused,
        )
        rows = [self._row(request) for request in chosen]
        pad = base.tokenizer.pad_token_id
        with precision_of(base)():
            found = write(
                base.model,
                rows,
                pad_id=0 if pad is None else int(pad),
                context=self.context,
                listener=listener,
                speaking=lambda batch: self._speaking([chosen[row] for row in batch]),
            )
        for number, request, written in zip(numbers, chosen, found, strict=True):
            answers[number] = answer_of(request, written)

    def _row(self, request: Request) -> Row:
        return request.state or Row(
            request.voice.tokenizer,
            request.ids,
            request.sampling,
            request.ends,
            continues=request.continues and not self._two,
        )

    def _speaking(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        """The model with what speaks on each request inside the block."""
        if requests[0].by_token:
            return self.bank.routed(cast("TokenRouter", self.deciding.router))
        return self.bank.active([request.mix for request in requests])

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
