"""An encoder reads the prompt, a decoder writes the completion.

What it does
    Prompt and completion are two texts, each with the tokenizer's own special tokens and each cut at
    `dataset.max_length`. All tokens of the completion carry loss.

When to use it
    For translation, summaries and rewriting, with a model of the kind of T5 or BART.

Reference
    transformers' AutoModelForSeq2SeqLM; PEFT's task type SEQ_2_SEQ_LM.
"""

from __future__ import annotations

from dynlora_cli.data.encode import TwoTextEncoder
from dynlora_cli.tasks import task

AUTO_MODEL = "AutoModelForSeq2SeqLM"
TASK_TYPE = "SEQ_2_SEQ_LM"
OWNS_TASK_TYPE = True
FORMS = ("Pair",)
CONFLICTS = [
    {
        "with": "dataset.train_on",
        "is": "assistant",
        "why": "got assistant; a decoder writes the completion and nothing else, so leave it at auto",
    },
    {
        "with": "dataset.train_on",
        "is": "all",
        "why": "got all; a decoder writes the completion and nothing else, so leave it at auto",
    },
    {
        "with": "adapter.init_weights",
        "is": "eva",
        "why": "eva looks at the tokens that carry loss, and an encoder has none",
    },
    {
        "with": "rank.allocation",
        "is": "eva",
        "why": "eva looks at the tokens that carry loss, and an encoder has none",
    },
]


class Task(task.Task):
    """As a causal language model, of two texts."""

    encodes_with = TwoTextEncoder
