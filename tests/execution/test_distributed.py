"""Two processes on the CPU, launched as `dynlora train --devices 2` does, and Ctrl-C from outside; all slow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from also_helpers import with_also
from numeric import same_curve, same_loss
from safetensors.torch import load_file, save_file
from tiny_run import lines, make_recipe, train

from dynlora_cli.runs import folder as run_folder

pytestmark = pytest.mark.slow

# Each process takes micro-batches in turn, so the step's four rows are the same rows whatever the number of processes.
SETTINGS = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=4"]


def command(folder, *arguments, devices=1):
    return [
        sys.executable,
        "-m",
        "dynlora_cli",
        "train",
        str(folder / "llama.yaml"),
        "--devices",
        str(devices),
        *arguments,
    ]


@contextmanager
def start(arguments):
    """The running command, in a group of its own; nothing of it is left behind."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def wait_for_step(folder, step, process, seconds=90):
    """Wait until this step stands in the metrics."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.is_file() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.05)
    process.terminate()
    pytest.fail(f"step {step} was not reached: {process.communicate()[1]}")


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["adapter.init_weights=eva", "rank.allocation=gora"], marks=pytest.mark.long)],
    ids=["default", "calibrated"],
)
def test_two_processes_train_as_one(tmp_path, more):
    settings = [*SETTINGS, "train.max_grad_norm=null", *more]
    one, _ = train(make_recipe(tmp_path, *settings, out="one"))
    folder = tmp_path / "two"
    arguments = command(tmp_path, *sets(*settings), "--output-dir", str(folder), "--json", devices=2)
    with start(arguments) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    summary = json.loads(out)  # one object, of one process
    assert run_folder.read_record(folder)["processes"] == 2

    assert summary["ranks"] == one["ranks"]
    assert summary["loss_before"] == same_loss(one["loss_before"])
    assert summary["loss_after"] == same_curve(one["loss_after"])
    assert summary["tokens"] == one["tokens"]
    adapters = [load_file(path / "adapter_model.safetensors") for path in (tmp_path / "one", folder)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert (adapters[1][name] - tensor).norm() <= 1e-4 * tensor.norm(), name

    written, expected = lines(folder / "metrics.jsonl"), lines(tmp_path / "one" / "metrics.jsonl")
    assert [(line["event"], line["step"]) for line in written] == [(line["event"], line["step"]) for line in expected]
    pruned, as_one = lines(folder / "rank_events.jsonl"), lines(tmp_path / "one" / "rank_events.jsonl")
    assert [event["ranks"] for event in pruned] == [event["ranks"] for event in as_one]


def test_two_processes_measure_forgetting_as_one(tmp_path):
    """Five rows, dealt unevenly."""
    settings = [*SETTINGS, "train.max_grad_norm=null"]
    one, _ = train(with_also(tmp_path, *settings, f"output_dir={tmp_path / 'one'}", rows=5))
    folder, also = tmp_path / "two", [{"name": "sums", "path": str(tmp_path / "sums.jsonl"), "rows": 5}]
    more = sets(*settings, "train.learning_rate=2e-2", f"eval.also={json.dumps(also)}")
    arguments = command(tmp_path, *more, "--output-dir", str(folder), "--json", devices=2)
    with start(arguments) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    found, expected = json.loads(out)["also"]["sums"], one["also"]["sums"]
    assert {key: found[key] for key in ("rows", "targets", "sha256")} == {
        key: expected[key] for key in ("rows", "targets", "sha256")
    }
    assert found["before"] == same_loss(expected["before"])
    assert found["after"] == same_curve(expected["after"])


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("llama", "true"), pytest.param("bert", "false", marks=pytest.mark.long)]
)
def test_two_processes_share_the_base_between_them(tmp_path, kind, checkpointing):
    """The classifier has a new head, which trains and stays whole; its dropout differs between processes."""
    settings = [*SETTINGS, "train.max_grad_norm=null"]
    one, _ = train(make_recipe(tmp_path, *settings, kind=kind, out="one"))
    folder = tmp_path / "two"
    more = sets(*settings, "train.shard_base=true", f"train.gradient_checkpointing={checkpointing}")
    arguments = command(tmp_path, *more, "--output-dir", str(folder), "--json", devices=2)
    with start([argument.replace("llama.yaml", f"{kind}.yaml") for argument in arguments]) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "Warning" not in err
    summary = json.loads(out)
    assert summary["loss_before"] == same_loss(one["loss_before"])
    assert summary["loss_after"] == pytest.approx(one["loss_after"], rel=1e-4 if kind == "llama" else 0.1)
    adapters = [load_file(path / "adapter_model.safetensors") for path in (tmp_path / "one", folder)]
    if kind == "llama":
        assert summary["ranks"] == one["ranks"]
        for name, tensor in adapters[0].items():
            assert (adapters[1][name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    heads = [{name for name in tensors if "lora" not in name} for tensors in adapters]
    assert heads[0] == heads[1]
    assert bool(heads[0]) == (kind == "bert")
    whole, part = (
        next(line["base_bytes"] for line in lines(path / "metrics.jsonl") if "base_bytes" in line)
        for path in (tmp_path / "one", folder)
    )
    assert part < 0.6 * whole


def test_two_processes_with_rows_that_do_not_come_out_even(tmp_path):
    make_recipe(tmp_path)
    """Nine rows in three micro-batches, and an epoch whose last step has five: some process gets none."""
    settings = ["train.micro_batch_size=3", "train.gradient_accumulation_steps=3", "train.max_steps=8"]
    # B holds signs only after the first step; its SVD basis, turned to so early, would hang on rounding errors.
    settings.append("pruning.gauge=false")
    folder = tmp_path / "two"
    with start(command(tmp_path, *sets(*settings), "--output-dir", str(folder), devices=2)) as process:
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    one, _ = train(make_recipe(tmp_path, *settings, out="one"))
    summary = run_folder.read_record(folder)["summary"]
    assert summary["tokens"] == one["tokens"]
    assert summary["ranks"] == one["ranks"]
    assert summary["loss_after"] == same_loss(one["loss_after"])


@pytest.mark.parametrize("devices", [1, 2])
def test_a_loss_that_is_not_a_number_names_the_rows_of_all_processes(tmp_path, devices):
    make_recipe(tmp_path)
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    settings = sets(*SETTINGS, "dataset.val_size=0", "eval.steps=null")
    with start(command(tmp_path, *settings, "--json", devices=devices)) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 4, err
    assert "Traceback" not in err
    (rows,) = re.findall(r"the loss of step 1 is nan, on rows \[(.*?)\]", json.loads(out)["error"])
    assert len(set(rows.split(", "))) == 4


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("whom", ["the process", "its group"])
def test_ctrl_c_saves_exits_130_and_can_be_resumed(tmp_path, devices, whom):
    """A terminal sends Ctrl-C to the whole group of processes; `kill -INT` and supervisors to one process."""
    make_recipe(tmp_path)
    settings = sets("train.max_steps=4000", "eval.steps=null")
    folder = tmp_path / "out"
    with start(command(tmp_path, *settings, "--json", devices=devices)) as process:
        wait_for_step(folder, 3, process)
        if whom == "the process":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    failure = json.loads(out)
    assert failure["ok"] is False
    assert "interrupted after step" in failure["error"]
    checkpoint = run_folder.step_folders(folder)[-1]
    assert run_folder.fault_of(checkpoint) is None
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 3

    with start(command(tmp_path, *settings, "--resume", devices=devices)) as process:
        wait_for_step(folder, step + 3, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    steps = [line["step"] for line in lines(folder / "metrics.jsonl") if line["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("devices", [1, 2])
def test_exit_codes_are_those_of_the_failure(tmp_path, devices):
    make_recipe(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with start(command(tmp_path, "--json", devices=devices)) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 2, err
    assert "not empty" in json.loads(out)["error"]


def children(process):
    """The two processes that a launcher has started, the first one first."""
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_in_one_message(tmp_path, rank):
    make_recipe(tmp_path)
    settings = sets("train.max_steps=4000", "eval.steps=null")
    with start(command(tmp_path, *settings, "--json", devices=2)) as process:
        wait_for_step(tmp_path / "out", 3, process)
        os.kill(children(process)[rank], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert f"process {rank} was killed by signal 9 (out of memory?)" in json.loads(out)["error"]
    assert "--resume" in json.loads(out)["hint"]
    assert "Traceback" not in err


def test_processes_whose_launcher_was_killed_save_and_end(tmp_path):
    make_recipe(tmp_path)
    folder = tmp_path / "out"
    with start(command(tmp_path, *sets("train.max_steps=4000", "eval.steps=null"), devices=2)) as process:
        wait_for_step(folder, 3, process)
        left = children(process)
        process.kill()
        process.wait(timeout=60)
        until = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{number}") for number in left) and time.monotonic() < until:
            time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{number}") for number in left)
    assert run_folder.step_folders(folder), "what was trained is saved"
    with run_folder.place_of(folder):
        pass  # and the folder is free


def test_old_components_stay_in_all_processes(tmp_path):
    train(make_recipe(tmp_path, out="v1"))
    origin = [f"adapter.from={tmp_path / 'v1'}", "adapter.old=freeze", f"output_dir={tmp_path / 'v2'}"]
    make_recipe(tmp_path, *SETTINGS)
    with start(command(tmp_path, *sets(*SETTINGS, *origin), devices=2)) as process:
        _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    before, after = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("v1", "v2"))
    layers = json.loads((tmp_path / "v2" / "dynlora.json").read_text())["layers"]
    held = 0
    for name, layer in layers.items():
        key = f"base_model.model.{name}.lora_A.weight"
        for row in after[key][: layer["born"][0]] if layer["born"][0] else ():
            assert (before[key] == row).all(1).any(), name
            held += 1
    assert held
