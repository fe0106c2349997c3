"""Context distillation: answer without a text as the model itself answers with it.

What it does
    The teacher is the model that the run begins with, without the components that train, and reads the context of a row
    before its prompt. What is trained reads the prompt alone. The loss is the cross-entropy to what the teacher says of
    every token of the answer, its `kept_tokens` likeliest ones; the teacher looks at every row once, before the first
    step. What is held out is measured as ever: by the cross-entropy of the answer, without the context.

When to use it
    To write a text into an adapter, with questions about it whose answers the model has written itself, or somebody
    else has.

Reference
    Snell et al. 2022, Learning by Distilling Context (arXiv 2209.15189); Doc-to-LoRA (arXiv 2602.15902), whose loss
    over the teacher's likeliest tokens this is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.tasks.distillation import Distilled, Told

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Train
    from dynlora_cli.data.examples import Example, OneText

FORMS = ("Grounded",)
TEACHES = "to answer without a text as with it"
OPTIONS = {
    "kept_tokens": {
        "type": "int",
        "default": 64,
        "at_least": 1,
        "help": "Tokens that are kept of what the teacher says at each place, the likeliest; 6 bytes each.",
    },
    "answer_share": {
        "type": "float",
        "default": 0.0,
        "at_least": 0,
        "at_most": 1,
        "help": "Share of the loss that is the answer's own cross-entropy, whatever the teacher says.",
    },
    "context_layout": {
        "type": "str",
        "default": "{context}\n\n{prompt}",
        "help": "How the teacher's prompt is put together, of {context} and {prompt}.",
    },
}
CONFLICTS = [
    {"with": "model.task", "is_not": "causal-lm", "why": "a context is read before a text that goes on"},
    {
        "with": "dataset.train_on",
        "is": "all",
        "why": "the teacher speaks of answers, not of prompts",
        "hint": "leave it at auto",
    },
    {"with": "dataset.retrieve", "why": "rows bring their own context", "hint": "leave it out"},
    {"with": "train.cuda_graphs", "why": "batches with a teacher's words are not captured", "hint": "set it to false"},
    {"with": "adapter.library", "why": "a router learns from answers that are right", "hint": "leave it out"},
]


class Objective(Distilled):
    """The loss to what the teacher said; see the head of this file."""

    def __init__(self, options: Train) -> None:
        own: Any = options
        super().__init__(options, Told(own.kept_tokens), 1 - own.answer_share)

    def lessons(self, examples: Iterable[Example]) -> list[OneText]:
        return [example.lesson() for example in examples if isinstance(example, GroundedText)]
