"""A mode with a recipe key of its own is one new file: the tutorial's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import Dynlora
from tiny_run import lines, make_recipe
from tutorials import code_of

from dynlora_cli.commands import train as train_command

SETTINGS = ("train.count_passes=true", "train.count_every=4")


@pytest.fixture(autouse=True)
def count_passes(plug_in: Callable[..., Path]) -> None:
    (code,) = code_of("modes").values()
    plug_in("modes", "count-passes", code)


def ran(folder: Path, name: str, dynlora: Dynlora, *settings: str) -> tuple[dict, list[str]]:
    """The summary of a run by the command line, and its notes."""
    recipe = make_recipe(folder, *settings, out=name)
    path = folder / f"{name}.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    answer = dynlora("train", path, "--json")
    assert answer.code == 0, answer.err
    return answer.json, answer.err.splitlines()


@pytest.mark.slow
def test_it_is_asked_at_every_step_and_reports(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    models = []
    honest = train_command.fit
    monkeypatch.setattr(train_command, "fit", lambda run: models.append(run.model) or honest(run))
    counted, told = ran(tmp_path, "counted", dynlora, *SETTINGS)
    notes = [line for line in told if "the model" in line]
    assert [note.partition("before step")[2] for note in notes[:3]] == [
        f" {step} the model has run {2 * (step - 1)} times to learn" for step in (4, 8, 12)
    ], "two micro-batches a step"
    assert "the model ran 24 times to learn and" in notes[3]
    assert not [hook for hook in models[0]._forward_pre_hooks.values() if "count" in getattr(hook, "__name__", "")]
    usual, _ = ran(tmp_path, "usual", dynlora)
    assert (counted["ranks"], counted["loss_after"]) == (usual["ranks"], usual["loss_after"])
    assert lines(tmp_path / "counted" / "rank_events.jsonl") == lines(tmp_path / "usual" / "rank_events.jsonl")


def test_what_it_does_not_go_with_is_refused(tmp_path: Path):
    with pytest.raises(Exception, match="counting would be compiled too"):
        make_recipe(tmp_path, *SETTINGS, "train.compile=true")
