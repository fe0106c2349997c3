"""A run on rows that are kept on the disk leaves the same bytes as one on rows that are held in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import lines, make_recipe, train

from dynlora_cli.data.rows.cache import FOLDER

CASES = {
    "packed": ["dataset.packing=true"],
    "weights": ["dataset.train.0.weight=0.5", "dataset.train.0.rows=40", "dataset.max_length=24"],
    "replay": ["dataset.replay.share=20%"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_a_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    settings = [*CASES[case], "eval.samples=1"]
    if case == "replay":
        train(make_recipe(tmp_path, out="before"))
        settings.append(f"dataset.replay.from={tmp_path / 'before'}")
    found = []
    for kept in ("false", "true"):
        recipe = make_recipe(tmp_path, *settings, f"dataset.cache={kept}", out=kept)
        _, events = train(recipe)
        folder = Path(recipe.output_dir)
        data = json.loads((folder / "dynlora.json").read_text())["data"]
        data.pop("date")
        notes = next(event for event in events if event["event"] == "start")["notes"]
        found.append(
            (
                (folder / "adapter_model.safetensors").read_bytes(),
                data,
                [note for note in notes if "are kept in" not in note],
                lines(folder / "metrics.jsonl"),
            )
        )
        assert any("are kept in" in note for note in notes) == (kept == "true")
    assert found[0] == found[1]
