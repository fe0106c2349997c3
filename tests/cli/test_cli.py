"""The command line as a person and a script meet it: help, exit codes, stdout, and what is left on the disk.

`dynlora(...)` runs the command in this process; the last test runs it as a shell would.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Answer, contents
from pico import pico_recipe

from dynlora_cli import __version__
from dynlora_cli.cli.reporting import typed
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.training import setup

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_recipe(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def train(dynlora: Callable[..., Answer], recipe: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Runs `dynlora train` on the small recipe, into a folder of the test's own."""
    return lambda *arguments: dynlora("train", recipe, "--output-dir", tmp_path / "out", *arguments)


@pytest.fixture
def run_in(train: Callable[..., Answer], tmp_path: Path) -> Path:
    """The folder of a finished run of two steps."""
    assert train("--set", "train.max_steps=2").code == 0
    return tmp_path / "out"


def process(*arguments: object, cwd: Path) -> Answer:
    """Runs `dynlora ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "dynlora_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def as_one_line(text: str) -> str:
    return " ".join(text.split())


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "adapt",
        "schema",
        "serve",
        "prune",
        "merge",
        "export",
        "inspect",
        "eval",
        "generate",
        "chat",
        "init",
        "doctor",
        "library",
        "library add",
        "library list",
        "library remove",
    ],
)
def test_help_text(command: str, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    """Golden: after a wanted change write the new text with UPDATE_GOLDEN=1."""
    monkeypatch.setenv("COLUMNS", "120")
    golden = GOLDEN / f"help_{command.replace(' ', '_') or 'dynlora'}.txt"
    code, out, err = dynlora(*command.split(), "--help")
    assert (code, err) == (0, "")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(out, encoding="utf-8")
    assert out == golden.read_text(encoding="utf-8")


def test_no_command_shows_the_help(dynlora: Callable[..., Answer]):
    code, out, err = dynlora()
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_version(dynlora: Callable[..., Answer]):
    assert dynlora("--version") == (0, f"dynlora {__version__}\n", "")


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_do_not_spin(given, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if not given:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    dynlora("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")


@pytest.mark.slow
def test_torch_reads_that_threads_shall_not_spin(tmp_path: Path):
    """libgomp, or whichever torch was built with, tells its settings when it is loaded."""
    code = "import contextlib; from dynlora_cli.cli.app import main\nwith contextlib.suppress(SystemExit): main(['--version'])\nimport torch"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "TRUE"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"OMP_WAIT_POLICY *= *'?PASSIVE", done.stderr)


def test_a_command_is_shown_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "bin" / "dynlora"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/dynlora", "train"])
    monkeypatch.setenv("PATH", "/usr/bin")
    assert typed("eval", "--adapter", "a b") == "bin/dynlora eval --adapter 'a b'"
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin")
    assert typed("eval") == "dynlora eval"
    monkeypatch.setattr(sys, "argv", ["/somewhere/dynlora_cli/__main__.py"])
    assert typed("eval") == "dynlora eval"


def test_schema(dynlora: Callable[..., Answer]):
    answer = dynlora("schema")
    assert answer.code == 0
    assert {"model", "dataset", "adapter", "rank", "pruning", "train"} <= set(answer.json["properties"])


# -- mistakes: exit codes, and one clear message ---------------------------------------------------------------------

MISTAKES = [
    # arguments after `dynlora train RECIPE`, exit code, part of the message
    (["--nope"], 2, "No such option: --nope"),
    (["--output-dirr", "x"], 2, "--output-dir"),
    (["--set", "rank.budgett=4"], 2, "did you mean 'budget'?"),
    (["--set", "rank.budget"], 2, "must be written section.key=value"),
    (["--set", "rank.budget=-1"], 2, "rank.budget"),
    (["--set", "model=./no-such-folder"], 2, "there is no folder ./no-such-folder"),
    (["--set", "model=builtin:tinny"], 2, "did you mean 'builtin:tiny'?"),
    (["--set", "model=nobody/no-such-model"], 3, "nobody/no-such-model"),
    (["--set", "dataset=no-such-file.jsonl"], 2, "no-such-file.jsonl"),
    (["--set", "dataset=nobody/no-such-data"], 3, "nobody/no-such-data"),
    (["--set", "adapter.target_modules=q_prok"], 2, "did you mean 'q_proj'?"),
    (["--overwrite", "--resume"], 2, "exclude each other"),
    (["--resume"], 2, "holds no run"),
    (["--resume-from", "no-such-folder"], 2, "no complete checkpoint"),
    (["--devices", "some"], 2, "--devices some"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_message(
    arguments: list[str], code: int, message: str, train: Callable[..., Answer], tmp_path: Path
):
    answer = train(*arguments)
    assert (answer.code, answer.out) == (code, "")
    assert message in as_one_line(answer.err)
    assert answer.err.lower().count("error:") == 1
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists(), "a run that never began leaves no folder"


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_as_json(arguments: list[str], code: int, message: str, train: Callable[..., Answer]):
    answer = train(*arguments, "--json")
    assert answer.code == code
    assert (answer.json["ok"], answer.json["exit_code"]) == (False, code)
    assert message in as_one_line(f"{answer.json['error']} {answer.json.get('hint')}")


def test_unknown_command(dynlora: Callable[..., Answer]):
    answer = dynlora("trian", "recipe.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert "Did you mean 'train'?" in answer.err


def test_recipe_missing(dynlora: Callable[..., Answer], tmp_path: Path):
    answer = dynlora("train", tmp_path / "none.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert f"no recipe at {tmp_path / 'none.yaml'}" in answer.err


def test_wrong_recipe_reports_every_problem(dynlora: Callable[..., Answer], tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text("model: builtin:tiny\ndataset: rows.jsonl\nrank:\n  budgett: 8\ntrain:\n  max_steps: many\n")
    answer = dynlora("train", path, "--json")
    assert answer.code == 2
    assert f"{path}:4" in answer.json["error"]
    assert f"{path}:6" in answer.json["error"]


# -- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "most"), [(1, 2), (2, 2), (8, 8)])
def test_no_more_processes_than_cores(
    cores: int, most: int, train: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    launched: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("dynlora_cli.cli.train.usable_cores", lambda: cores)
    monkeypatch.setattr("dynlora_cli.cli.train.launch", lambda arguments, count: launched.append(count))
    answer = train("--devices", str(most + 1), "--json")
    assert answer.code == answer.json["exit_code"] == 3
    assert f"no GPU and {cores} usable CPU core" in answer.json["error"]
    assert f"--devices {most}" in answer.json["hint"]
    assert not (tmp_path / "out").exists()
    assert launched == []
    train("--devices", str(most))
    assert launched == [most]


def test_tracker_not_installed(train: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    found = setup.importlib.util.find_spec
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    answer = train("--set", "train.report_to=[mlflow]")
    assert answer.code == 3
    assert 'pip install "dynlora[mlflow]"' in answer.err


def test_no_space_left(train: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def full(path: Path, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(run_folder, "write_json", full)
    answer = train("--json")
    assert answer.code == 3
    assert "no space left on the device" in answer.json["error"]
    assert str(tmp_path) in answer.json["error"]


def test_output_that_cannot_be_written(dynlora: Callable[..., Answer], recipe: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    answer = dynlora("train", recipe, "--output-dir", tmp_path / "file" / "out", "--json")
    assert answer.code == 2
    assert str(tmp_path / "file") in answer.json["error"]
    assert "Traceback" not in answer.err


def test_a_fault_of_ours_keeps_its_traceback(train: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    def fails(path: Path, data: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(run_folder, "write_json", fails)
    with pytest.raises(ZeroDivisionError):
        train("--json")


# -- the output folder -----------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_unasked(train: Callable[..., Answer], run_in: Path):
    before = contents(run_in)
    answer = train()
    assert (answer.code, answer.out) == (2, "")
    assert "--resume" in answer.err
    assert "--overwrite" in answer.err
    assert contents(run_in) == before


def test_overwrite_replaces_a_run(train: Callable[..., Answer], run_in: Path):
    (run_in / "left_over.txt").touch()
    assert train("--overwrite", "--set", "train.max_steps=1").code == 0
    assert not (run_in / "left_over.txt").exists()
    assert json.loads((run_in / "dynlora.json").read_text())["summary"]["steps"] == 1


def test_overwrite_never_empties_another_folder(train: Callable[..., Answer], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years of work")
    answer = train("--overwrite")
    assert (answer.code, answer.out) == (2, "")
    assert "--overwrite replaces only what dynlora made" in answer.err
    assert contents(tmp_path / "out") == {"thesis.txt": b"three years of work"}


def test_a_failed_overwrite_keeps_the_old_run(train: Callable[..., Answer], run_in: Path):
    before = contents(run_in)
    assert train("--overwrite", "--set", "dataset=no-such-file.jsonl").code == 2
    assert contents(run_in) == before


def test_resume_of_a_finished_run_says_so(train: Callable[..., Answer], run_in: Path):
    before = contents(run_in)
    answer = train("--resume", "--set", "train.max_steps=2", "--json")
    assert answer.code == 0
    assert "finished already" in answer.err
    assert answer.json["steps"] == 2
    assert contents(run_in) == before


def test_resume_with_another_recipe_is_refused(train: Callable[..., Answer], run_in: Path):
    answer = train("--resume", "--set", "train.max_steps=2", "--set", "train.learning_rate=0.1")
    assert answer.code == 2
    assert "train.learning_rate: 0.005 then, 0.1 now" in answer.err


# -- results ---------------------------------------------------------------------------------------------------------


def test_train_for_a_person(train: Callable[..., Answer], recipe: Path, tmp_path: Path):
    answer = train()
    assert (answer.code, answer.out) == (0, "")
    assert "\x1b" not in answer.err, "no colours and no animation where stderr is no terminal"
    for part in ("format completion", "held-out loss", "prune", str(tmp_path / "out"), "Next\n  dynlora eval"):
        assert part in answer.err
    assert {"adapter_config.json", "adapter_model.safetensors", "dynlora.json", "report.html"} <= set(
        os.listdir(tmp_path / "out")
    )


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2", "0.05"])
def test_the_next_commands_work(
    budget: str, train: Callable[..., Answer], dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
):
    answer = train("--set", "train.max_steps=1", "--set", f"rank.budget={budget}", "--json")
    *commands, look = map(shlex.split, answer.json["next"])
    assert [command[:2] for command in commands] == [["dynlora", name] for name in ("eval", "chat", "prune", "merge")]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    for _, *arguments in commands:
        assert dynlora(*arguments).code == 0
    assert Path(look[-1]).is_file(), "the report, to be looked at"


def test_train_for_a_script(train: Callable[..., Answer], tmp_path: Path):
    answer = train("--json")
    assert answer.code == 0
    summary = answer.json
    assert summary["ok"] is True
    assert summary["output_dir"] == str(tmp_path / "out")
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert sum(summary["ranks"].values()) == summary["components"]
    assert "held-out loss" in answer.err, "people's text goes to stderr"


def test_dry_run_writes_nothing(train: Callable[..., Answer], recipe: Path, tmp_path: Path):
    before = contents(recipe.parent)
    answer = train("--dry-run")
    assert (answer.code, answer.out) == (0, "")
    for part in ("Target modules", "q_proj", "Schedule", "counts in the loss"):
        assert part in answer.err
    assert list(tmp_path.iterdir()) == []
    assert contents(recipe.parent) == before


@pytest.mark.slow
def test_dry_run_plans_what_the_run_does(train: Callable[..., Answer]):
    plan = train("--dry-run", "--json").json["plan"]
    summary = train("--json").json
    assert plan["steps"] == summary["steps"]
    assert plan["parameters"]["start"] == summary["parameters_start"]
    assert plan["parameters"]["budget"] == summary["budget_parameters"]
    assert {row["name"] for row in plan["modules"]} == set(summary["ranks"])


# -- as a shell runs it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_process_train_and_refuse(recipe: Path, tmp_path: Path):
    """Relative paths are relative to the current folder; stdout holds JSON alone, whatever libraries print."""
    arguments = ["train", recipe, "--output-dir", "out", "--set", "train.max_steps=2", "--json"]
    first = process(*arguments, cwd=tmp_path)
    assert first.code == 0, first.err
    assert first.json["output_dir"] == "out"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    second = process(*arguments, cwd=tmp_path)
    assert (second.code, second.json["ok"]) == (2, False)
