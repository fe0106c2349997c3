"""Stopping and going on: an interrupted run ends in the same bytes, and what is on disk is always whole."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import lines, make_recipe, train

from dynlora_cli.errors import Interrupted, MeasureError, UsageError
from dynlora_cli.evaluation import held_out_loss
from dynlora_cli.kernels import linear_cross_entropy
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.tasks import loss as task_loss
from dynlora_cli.training import checkpoint as checkpoint_module
from dynlora_cli.training import held_out, loop, outputs

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def bytes_of(folder, names=ADAPTER):
    return {name: (folder / name).read_bytes() for name in names}


def steps_on_disk(folder):
    return [path.name for path in run_folder.step_folders(folder)]


def interrupt(recipe, at, **options):
    with pytest.raises(Interrupted) as stopped:
        train(recipe, interrupt_at=at, **options)
    return stopped.value


def assert_same_run(one, other, names=ADAPTER):
    assert bytes_of(one, names) == bytes_of(other, names)
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    assert lines(one / "rank_events.jsonl") == lines(other / "rank_events.jsonl")


# Pruning begins after step 2; events follow steps 4, 6 and 8 of 12.
BEFORE, BEGIN, WITHIN, EVENT, AFTER = 1, 2, 5, 6, 9


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        (["adapter.dropout=0.1"], [BEGIN, WITHIN, EVENT]),
        pytest.param(["adapter.dropout=0.1"], [BEFORE, AFTER], marks=pytest.mark.slow),
        pytest.param(["pruning.gauge=false", "adapter.dropout=0.1"], [WITHIN, EVENT], marks=pytest.mark.slow),
        (["pruning.policy=random"], [EVENT]),
        pytest.param(["pruning.policy=magnitude"], [WITHIN], marks=pytest.mark.slow),
    ],
    ids=["fisher", "fisher, outside pruning", "no gauge", "random", "magnitude"],
)
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, settings, stops):
    train(make_recipe(tmp_path, *settings, out="straight"))
    for stop in stops:
        recipe = make_recipe(tmp_path, *settings, out=f"stopped{stop}")
        folder = tmp_path / f"stopped{stop}"
        interrupt(recipe, stop)
        assert run_folder.pointed(folder, "last").name == f"step-{stop}"
        train(recipe, resume=True)
        assert_same_run(tmp_path / "straight", folder)


@pytest.mark.slow
def test_a_run_interrupted_twice_ends_in_the_same_bytes(tmp_path):
    train(make_recipe(tmp_path, out="straight"))
    recipe = make_recipe(tmp_path, out="stopped")
    interrupt(recipe, 3)
    interrupt(recipe, 7, resume=True)
    train(recipe, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_full_fine_tuning_resumes_to_the_same_bytes(tmp_path):
    settings = ["adapter.variant=full", "train.learning_rate=1e-3", "train.weight_decay=0.1"]
    train(make_recipe(tmp_path, *settings, out="straight"))
    recipe = make_recipe(tmp_path, *settings, out="stopped")
    interrupt(recipe, 5)
    train(recipe, resume=True)
    names = ["model.safetensors", "config.json"]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", names)


@pytest.mark.slow
def test_a_classifier_resumes_to_the_same_bytes(tmp_path):
    train(make_recipe(tmp_path, kind="bert", out="straight"))  # Bert's own dropout draws random numbers too
    recipe = make_recipe(tmp_path, kind="bert", out="stopped")
    interrupt(recipe, 5)
    train(recipe, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_message_says_what_was_done_and_how_to_go_on(tmp_path):
    stopped = interrupt(make_recipe(tmp_path), 3)
    assert "step 3 of 12" in stopped.message
    assert "--resume" in stopped.hint
    assert stopped.exit_code == 130
    assert "summary" not in run_folder.read_record(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path):
    recipe = make_recipe(tmp_path)
    summary, _ = train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again, events = train(recipe, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert again == json.loads(json.dumps(summary))
    assert [event["event"] for event in events] == ["note"]
    assert "finished already" in events[0]["text"]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    train(make_recipe(tmp_path, out="straight"))
    recipe = make_recipe(tmp_path, "train.save_steps=2", out="stopped")
    folder = tmp_path / "stopped"
    interrupt(recipe, 7)
    state = folder / "checkpoints" / "step-7" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    _, events = train(recipe, resume=True)
    assert [event["text"] for event in events if event["event"] == "note"][-1].endswith("step-6")
    assert_same_run(tmp_path / "straight", folder)
    assert "step-7" not in steps_on_disk(folder)  # else the next resume could take what this run never did


def test_no_whole_checkpoint_is_an_error(tmp_path):
    recipe = make_recipe(tmp_path)
    interrupt(recipe, 3)
    (tmp_path / "out/checkpoints/step-3/state.json").unlink()
    with pytest.raises(UsageError, match="no complete checkpoint") as stopped:
        train(recipe, resume=True)
    assert "--overwrite" in stopped.value.hint


def test_another_recipe_is_refused_with_what_differs(tmp_path):
    interrupt(make_recipe(tmp_path), 3)
    with pytest.raises(UsageError) as stopped:
        train(make_recipe(tmp_path, "train.learning_rate=1e-4", "seed=3"), resume=True)
    assert "train.learning_rate: 0.005 then, 0.0001 now" in stopped.value.message
    assert "seed: 0 then, 3 now" in stopped.value.message
    assert "max_steps" not in stopped.value.message
    train(make_recipe(tmp_path, "train.log_steps=5"), resume=True)


def test_other_rows_are_refused(tmp_path):
    recipe = make_recipe(tmp_path)
    interrupt(recipe, 3)
    rows = tmp_path / "llama.jsonl"
    rows.write_text(rows.read_text().replace("words", "other"))
    with pytest.raises(UsageError, match="rows"):
        train(recipe, resume=True)


@pytest.mark.slow
def test_resume_from_goes_on_with_that_checkpoint(tmp_path):
    train(make_recipe(tmp_path, out="straight"))
    recipe = make_recipe(tmp_path, "train.save_steps=3", out="stopped")
    folder = tmp_path / "stopped"
    train(recipe)
    assert steps_on_disk(folder) == ["step-3", "step-6", "step-8", "step-9", "step-12"]
    interrupt(recipe, 5, resume_from=folder / "checkpoints" / "step-3")
    assert steps_on_disk(folder) == ["step-3", "step-5"]
    assert run_folder.pointed(folder, "last").name == "step-5"
    train(recipe, resume=True)
    assert_same_run(tmp_path / "straight", folder)


@pytest.mark.slow
def test_resume_from_another_folder_leaves_that_one_alone(tmp_path):
    source = tmp_path / "source"
    interrupt(make_recipe(tmp_path, out="source"), 7)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    train(make_recipe(tmp_path, out="target"), resume_from=source / "checkpoints" / "step-7")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    train(make_recipe(tmp_path, out="straight"))
    assert_same_run(tmp_path / "straight", tmp_path / "target")


def test_resume_from_another_folder_does_not_write_into_a_third(tmp_path):
    interrupt(make_recipe(tmp_path, out="source"), 3)
    train(make_recipe(tmp_path, "seed=5", out="taken"))
    before = bytes_of(tmp_path / "taken")
    with pytest.raises(UsageError, match="not empty"):
        train(make_recipe(tmp_path, out="taken"), resume_from=tmp_path / "source" / "checkpoints" / "step-3")
    assert bytes_of(tmp_path / "taken") == before


def test_resume_from_nothing_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no complete checkpoint"):
        train(make_recipe(tmp_path), resume_from=tmp_path / "out" / "checkpoints" / "step-3")


# -- what is on disk, and when ---------------------------------------------------------------------------------------


def test_the_folder_is_there_from_step_0(tmp_path):
    seen = {}

    def look(event):
        if event["event"] == "start":
            record = json.loads((tmp_path / "out" / "dynlora.json").read_text())
            seen.update(record=record, adapter=(tmp_path / "out" / ADAPTER[0]).exists())

    from dynlora_cli.commands import train as command

    command.run(make_recipe(tmp_path), listener=look)
    assert seen["record"]["recipe"]["train"]["max_steps"] == 12
    assert "summary" not in seen["record"]
    assert not seen["adapter"]


def losses(monkeypatch, values):
    """Let the held-out loss be these values, one after the other; the first is before training."""
    left = iter(values)
    monkeypatch.setattr(loop, "held_out_loss", lambda run: {"loss": next(left), "tokens": 1, "perplexity": 1.0})


def test_by_default_the_last_two_and_the_best_are_kept(tmp_path, monkeypatch):
    # Evaluations after steps 2, 4, ... 12; the budget is met at step 8.
    losses(monkeypatch, [9, 1, 1, 1, 5, 6, 7])
    _, events = train(make_recipe(tmp_path, "eval.steps=2"))
    folder = tmp_path / "out"
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 4, 6, 8, 10, 12]
    assert steps_on_disk(folder) == ["step-8", "step-10", "step-12"]
    assert run_folder.pointed(folder, "best").name == "step-8"
    assert run_folder.pointed(folder, "last").name == "step-12"
    assert (folder / "checkpoints" / "best").read_text() == "step-8\n"


def test_save_steps_keeps_all(tmp_path, monkeypatch):
    losses(monkeypatch, [9, 1, 1, 4])
    train(make_recipe(tmp_path, "train.save_steps=5"))
    assert steps_on_disk(tmp_path / "out") == ["step-5", "step-8", "step-10", "step-12"]  # 8 is the best


def test_every_ten_minutes_without_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "AUTOSAVE_SECONDS", 0.0)
    _, events = train(make_recipe(tmp_path, "dataset.val_size=0", "eval.steps=null", "train.max_steps=4"))
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [1, 2, 3, 4]
    assert steps_on_disk(tmp_path / "out") == ["step-3", "step-4"]
    assert run_folder.pointed(tmp_path / "out", "best") is None


def test_a_checkpoint_is_a_plain_adapter(tmp_path):
    train(make_recipe(tmp_path, "train.save_steps=3"))
    checkpoint = tmp_path / "out" / "checkpoints" / "step-12"
    assert bytes_of(checkpoint) == bytes_of(tmp_path / "out")
    early = load_file(tmp_path / "out" / "checkpoints" / "step-3" / ADAPTER[0])
    assert sum(tensor.numel() for tensor in early.values()) == 8192


@pytest.mark.slow
def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    recipe = make_recipe(tmp_path, "train.save_steps=3")
    train(recipe)
    with pytest.raises(UsageError, match="not empty"):
        train(recipe)
    short = make_recipe(tmp_path, "train.max_steps=4")
    (tmp_path / "out" / "stale").touch()
    train(short, overwrite=True)
    assert steps_on_disk(tmp_path / "out") == ["step-4"]
    assert not (tmp_path / "out" / "stale").exists()
    assert [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl") if line["event"] == "train"] == [
        1,
        2,
        3,
        4,
    ]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds no dynlora\.json"):
        train(short, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.slow
def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    write_state = checkpoint_module.write_state

    def full_disk(folder, *arguments):
        if "step-8" in folder.name:
            raise OSError(28, "No space left on device")
        write_state(folder, *arguments)

    monkeypatch.setattr(outputs, "write_state", full_disk)
    recipe = make_recipe(tmp_path)
    with pytest.raises(OSError, match="No space"):
        train(recipe)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir() if path.is_dir()] == ["step-4"]
    assert run_folder.pointed(tmp_path / "out", "last").name == "step-4"
    train(recipe, resume=True)
    train(make_recipe(tmp_path, out="straight"))
    assert_same_run(tmp_path / "straight", tmp_path / "out")


# -- a measured number fails -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_rows(tmp_path, monkeypatch):
    honest = linear_cross_entropy.linear_cross_entropy
    calls = itertools.count(1)

    def poisoned(hidden, *given):
        bad = hidden.requires_grad and next(calls) == 2 * 9 + 1  # first micro-batch of step 10
        return honest(hidden, *given) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(task_loss, "linear_cross_entropy", poisoned)
    with pytest.raises(MeasureError, match=r"the loss of step 10 is nan, on rows \[\d+, \d+\]") as stopped:
        train(make_recipe(tmp_path))
    assert stopped.value.exit_code == 4
    folder = tmp_path / "out"
    assert lines(folder / "metrics.jsonl")[-1]["step"] == 9
    assert steps_on_disk(folder) == ["step-4", "step-8"]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "checkpoints" / "step-8" / ADAPTER[0]).values())
    assert not (folder / ADAPTER[0]).exists()
    monkeypatch.undo()
    train(make_recipe(tmp_path), resume=True)


def test_a_gradient_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(float("inf")))
    with pytest.raises(MeasureError, match=r"the gradient of step 1 is inf, on rows \[\d+, \d+, \d+, \d+\]"):
        train(make_recipe(tmp_path))
    assert steps_on_disk(tmp_path / "out") == []


@pytest.mark.parametrize("with_rows_held_out", [True, False])
def test_weights_that_are_not_numbers_stop_before_anything_is_trained(tmp_path, with_rows_held_out):
    settings = [] if with_rows_held_out else ["dataset.val_size=0", "eval.steps=null"]
    recipe = make_recipe(tmp_path, *settings)
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(MeasureError, match="held-out loss is nan" if with_rows_held_out else "loss of step 1 is nan"):
        train(recipe)
    assert steps_on_disk(tmp_path / "out") == []


def test_a_held_out_loss_that_is_not_a_number_is_no_result(tmp_path, monkeypatch):
    honest = held_out_loss.held_out

    def poisoned(model, batches, **options):
        result = honest(model, batches, **options)
        return result | {"loss": float("nan")} if run_folder.pointed(tmp_path / "out", "last") else result

    monkeypatch.setattr(held_out, "held_out", poisoned)
    with pytest.raises(MeasureError, match="held-out loss is nan after step 8"):
        train(make_recipe(tmp_path))
    assert steps_on_disk(tmp_path / "out") == ["step-4"]
