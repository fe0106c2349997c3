"""Full fine-tuning: every weight of the base trains.

What it does
    Adds no components. `rank` and `pruning` do not apply, and what is saved is the whole model.

When to use it
    As the baseline of a comparison, or where memory is no concern.

Reference
    None needed.
"""

from __future__ import annotations

RATE = 0.1  # of the rate that lora would get: a tenth is usual where all weights train
has_components = False
takes = ()
CONFLICTS = [
    {
        "with": "model.load_in_4bit",
        "why": "variant full trains the weights themselves, which a quantized base does not allow",
    },
    {
        "with": "model.load_in_8bit",
        "why": "variant full trains the weights themselves, which a quantized base does not allow",
    },
    {
        "with": "model.dtype",
        "is": "float16",
        "why": "variant full trains the weights themselves, and steps are too small for float16",
    },
]
