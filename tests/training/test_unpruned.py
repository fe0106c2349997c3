"""What a run says where nothing will be pruned."""

from __future__ import annotations

import pytest

from dynlora_cli.lora.start import Start
from dynlora_cli.training.setup import why_unpruned


@pytest.mark.parametrize(
    ("steps", "parameters", "budget", "open_", "told"),
    [
        (100, 80, 100, False, "there are 80 parameters, and the budget is 100"),
        (100, 200, 100, False, ""),
        (100, 100, 100, False, ""),  # rank.init is the budget: that was asked for
        (100, 80, 100, True, ""),
        (2, 200, 100, False, "too few to prune"),
        (2, 100, 100, False, ""),
    ],
)
def test_why_nothing_is_pruned(steps, parameters, budget, open_, told):
    notes = why_unpruned(steps, Start({"a": 1}, parameters, budget, 8.0, open=open_))
    assert len(notes) == bool(told)
    assert told in "".join(notes)
