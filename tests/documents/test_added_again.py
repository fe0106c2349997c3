"""A chunk's run that is finished is gone on with only by the recipe that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pico import pico_model

from dynlora_cli.commands import train
from dynlora_cli.config.load import load_text
from dynlora_cli.documents.added import Parts, _trained
from dynlora_cli.errors import UsageError


def test_a_finished_run_of_another_recipe_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    text = (
        f"model: {pico_model(tmp_path / 'base')}\n"
        f"dataset: {{train: [{tmp_path / 'rows.jsonl'}], val_size: 0}}\n"
        f"train: {{max_steps: 1, learning_rate: 1e-3}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    recipe = load_text(text, "r.yaml")
    parts = Parts(recipe, text, [], {}, {}, tmp_path, False, True, train.run)
    first = _trained(parts, recipe, lambda event: None)
    assert _trained(parts, recipe, lambda event: None)["steps"] == first["steps"] == 1
    with pytest.raises(UsageError, match="made by another recipe"):
        _trained(parts, load_text(text.replace("max_steps: 1", "max_steps: 2"), "r.yaml"), lambda event: None)
