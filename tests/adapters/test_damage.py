"""Damaged, foreign and torn checkpoints are named, and the next older one is taken; what ends a run is said in words."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from tiny_run import make_recipe, train

from dynlora_cli.adapters.find import CONFIG, PACKED, find_adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.cli.reporting import reporting
from dynlora_cli.config.resume import same_recipe
from dynlora_cli.errors import DynloraError, Interrupted, UsageError
from dynlora_cli.execution import interrupt
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.training import loop, outputs
from dynlora_cli.training.checkpoint import fault_in

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 9 of 12 with a checkpoint every 3 steps, one of another seed, and a whole one."""
    folder = tmp_path_factory.mktemp("stopped")
    for out, more in (("stopped", []), ("other", ["seed=7"])):
        with pytest.raises(Interrupted):
            train(make_recipe(folder, "train.save_steps=3", *more, out=out), interrupt_at=9)
    train(make_recipe(folder, "train.save_steps=3", out="straight"))
    return folder


@pytest.fixture
def run(stopped: Path) -> Path:
    """A copy of the stopped run."""
    copy = stopped / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(stopped / "stopped", copy)
    return copy


def resume(run: Path) -> list[str]:
    """The notes of a run that goes on."""
    recipe = make_recipe(run.parent, "train.save_steps=3", out=run.name)
    return [event["text"] for event in train(recipe, resume=True)[1] if event["event"] == "note"]


def as_0_1(checkpoint: Path) -> None:
    """A checkpoint as version 0.1 wrote it."""
    state = json.loads((checkpoint / "state.json").read_text())
    kept = ("progress", "counts", "parameters", "scaler", "sizes")
    (checkpoint / "state.json").write_text(json.dumps({key: state[key] for key in kept}))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the state": lambda c: flip(c / "state.safetensors", -1000),
    "a flipped bit in the adapter": lambda c: flip(c / WEIGHTS, -1),
    "a digit of the position": lambda c: change(c / "state.json", parameters=1),
    "zeros": lambda c: (c / "state.safetensors").write_bytes(bytes((c / "state.safetensors").stat().st_size)),
    "cut off": lambda c: os.truncate(c / "state.safetensors", 100),
    "a file is missing": lambda c: (c / WEIGHTS).unlink(),
    "a file is a folder": lambda c: ((c / WEIGHTS).unlink(), (c / WEIGHTS).mkdir()),
    "a list": lambda c: (c / "state.json").write_text("[]"),
    "no text": lambda c: (c / "state.json").write_bytes(b"\xff\xfe\x00"),
    "too deep": lambda c: (c / "state.json").write_text("[" * 100_000),
    "no sizes": lambda c: change(c / "state.json", sizes={}),
    "hashes of another type": lambda c: change(c / "state.json", sha256=["a"]),
    "no state": lambda c: (c / "state.json").unlink(),
    "a file": lambda c: (shutil.rmtree(c), c.write_text("")),
    "of 0.1, zeros": lambda c: (as_0_1(c), DAMAGE["zeros"](c)),
    "of 0.1, no progress": lambda c: (as_0_1(c), change(c / "state.json", progress=3)),
    "of 0.1, counts are words": lambda c: (as_0_1(c), change(c / "state.json", counts={"a": "many"})),
    "another step's": lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("step-3"), c)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_any_damage_is_found(run: Path, damage: Callable[[Path], object]):
    record, checkpoint = run_folder.read_record(run), run / "checkpoints" / "step-9"
    assert fault_in(checkpoint, record) is None
    damage(checkpoint)
    assert fault_in(checkpoint, record)


def test_random_state_of_0_1_that_no_generator_takes(run: Path):
    checkpoint = run / "checkpoints" / "step-9"
    tensors = load_file(checkpoint / "state.safetensors")
    tensors["random.cpu"] = tensors["random.cpu"].clone().zero_()
    save_file(tensors, checkpoint / "state.safetensors", metadata={"format": "pt"})
    as_0_1(checkpoint)
    change(run / "dynlora.json", run_id=None)
    assert "damaged" in (fault_in(checkpoint, run_folder.read_record(run)) or "")


def test_the_next_older_one_is_taken_and_the_end_is_the_same(run: Path):
    flip(run / "checkpoints" / "step-9" / "state.safetensors", -1000)
    (run / "checkpoints" / "step-\u00b2").mkdir()
    notes = resume(run)
    assert any("step-9 is damaged: state.safetensors is not as it was written; step-8 is the" in note for note in notes)
    assert (run / WEIGHTS).read_bytes() == (run.parent / "straight" / WEIGHTS).read_bytes()


def test_a_checkpoint_of_another_run_is_passed_over_and_kept(run: Path):
    shutil.rmtree(run / "checkpoints" / "step-9")
    shutil.copytree(run.parent / "other" / "checkpoints" / "step-9", run / "checkpoints" / "step-9")
    foreign = (run / "checkpoints" / "step-9" / WEIGHTS).read_bytes()
    with pytest.raises(UsageError, match="step-9 is of another run"):
        train(make_recipe(run.parent, out=run.name), resume_from=run / "checkpoints" / "step-9")
    assert any("step-9 is of another run; step-8 is" in note for note in resume(run))
    assert (run / WEIGHTS).read_bytes() == (run.parent / "straight" / WEIGHTS).read_bytes()
    assert (run / "checkpoints" / "of-another-run-step-9" / WEIGHTS).read_bytes() == foreign


@pytest.mark.parametrize(
    "key", ["recipe", "data", "base_model", "budget", "recipe.train.max_steps", "data.sha256", "base_model.fingerprint"]
)
def test_a_run_whose_record_is_damaged_is_not_gone_on_with(run: Path, key: str):
    record = json.loads((run / "dynlora.json").read_text())
    *parents, last = key.split(".")
    inner = record
    for parent in parents:
        inner = inner[parent]
    for damaged in ({}, {last: 3.5}) if parents or key != "budget" else ({}, {last: 3}):
        inner.pop(last, None)
        inner.update(damaged)
        (run / "dynlora.json").write_text(json.dumps(record))
        if key == "recipe.train.max_steps" and not damaged:
            continue  # as if the run were older than the key: it is another recipe then
        with pytest.raises(UsageError, match=rf"dynlora\.json is damaged: {key.removeprefix('recipe.')}"):
            same_recipe(run, make_recipe(run.parent, "train.save_steps=3", out=run.name))


def test_a_record_without_a_layer_that_trains_is_damaged(run: Path):
    record = json.loads((run / "dynlora.json").read_text())
    name, *_ = record["budget"]["start_components"]
    record["budget"]["start_components"][f"{name}x"] = record["budget"]["start_components"].pop(name)
    (run / "dynlora.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=rf"dynlora\.json is damaged: budget.start_components lacks '{name}'"):
        resume(run)


def test_where_no_checkpoint_is_left_all_are_named(run: Path):
    for checkpoint in run_folder.step_folders(run):
        (checkpoint / "state.json").write_text("null")
    with pytest.raises(UsageError, match="no complete checkpoint") as refused:
        resume(run)
    assert all(f"{path} is damaged" in refused.value.message for path in run_folder.step_folders(run))


def test_a_run_of_0_1_goes_on(run: Path):
    for checkpoint in run_folder.step_folders(run):
        as_0_1(checkpoint)
    record = json.loads((run / "dynlora.json").read_text())
    del record["run_id"]
    (run / "dynlora.json").write_text(json.dumps(record))
    resume(run)
    assert (run / WEIGHTS).read_bytes() == (run.parent / "straight" / WEIGHTS).read_bytes()


def test_pointers_name_step_folders_or_nothing(run: Path):
    pointer = run / "checkpoints" / "best"
    for text in (b"../../straight", b"step-99", b"\xff", b"", b"step-9/..", "step-\u00b2".encode()):
        pointer.write_bytes(text)
        assert run_folder.pointed(run, "best") is None
    (run / "checkpoints" / "step-9" / WEIGHTS).unlink()
    (run / "checkpoints" / "last").unlink()
    assert find_adapter(run)[0].name == "step-8"
    with pytest.raises(UsageError, match="step-9 is damaged"):
        read_adapter(run / "checkpoints" / "step-9")


# -- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["README.md"], ["README.md", "report.html"]])
def test_a_report_that_was_not_finished_is_made_when_resumed(run: Path, missing: list[str]):
    shutil.copytree(run.parent / "straight", run, dirs_exist_ok=True)
    for name in missing:
        (run / name).unlink()
    assert any("what was missing of its report is made" in note for note in resume(run))
    assert all((run / name).is_file() for name in outputs.FOR_PEOPLE)


@pytest.mark.slow
@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
@pytest.mark.parametrize("when", ["tick", "checkpoint"])
def test_a_run_whose_folder_has_gone_says_so_and_ends(tmp_path: Path, how: Callable, when: str):
    recipe = make_recipe(tmp_path, "train.save_steps=3")
    folder = tmp_path / "out"

    def listen(event: dict) -> None:
        if event["event"] == when and event["step"] == 6:
            how(folder)

    from dynlora_cli.commands import train as command

    with pytest.raises(DynloraError, match="removed or moved while the run went on") as ended:
        command.run(recipe, listener=listen)
    assert ended.value.exit_code == 1
    assert not (folder / "report.html").exists()


def test_a_run_that_saved_nothing_gives_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(tmp_path)
    train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def fail(run: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loop, "held_out_loss", fail)
    events: list[dict] = []
    from dynlora_cli.commands import train as command

    with pytest.raises(MemoryError):
        command.run(recipe, listener=events.append, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert "is the earlier run again" in events[-1]["text"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 3, "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3, "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 3, "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object"), 3, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "no space left"),
        (ValueError("I/O error: No space left on device (os error 28)"), 3, "no space left"),
        (OSError("1000 requested and 12 written"), 3, "no space left"),
        (OSError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied"),
    ],
)
def test_faults_of_the_machine_are_one_sentence(error: Exception, code: int, words: str, capsys):
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = error
    for raised in (error, wrapped) if code == 3 else (error,):
        with pytest.raises(typer.Exit) as ended, reporting(False):
            raise raised
        assert ended.value.exit_code == code
        told = capsys.readouterr().err
        assert words in " ".join(told.split())
        assert "Traceback" not in told


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_closed_terminal_asks_for_a_stop_as_ctrl_c_does(number: int):
    with interrupt.interruptible() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupt.interruptible() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_written_to_a_terminal_that_was_closed():
    ours, theirs = pty.openpty()
    terminals = [theirs]
    interrupt._leave(terminals)
    assert terminals == [theirs]
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(theirs, b"x")
    interrupt._leave(terminals)
    assert terminals == []
    assert os.write(theirs, b"x") == 1
    os.close(theirs)


def test_a_packed_file_beside_a_plain_adapter_is_said_to_be_left_aside(tmp_path: Path) -> None:
    for name in (CONFIG, PACKED):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    folder, note = find_adapter(tmp_path)
    assert folder == tmp_path
    assert note is not None
    assert f"{PACKED} beside it is not read" in note
