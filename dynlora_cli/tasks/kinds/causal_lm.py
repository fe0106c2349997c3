"""A language model reads a text and continues it.

What it does
    Every token is predicted from those before it. `dataset.train_on` says which of them carry loss: a completion, the
    turns of the assistant, or all.

When to use it
    For chat, instructions, completions and plain text, with a model of the kind of Llama, Qwen or GPT-2.

Reference
    transformers' AutoModelForCausalLM; PEFT's task type CAUSAL_LM.
"""

from __future__ import annotations

from dynlora_cli.tasks import task

AUTO_MODEL = "AutoModelForCausalLM"
TASK_TYPE = "CAUSAL_LM"
OWNS_TASK_TYPE = True
NEW_TOKENS = True
FORMS = ("Turns", "Pair", "Plain")
PACKS = True


class Task(task.Task):
    """As every task that does not say otherwise."""
