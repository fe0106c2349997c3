"""Full fine-tuning: every weight of the base trains.

What it does
    Adds no components. `rank` and `pruning` do not apply, and what is saved is the whole model.

When to use it
    As the baseline of a comparison, or where memory is no concern.

Reference
    None needed.
"""

from __future__ import annotations

has_components = False
takes = ()
