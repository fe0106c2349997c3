"""How tokens are chosen, by the names and in the meaning of transformers' GenerationConfig. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynlora_cli.errors import UsageError

MOST_STOPS = 64
LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Sampling:
    """How one answer is written. What is left alone is greedy: the most likely token each time.

    Attributes:
        max_new_tokens: at most so many tokens.
        do_sample: draw tokens, from the distribution that the others shape.
        temperature: divides the logits; above 0.
        top_p: tokens that have this share of the probability together; in (0, 1].
        top_k: so many tokens; None: all. (transformers takes 50 where nobody says.)
        min_p: tokens with at least this share of the most likely one's probability; in [0, 1].
        repetition_penalty: above 1, tokens of the prompt and of the answer so far become less likely.
        seed: of the drawing; None: another each time.
        stop_strings: the answer ends before the first of them; none of it is shown.

    Raises:
        UsageError: a value is none that makes sense; the message names it.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _number("temperature", self.temperature, "a number above 0; 0 alone is greedy", lambda value: value > 0)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        _number("repetition_penalty", self.repetition_penalty, "a number above 0", lambda value: value > 0)
        if self.min_p is not None:
            _number("min_p", self.min_p, "from 0 to 1", lambda value: 0 <= value <= 1)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0, LARGEST_SEED)
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise UsageError("stop_strings: one of them is empty", "leave it out")
        if len(self.stop_strings) > MOST_STOPS:
            raise UsageError(f"stop_strings: there are {len(self.stop_strings)}, at most {MOST_STOPS}")

    @classmethod
    def of(
        cls,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        stop_strings: Sequence[str] = (),
        **others: Any,
    ) -> Sampling:
        """What somebody has given, None standing for what they have not.

        A temperature, top_p, top_k or min_p means that tokens are drawn, temperature 0 that they are not, and top_k 0
        that there is no such limit.

        Raises:
            UsageError: as above, or what is given contradicts itself.
        """
        greedy = temperature == 0
        if greedy:
            temperature = None
        shaping = {"temperature": temperature, "top_k": top_k, **{key: others.get(key) for key in ("top_p", "min_p")}}
        shaped = [key for key, value in shaping.items() if value is not None]
        if shaped and do_sample is False:
            raise UsageError(f"{shaped[0]} is for drawn tokens, and do_sample is false", "leave one of them out")
        if greedy and do_sample:
            raise UsageError("temperature 0 draws nothing, and do_sample is true", "leave one of them out")
        kept = {key: value for key, value in (others | shaping).items() if value is not None}
        if kept.get("top_k") == 0:
            del kept["top_k"]
        drawn = not greedy and (bool(shaped) if do_sample is None else do_sample)
        return cls(do_sample=drawn, stop_strings=tuple(stop_strings), **kept)


def _number(name: str, value: Any, allowed: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not fits(value):
        raise UsageError(f"{name} is {value!r}, must be {allowed}")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise UsageError(f"{name} is {value!r}, must be a whole number from {least}{f' to {most}' if most else ''}")
