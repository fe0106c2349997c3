"""What a library answers: each request with the updates that were chosen for it, beside the answer of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dynlora_cli.data.examples import Example
from dynlora_cli.evaluation.generation import Prompt, find_prompts, generate
from dynlora_cli.evaluation.rows import MICRO_BATCH
from dynlora_cli.library.activation import Decision
from dynlora_cli.models.load import Base, precision_of

# The base computes as a decision says inside the block.
Speaking = Callable[[Decision], AbstractContextManager[Any]]


def answers(
    base: Base, examples: Sequence[Example], decisions: Sequence[Decision], speaking: Speaking, count: int
) -> list[dict[str, Any]]:
    """Greedy answers to the first `count` different prompts.

    Args:
        base: in memory, without an adapter.
        examples: rows; those without a prompt are passed over.
        decisions: one for each of them.
        speaking: has the base compute as a decision says.
        count: prompts at most.

    Returns:
        Of each prompt: prompt, references, chosen (names), and answers by "base" and "library".
    """
    asked: dict[tuple[int, ...], tuple[Prompt, Decision]] = {}
    for example, decision in zip(examples, decisions, strict=True):
        for prompt in find_prompts([example], base.tokenizer, 1):
            asked.setdefault(prompt.ids, (prompt, decision))
    prompts, chosen = zip(*list(asked.values())[:count], strict=True) if asked and count else ((), ())
    for prompt in prompts:  # so that no answer is cut shorter than another
        prompt.longest = max(each.longest for each in prompts)
    plain = _write(base, nullcontext(), prompts)
    spoken = dict(zip(range(len(prompts)), plain, strict=True))
    for kind in dict.fromkeys(map(_kind, chosen)):
        mine = [at for at, decision in enumerate(chosen) if _kind(decision) == kind]
        if chosen[mine[0]].chosen:
            context = speaking(chosen[mine[0]])
            spoken |= dict(zip(mine, _write(base, context, [prompts[at] for at in mine]), strict=True))
    return [
        {
            "prompt": prompt.text,
            "references": prompt.references,
            "chosen": list(decision.chosen),
            "answers": {"base": plain[at], "library": spoken[at]},
        }
        for at, (prompt, decision) in enumerate(zip(prompts, chosen, strict=True))
    ]


def _kind(decision: Decision) -> tuple[Any, ...]:
    """The same of decisions under which the base computes alike."""
    return decision.by_token, *decision.weights.items()


def _write(base: Base, speaking: AbstractContextManager[Any], prompts: Sequence[Prompt]) -> list[str]:
    if not prompts:
        return []
    with speaking, precision_of(base)():
        context = base.files.context_length
        return generate(base.model, base.tokenizer, prompts, batch_size=MICRO_BATCH, context=context)
