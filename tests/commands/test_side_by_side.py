"""`dynlora train A.yaml B.yaml ...`: runs as they would be alone, going on, what fails, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file
from tiny_run import lines, model_folder, write_rows

from dynlora_cli.cli.views.lanes import LanesView

# Rounding, through some steps of Adam. It is as much between `train.fused: true` and false.
ROUNDING = 5e-6
# Different in ranks, targets, lengths, rates, policies, batches and seeds.
OWN = {
    "one": {"rank": {"init": 8, "budget": 2}},
    "two": {
        "rank": {"init": 4, "budget": 3},
        "pruning": {"policy": "magnitude", "start": 0.2, "end": 0.7, "events": 2},
        "train": {"max_steps": 9, "micro_batch_size": 4, "learning_rate": 2e-3, "log_steps": 2},
        "seed": 1,
    },
    "three": {
        "rank": {"init": 8, "budget": 1},
        "adapter": {"target_modules": ["q_proj", "v_proj"]},
        "train": {
            "max_steps": 15,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 3,
            "learning_rate": 5e-3,
            "log_steps": 1,
        },
    },
}


def recipe_files(folder: Path, out: Path, **changes: dict) -> list[Path]:
    """Three recipes of runs into folders of `out` that are named as they are."""
    shared = {
        "model": str(model_folder(folder)),
        "dataset": {"train": [str(write_rows(folder / "rows.jsonl"))], "val_size": 0.2, "max_length": 96},
        "rank": {"init": 8, "budget": 2},
        "pruning": {"start": 0.17, "end": 0.67, "events": 3},
        "train": {
            "max_steps": 12,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "log_steps": 1,
        },
        "eval": {"samples": 0, "steps": 4},
    }
    found = []
    for name, own in OWN.items():
        path = folder / f"{name}.yaml"
        recipe = shared | own | changes.get(name, {}) | {"output_dir": str(out / name)}
        path.write_text(json.dumps(recipe), encoding="utf-8")
        found.append(path)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each of them has been trained by itself."""
    from dynlora_cli.commands import train
    from dynlora_cli.config.load import load_recipe

    folder = tmp_path_factory.mktemp("alone")
    for path in recipe_files(folder, folder / "out"):
        train.run(load_recipe(path))
    return folder / "out"


@pytest.fixture(autouse=True)
def all_in_one_pass(monkeypatch):
    monkeypatch.setattr("dynlora_cli.training.lanes.batch.MOST_PADDED", 100.0)


def products(folder: Path) -> dict[str, torch.Tensor]:
    """BA of every layer: a factor's sign, which the SVD of a gauge leaves open, is not in it."""
    saved = load_file(folder / "adapter_model.safetensors")
    return {
        name: saved[name.replace("lora_A", "lora_B")].double() @ a_CI.double()
        for name, a_CI in saved.items()
        if "lora_A" in name
    }


def record(folder: Path) -> dict:
    return json.loads((folder / "dynlora.json").read_text("utf-8"))


def assert_same_run(one: Path, other: Path) -> None:
    mine, theirs = products(one), products(other)
    assert mine.keys() == theirs.keys()
    size = sum(delta.square().sum() for delta in theirs.values()).sqrt()
    assert sum((mine[name] - theirs[name]).square().sum() for name in mine).sqrt() <= ROUNDING * size
    assert record(one).keys() == record(other).keys()
    assert record(one)["summary"]["ranks"] == record(other)["summary"]["ranks"]
    for file, keys in (("rank_events.jsonl", ("step", "event", "ranks")), ("metrics.jsonl", ("step", "tokens"))):
        first, second = ([{key: row.get(key) for key in keys} for row in lines(run / file)] for run in (one, other))
        assert first == second, file
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


def states(answer) -> dict[str, str]:
    return {row["name"]: row["state"] for row in answer.json["runs"]}


def test_runs_side_by_side_are_what_they_are_alone(alone: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("train", *recipe_files(tmp_path, tmp_path / "out"), "--json")
    assert answer.code == 0
    assert (answer.json["ok"], states(answer)) == (True, dict.fromkeys(OWN, "done"))
    for name in OWN:
        assert_same_run(tmp_path / "out" / name, alone / name)
    assert "3 runs side by side" in answer.err
    assert "one  done: held out" in answer.err


def test_each_finds_its_own_learning_rate(tmp_path: Path, dynlora: Dynlora):
    from dynlora_cli.commands import train
    from dynlora_cli.config.load import load_recipe

    files = recipe_files(tmp_path, tmp_path / "out")[:2]
    automatic = ["train.learning_rate=auto", "train.warmup_steps=1"]
    answer = dynlora("train", *files, *(word for text in automatic for word in ("--set", text)), "--json")
    assert answer.code == 0
    for row, file in zip(answer.json["runs"], files, strict=True):
        alone_ = train.run(load_recipe(file, automatic, str(tmp_path / "alone" / file.stem)))
        assert row["summary"]["learning_rate"] == alone_["learning_rate"]
        assert row["summary"]["learning_rate_from"] == alone_["learning_rate_from"]


def test_one_that_diverges_ends_alone(alone: Path, tmp_path: Path, dynlora: Dynlora):
    wild = {"train": OWN["two"]["train"] | {"learning_rate": 1.0, "max_grad_norm": None, "lora_plus_ratio": 1e30}}
    files = recipe_files(tmp_path, tmp_path / "out", two=wild)
    answer = dynlora("train", *files, "--json")
    assert answer.code == 4
    assert states(answer) == {"one": "done", "two": "failed", "three": "done"}
    assert "lower train.learning_rate" in answer.json["runs"][1]["hint"]
    assert "1 of 3 runs failed: two" in answer.err
    for name in ("one", "three"):
        assert_same_run(tmp_path / "out" / name, alone / name)


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int, times: int = 1) -> None:
    """Ctrl-C at a step of a run, once or twice."""
    hear = LanesView.hear

    def heard(self: LanesView, run: str, event: dict) -> None:
        hear(self, run, event)
        if run == name and event["event"] == "tick" and event["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LanesView, "hear", heard)


@pytest.mark.parametrize("times", [1, 2])
def test_after_ctrl_c_all_go_on_to_the_same_end(alone: Path, tmp_path: Path, monkeypatch, dynlora: Dynlora, times: int):
    files = recipe_files(tmp_path, tmp_path / "out")
    with monkeypatch.context() as patched:
        stop_at(patched, "two", 3, times)
        stopped = dynlora("train", *files)
    assert stopped.code == 130
    assert dynlora("train", *files).code == 2 or times == 2, "what is there is not replaced unasked"
    again = dynlora("train", *files, "--resume", "--json")
    assert again.code == 0
    assert states(again) == dict.fromkeys(OWN, "done")
    for name in OWN:
        assert_same_run(tmp_path / "out" / name, alone / name)


def test_one_of_them_goes_on_alone(alone: Path, tmp_path: Path, monkeypatch, dynlora: Dynlora):
    files = recipe_files(tmp_path, tmp_path / "out")
    with monkeypatch.context() as patched:
        stop_at(patched, "one", 3)
        stopped = dynlora("train", *files)
    assert stopped.code == 130
    assert "--resume" in stopped.err
    assert dynlora("train", files[0], "--resume").code == 0
    assert_same_run(tmp_path / "out" / "one", alone / "one")
    done = dynlora("train", *files, "--resume", "--json")
    assert states(done) == dict.fromkeys(OWN, "done")


def test_a_dry_run_plans_each(tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("train", *recipe_files(tmp_path, tmp_path / "out"), "--dry-run", "--json")
    assert answer.code == 0
    assert [run["name"] for run in answer.json["plan"]["runs"]] == list(OWN)
    assert not (tmp_path / "out").exists()


def test_set_and_output_dir_hold_for_all(tmp_path: Path, dynlora: Dynlora):
    files = recipe_files(tmp_path, tmp_path / "out")
    settings = ("--set", "train.max_steps=2", "--set", "train.learning_rate=1e-3", "--output-dir", tmp_path / "new")
    answer = dynlora("train", *files[:2], *settings, "--json")
    assert answer.code == 0
    assert [row["summary"]["steps"] for row in answer.json["runs"]] == [2, 2]
    assert [Path(row["output_dir"]) for row in answer.json["runs"]] == [tmp_path / "new" / n for n in ("one", "two")]
    assert dynlora("train", *files[:2], *settings).code == 2
    assert dynlora("train", *files[:2], *settings, "--overwrite").code == 0


REFUSED = [
    ({"model": "builtin:tiny"}, "model.name_or_path: 'builtin:tiny' here and"),
    ({"adapter": {"variant": "full"}}, "adapter.variant: full has no components"),
    ({"train": {"compile": True}}, "train.compile: compiled blocks hold one adapter"),
    ({"train": {"cuda_graphs": True}}, "train.cuda_graphs: recorded passes hold one adapter"),
    ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing: true here and false in one"),
    ({"train": {"report_to": ["wandb"]}}, "wandb follows one run in a process"),
    ({"adapter": {"new_tokens": [{"content": "<x>"}]}}, "adapter.new_tokens: they change the tables"),
    ({"adapter": {"target_modules": ["all-linear", "experts"]}}, "experts see some of the tokens"),
    ({"train": {"objective": "dpo"}}, "train.objective: dpo makes passes of its own"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[says.split(":")[0] for _, says in REFUSED])
def test_what_cannot_share_a_base_is_refused(tmp_path: Path, dynlora: Dynlora, change: dict, says: str):
    files = recipe_files(tmp_path, tmp_path / "out", two=change)
    answer = dynlora("train", *files[:2])
    assert answer.code == 2
    assert f"two: {says}" in answer.err or says in answer.err
    assert "share each pass through one frozen base" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--resume-from", "x"), "--resume-from goes on with a single run"),
        (("--sweep", "seed=1,2"), "--sweep tries values of one recipe"),
        (("--model", "builtin:tiny"), "--model stands for a recipe"),
        (("--devices", "2"), "in one process, on one device"),
        (("--overwrite", "--resume"), "exclude each other"),
    ],
    ids=str,
)
def test_options_of_a_single_run_are_refused(tmp_path: Path, dynlora: Dynlora, options, says: str):
    answer = dynlora("train", *recipe_files(tmp_path, tmp_path / "out"), *options)
    assert answer.code == 2
    assert says in answer.err


def test_processes_of_torchrun_are_refused(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = dynlora("train", *recipe_files(tmp_path, tmp_path / "out"))
    assert answer.code == 2
    assert "leave --devices, or torchrun, out" in answer.err
    assert not (tmp_path / "out").exists()


def test_runs_into_one_folder_are_refused(tmp_path: Path, dynlora: Dynlora):
    files = recipe_files(tmp_path, tmp_path / "out")
    answer = dynlora("train", *files, "--set", f"output_dir={tmp_path / 'same'}")
    assert answer.code == 2
    assert "is that of one as well; each run needs its own" in answer.err
    assert "given twice" in dynlora("train", files[0], files[0]).err


def test_a_sweep_trains_side_by_side(tmp_path: Path, dynlora: Dynlora):
    recipe, out = recipe_files(tmp_path, tmp_path / "out")[0], tmp_path / "swept"
    sweep = ("--sweep", "seed=0,1", "--sweep", "rank.budget=2,3")
    answer = dynlora("train", recipe, *sweep, "--side-by-side", "--output-dir", out, "--json")
    assert answer.code == 0
    assert [row["state"] for row in answer.json["runs"]] == ["done"] * 4
    assert answer.json["best"] in [row["run"] for row in answer.json["runs"]]
    one = dynlora("train", recipe, "--set", "seed=1", "--output-dir", tmp_path / "one")
    assert one.code == 0
    assert_same_run(out / "seed-1_budget-2", tmp_path / "one")
    again = dynlora("train", recipe, *sweep, "--output-dir", out, "--resume", "--json")
    assert [row["state"] for row in again.json["runs"]] == ["done"] * 4


def test_an_interrupted_sweep_side_by_side_goes_on(tmp_path: Path, monkeypatch, dynlora: Dynlora):
    recipe, out = recipe_files(tmp_path, tmp_path / "out")[0], tmp_path / "swept"
    sweep = ("train", recipe, "--sweep", "seed=0,1", "--side-by-side", "--output-dir", out)
    with monkeypatch.context() as patched:
        stop_at(patched, "seed-0", 3)
        stopped = dynlora(*sweep)
    assert stopped.code == 130
    assert "2 of 2 runs are not done" in stopped.err
    assert dynlora(*sweep, "--resume").code == 0


def test_a_sweep_that_cannot_share_a_base_is_refused(tmp_path: Path, dynlora: Dynlora):
    recipe = recipe_files(tmp_path, tmp_path / "out")[0]
    answer = dynlora("train", recipe, "--sweep", "model.dtype=float32,bfloat16", "--side-by-side")
    assert answer.code == 2
    assert "model.dtype: 'bfloat16' here and 'float32' in" in answer.err
    assert "there is one" in dynlora("train", recipe, "--side-by-side").err
