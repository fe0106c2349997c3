"""Several machines: two torchrun agents on one, what is killed, what hangs, what differs; SLURM and SkyPilot files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from processes_helper import two
from tiny_run import lines, make_recipe, train

from dynlora_cli.execution import elastic, lost

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "scripts" / "cluster"
SETTINGS = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=4", "train.save_steps=2"]
SECONDS = 600


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(*commands: Sequence[str], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The running commands, each in a group of its own; nothing of them is left behind."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", elastic.UNSHARED: "1"}
    with ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(command, env=os.environ | variables | environment, **pipes))
            for command in commands
        ]
        try:
            yield running
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def ended(running: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    said = ["".join(process.communicate(timeout=SECONDS)) for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def until(found: Callable[[], object], running: Sequence[subprocess.Popen[str]], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not found():
        if time.monotonic() > end or any(process.poll() is not None for process in running):
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"in vain: {ended(running)}")
        time.sleep(0.05)


def reached(folder: Path, step: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.is_file() and f'"step": {step},' in path.read_text()


def workers(folder: Path) -> dict[int, int]:
    """The processes that train into this folder: process numbers by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        rank = next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), None)
        if rank is not None and str(folder).encode() in command:
            found[rank] = int(process.name)
    return found


def adapter(folder: Path) -> str:
    return sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def agents(tmp_path: Path, folder: Path, *settings: str, restarts: int = 1) -> list[list[str]]:
    """Two agents, as on two machines, each with one process."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", folder.name]
    train = ["-m", "dynlora_cli", "train", str(tmp_path / "llama.yaml"), "--output-dir", str(folder)]
    agent = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts), *rendezvous]
    return [[*agent, *train, *words(*settings)]] * 2


def alone(tmp_path: Path, folder: Path, *settings: str, devices: int = 2) -> list[str]:
    train = [sys.executable, "-m", "dynlora_cli", "train", str(tmp_path / "llama.yaml"), "--output-dir", str(folder)]
    return [*train, "--devices", str(devices), *words(*settings)]


@pytest.mark.slow
def test_a_killed_worker_of_two_machines_comes_back_to_the_same_bytes(tmp_path: Path):
    make_recipe(tmp_path)
    settings = [*SETTINGS, "train.max_steps=24", "adapter.dropout=0.1"]  # each process draws numbers of its own
    with started(alone(tmp_path, tmp_path / "whole", *settings)) as running:
        ((code, said),) = ended(running)
    assert code == 0, said
    folder = tmp_path / "killed"
    with started(*agents(tmp_path, folder, *settings)) as running:
        until(reached(folder, 7), running)
        os.kill(workers(folder)[1], signal.SIGKILL)
        found = ended(running)
    assert [code for code, _ in found] == [0, 0], found
    assert "this job (killed) began the run" in "".join(said for _, said in found)
    assert adapter(folder) == adapter(tmp_path / "whole")
    steps = [line["step"] for line in lines(folder / "metrics.jsonl") if line["event"] == "train"]
    assert steps == list(range(1, 25)), "each step once, in order"


@pytest.mark.long
def test_workers_whose_agent_was_killed_save_and_end(tmp_path: Path):
    make_recipe(tmp_path)
    folder = tmp_path / "out"
    settings = ["train.max_steps=4000", "eval.steps=null"]
    command = ["torchrun", "--nproc-per-node", "2", "-m", *alone(tmp_path, folder, *settings, devices=1)[2:]]
    with started(command) as running:
        until(reached(folder, 3), running)
        os.kill(running[0].pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while workers(folder) and time.monotonic() < end:
            time.sleep(0.1)
    assert not workers(folder)
    assert list((folder / "checkpoints").glob("step-*")), "what was trained is saved"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_process_that_hangs_ends_the_run_and_is_named(tmp_path: Path, rank: int):
    make_recipe(tmp_path)
    folder = tmp_path / "out"
    settings = ["train.max_steps=4000", "eval.steps=null", "train.save_steps=2", "train.ddp_timeout=4"]
    with started([*alone(tmp_path, folder, *settings), "--json"]) as running:
        until(reached(folder, 3), running)
        os.kill(workers(folder)[rank], signal.SIGSTOP)
        ((code, said),) = ended(running)
    assert code == 1, said
    assert "longer than train.ddp_timeout" in said
    named = f"process {rank} did not answer in time" if rank else "where they meet (process 0, or torchrun"
    assert named in said
    assert "Traceback" not in said
    assert not workers(folder)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_rows(tmp_path: Path):
    """Two micro-batches a step, whose gradients two processes add up as one does: the bytes are the same as well."""
    settings = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2", "train.save_steps=4"]
    train(make_recipe(tmp_path, *settings, out="one"))
    command = alone(tmp_path, tmp_path / "two", *settings)
    with started([*command, "--resume-from", str(tmp_path / "one" / "checkpoints" / "step-4")]) as running:
        ((code, said),) = ended(running)
    assert code == 0, said
    curves = [
        [(line["step"], line["loss"]) for line in lines(tmp_path / out / "metrics.jsonl") if line["event"] == "train"]
        for out in ("one", "two")
    ]
    assert len(curves[0]) == 12
    assert curves[0][4:] == curves[1][-8:]
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two")


DIFFERS = """
import os, sys
from dynlora_cli.cli.app import main
from dynlora_cli.pruning.signals import GateGradients

observe, rank = GateGradients.observe, os.environ["RANK"]
def wrong(self, pool, *arguments):
    if rank == {where!r} and {what!r} == "importance":
        pool.values.grad *= 3
    observe(self, pool, *arguments)
GateGradients.observe = wrong
if rank == {where!r} and {what!r} == "rows":
    sys.argv += ["--set", "dataset.max_length=64"]
try:
    main(sys.argv[1:])
except SystemExit as end:
    if rank == "0":
        print("code", end.code)
        print(open("script.0.err").read())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "importance",
            r"process 1 on \S+: other importance of components .* than in process 0 on \S+ before the pruning of",
        ),
        ("rows", r"process 1 on \S+: the recipe is not as in process 0"),
    ],
)
def test_a_process_that_differs_ends_the_run_and_is_named(tmp_path: Path, what: str, said: str):
    make_recipe(tmp_path, *SETTINGS)
    arguments = ["train", str(tmp_path / "llama.yaml"), "--output-dir", str(tmp_path / "out"), *words(*SETTINGS)]
    out = two(DIFFERS.format(where="1", what=what), *arguments, folder=tmp_path)
    assert out.startswith("code 1"), out
    assert re.search(said, " ".join(out.split())), out


ROUNDS = """
import os, torch
from accelerate import Accelerator
from dynlora_cli.errors import DynloraError
from dynlora_cli.execution.alike import same_facts, same_numbers

Accelerator(cpu=True)
rank = int(os.environ["RANK"])
values, counts = torch.arange(1.0, 101), torch.arange(5)
if rank == 2:
    values[7] *= 1 + 1e-6
told = same_numbers({"values": values, "counts": counts}, "at step 4")
assert values.equal(torch.arange(1.0, 101))
said = [told]
for tensors in ({"values": values * (5 if rank == 1 else 1)}, {"values": values[: 9 if rank == 1 else 10]},
                {"counts": counts + (rank == 0)}, {"values": values / (rank != 2)},
                {"values": values, **({"more": values.sum()} if rank else {})}, {"values": values.to(
                    torch.float64 if rank == 1 else torch.float32)}):
    try:
        same_numbers(tensors, "at step 5")
    except DynloraError as error:
        said.append(error.message)
try:
    same_facts({"the rows": "a", "the base": "b" if rank else "c"})
except DynloraError as error:
    said.append(error.message)
assert same_numbers({"values": values}, "at step 6") is None
if rank == 0:
    print("\\n".join(map(str, said)))
"""


@pytest.mark.slow
def test_three_processes_agree_by_majority(tmp_path: Path):
    out = two(ROUNDS, folder=tmp_path, processes=3)
    found = [re.sub(r" on [^ :,]+", "", line) for line in out.splitlines() if "process" in line]
    assert len(found) == 8, out
    assert found[0].startswith("process 2: values differ by ")
    assert "from process 0's at step 4, as between processors of two kinds" in found[0]
    assert found[1].startswith("process 1: other values than in process 0 at step 5, by 4 of their size")
    assert found[2] == "process 1: other values than in process 0 at step 5"
    assert found[3] == "process 0: other counts than in process 1 at step 5"
    assert found[4] == "process 2: other values than in process 0 at step 5, by inf of their size"
    assert found[5] == "process 0: other more than in process 1 at step 5"
    assert found[6] == "process 1: other values than in process 0 at step 5"
    assert found[7] == "process 0: the base is not as in process 1"


def test_what_a_job_began_goes_on_and_what_others_began_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = elastic.Ways(overwrite=True, resume=False, resume_from=None)
    monkeypatch.delenv(elastic.RUN_ID, raising=False)
    record = tmp_path / "dynlora.json"
    record.write_text(json.dumps({"elastic_job": "one"}), encoding="utf-8")
    assert elastic.ways(tmp_path, asked) == (asked, None), "without torchrun"
    monkeypatch.setenv(elastic.RUN_ID, "two")
    monkeypatch.setenv(elastic.RESTARTS, "1")
    assert elastic.ways(tmp_path, asked) == (asked, None), "somebody else's"
    monkeypatch.setenv("RANK", "1")
    assert elastic.ways(tmp_path, asked)[0].overwrite, "the first process refuses what is not its job's"
    monkeypatch.setenv(elastic.RUN_ID, "one")
    began, told = elastic.ways(tmp_path, asked._replace(overwrite=False, resume=True))
    assert began == elastic.Ways(True, False, None)
    assert "had saved nothing of it" in str(told)
    record.write_text(json.dumps({"elastic_job": "one", "summary": {}}), encoding="utf-8")
    assert elastic.ways(tmp_path, asked)[0] == elastic.Ways(False, True, None)


def test_a_job_without_a_name_is_its_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(elastic.RUN_ID, elastic.UNNAMED)
    assert elastic.job() == elastic.job()
    assert f"torchrun {os.getppid()}, started" in str(elastic.job())


def test_restarts_that_would_fail_are_told_of_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(elastic.UNSHARED, raising=False)
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_MAX_RESTARTS", "3")):
        monkeypatch.setenv(name, value)
    assert elastic.note() is None, "one machine"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert elastic.UNSHARED in str(elastic.note())
    monkeypatch.setenv(elastic.UNSHARED, "1")
    assert elastic.note() is None


def test_processes_that_never_came_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = RuntimeError("gloo: Timed out after 5 seconds waiting for clients. 3/4 clients joined.")
    assert lost.lost_others(error)
    assert "3 of 4 processes came" in lost.explained(error).message


# -- files for clusters ----------------------------------------------------------------------------------------------

SRUN = """#!{python}
# srun of a cluster of two machines that are both this one: the command, once for each.
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
both = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}})
        for node in range(2)]
sys.exit(max(each.wait() for each in both))
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines(tmp_path: Path):
    make_recipe(tmp_path, *SETTINGS)
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "srun", SRUN.format(python=sys.executable))
    executable(tools / "scontrol", "#!/bin/sh\nprintf 'localhost\\nlocalhost\\n'\n")
    script = shutil.copy(CLUSTER / "slurm.sh", tmp_path / "slurm.sh")
    text = Path(script).read_text(encoding="utf-8")
    assert re.search(r"^#SBATCH --nodes=2$", text, re.MULTILINE)
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "30"}
    variables |= {"SLURM_GPUS_ON_NODE": "1", "PORT": str(free_port())}
    variables["PATH"] = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = [str(tmp_path / "llama.yaml"), "--output-dir", str(tmp_path / "out"), *words(*SETTINGS)]
    with started(["bash", script, *arguments], **variables) as running:
        ((code, said),) = ended(running)
    assert code == 0, said
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text(encoding="utf-8"))
    assert record["processes"] == 2
    assert record["elastic_job"] == "30"


def test_the_skypilot_task_starts_torchrun_on_each_machine(tmp_path: Path):
    """What it runs there, with the variables that SkyPilot sets, and a torchrun that writes down how it was called."""
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["num_nodes"] == 2
    executable(tmp_path / "torchrun", '#!/bin/sh\necho "$@"\n')
    (tmp_path / "dynlora" / "bin").mkdir(parents=True)
    (tmp_path / "dynlora" / "bin" / "activate").touch()
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    variables |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-30", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    variables |= {"HOME": str(tmp_path), **{key: str(value) for key, value in task["envs"].items()}}
    said = subprocess.run(["bash", "-ec", task["run"]], env=variables, capture_output=True, text=True, check=True)
    assert "--nnodes 2 --nproc-per-node 8" in said.stdout
    assert "--rdzv-endpoint 10.0.0.7:" in said.stdout
    assert "--rdzv-id sky-30" in said.stdout
    assert f"-m dynlora_cli train {task['envs']['RECIPE']} --output-dir" in said.stdout


@pytest.mark.long
def test_skypilot_reads_the_task(tmp_path: Path):
    """SkyPilot itself, in an environment of its own, for it wants another typer."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "sky"], check=True)
    subprocess.run([tmp_path / "sky" / "bin" / "pip", "install", "-q", "skypilot"], check=True)
    code = f"import sky; task = sky.Task.from_yaml({str(CLUSTER / 'skypilot.yaml')!r}); print(task.num_nodes, task.run)"
    said = subprocess.run([tmp_path / "sky" / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("2 ")
