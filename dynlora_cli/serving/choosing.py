"""Which adapter a request is for, asked by many requests at once: those that wait are decided on together.

Routers compute, so they run in one thread beside the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynlora_cli.config.mix import mix_text
from dynlora_cli.library.activation import Decision
from dynlora_cli.serving.upstreams import CannotError, Upstream

Decide = Callable[[Sequence[str]], Sequence[Decision]]
MOST = 64  # requests that are decided on together
NOTHING_TO_READ = Decision((), {}, "base: there is no text to go by")


@dataclass(frozen=True)
class Choice:
    """What a request is answered by.

    Attributes:
        mix: weights by adapter; {} is the base.
        reason: in words.
    """

    mix: dict[str, float]
    reason: str

    @property
    def name(self) -> str:
        """`base`, the adapter, or a mix in its one-line form."""
        return mix_text(self.mix)


@dataclass
class Chooser:
    """Decides on requests as they come.

    Args:
        decide: the router, by the texts of requests.
    """

    decide: Decide
    _waiting: list[tuple[str, asyncio.Future[Decision]]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def choose(self, texts: Sequence[str], upstream: Upstream) -> Choice:
        """What answers a request.

        Args:
            texts: its prompts; one but of a batch of completions.
            upstream: an adapter that it does not have is never chosen.

        Raises:
            CannotError: the prompts of a batch are for different adapters.
        """
        choices = [possible(decision, upstream) for decision in await asyncio.gather(*map(self._decision, texts))]
        if any(choice.mix != choices[0].mix for choice in choices):
            names = ", ".join(dict.fromkeys(choice.name for choice in choices))
            raise CannotError(f"the prompts of this request are for different adapters ({names}): send them one by one")
        return choices[0]

    async def _decision(self, text: str) -> Decision:
        if not text.strip():
            return NOTHING_TO_READ
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a character is no text to an encoder
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Decide on all that wait, and on those that have come meanwhile."""
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            if not await self._told(batch) and len(batch) > 1:
                for each in batch:  # one text may have failed the others
                    await self._told([each])

    async def _told(self, batch: Sequence[tuple[str, asyncio.Future[Decision]]]) -> bool:
        """Decide on a batch and tell those that wait; of a fault only who has asked alone. Whether it went well."""
        try:
            decisions = await asyncio.to_thread(self.decide, [text for text, _ in batch])
            for (_, future), decision in zip(batch, decisions, strict=True):
                if not future.done():  # its client may have hung up
                    future.set_result(decision)
        except Exception as error:
            if len(batch) == 1 and not batch[0][1].done():
                batch[0][1].set_exception(error)
            return False
        return True


def possible(decision: Decision, upstream: Upstream) -> Choice:
    """What of a decision the upstream can do, and what it cannot in the reason.

    Adapters that it lacks are left out; what is left of a blend would be another blend, so there the base answers.
    vLLM and SGLang answer with one adapter: of several it is the one that the router is most confident of.
    """
    mix, reason = decision.mix, decision.reason
    if missing := [name for name in mix if name not in upstream.has]:
        blend = set(mix.values()) != {1.0}
        mix = {} if blend else {name: weight for name, weight in mix.items() if name in upstream.has}
        reason += f"; the upstream does not have {', '.join(missing)}{'' if mix else ': base'}"
    if len(mix) > 1 and upstream.kind != "llama-server":
        best = max(mix, key=lambda name: decision.confidence.get(name, 0.0))
        others = ", ".join(name for name in mix if name != best)
        reason += f"; {upstream.kind} takes one adapter a request, so {others} is left out"
        mix = {best: 1.0}
    return Choice(mix, reason)
