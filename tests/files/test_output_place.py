"""Nothing is lost: output folders are replaced whole whenever a process is killed, and one process writes at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import contents

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files import place as output_place
from dynlora_cli.runs import folder as run_folder

# Replaces the run `place` again and again, killed at the first change to the disk, at the second, ... until it gets by.
SWEEP = """
import json, os, signal, sys
from pathlib import Path
from dynlora_cli.files.whole import write_json
from dynlora_cli.runs import folder as run_folder

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
place, kind = Path(sys.argv[1]), sys.argv[2]

def record(folder, name, **more):
    folder.mkdir(exist_ok=True)
    head = {"schema_version": 1, "dynlora_version": "0.1", "name": name}
    write_json(folder / "dynlora.json", head | more)  # first, and by way of another name, as a run does
    (folder / "metrics.jsonl").write_text(name)
    (folder / "weights" ).mkdir(exist_ok=True)
    (folder / "weights" / name).write_text(name)

def command():
    with run_folder.replaced(place, overwrite=True) as new:
        record(new, "new", summary={})

def train():
    with run_folder.place_of(place) as held:
        run_folder.refuse_occupied(place, overwrite=True)
        held.keep_old()
        place.mkdir(exist_ok=True)
        record(place, "new")
        step = place / "checkpoints" / "step-1"
        with run_folder.whole_folder(step) as temporary:
            (temporary / "state.safetensors").write_text("1")
            run_folder.seal(temporary, {"progress": {"step": 1}})
        held.give_up_old()

def killed_at(change):
    child = os.fork()
    if child == 0:
        left = [change]
        def count(event, arguments):
            opened = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if event in CHANGES or opened:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        {"train": train}.get(kind, command)()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

if kind == "current folder":
    place.mkdir()
    os.chdir(place)
found, change, killed = set(), 0, True
while killed:
    with run_folder.place_of(place):
        pass
    if place.is_dir():
        for entry in [*place.iterdir()]:
            run_folder.remove(entry)
    record(place, "old", summary={})
    change += 1
    killed = killed_at(change)
    run_folder.refuse_occupied(place, overwrite=True)
    name = json.loads((place / "dynlora.json").read_text())["name"]
    assert (place / "metrics.jsonl").read_text() == name, change
    assert [entry.name for entry in (place / "weights").iterdir()] == [name], change
    assert [p.name for p in place.parent.iterdir()] == [place.name], change
    found.add(name)
    {"train": train}.get(kind, command)()
    assert json.loads((place / "dynlora.json").read_text())["name"] == "new"
print(change, sorted(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
@pytest.mark.parametrize("kind", ["command", "current folder", "train"])
def test_killed_at_any_change_to_the_disk_the_old_or_the_new_is_whole(tmp_path: Path, kind: str):
    place = tmp_path / "parent" / "run"
    place.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", SWEEP, place, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changes, _, found = done.stdout.partition(" ")
    assert int(changes) > 15
    assert found.strip() == "['new', 'old']"


HOLD = """
import sys, time
from pathlib import Path
from dynlora_cli.runs import folder as run_folder
with run_folder.place_of(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_writes_and_a_dead_ones_place_is_free(tmp_path: Path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(UsageError, match=rf"in use by process {other.pid}$"), run_folder.place_of(out):
                pass
        other.kill()
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.dynlora"]
    with run_folder.place_of(out) as place, run_folder.place_of(out) as again:
        assert place is again, "within a process it may be asked for twice"
    assert not list(tmp_path.iterdir())


def owner(tmp_path: Path, **changes: object) -> None:
    work = tmp_path / ".out.dynlora"
    work.mkdir()
    me = {"dynlora": "writes here", "host": socket.gethostname(), "pid": os.getpid(), "began": "1"}
    (work / "owner.json").write_text(json.dumps(me | changes))


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(output_place, "_lock", lambda descriptor: None)  # a file system without locks
    owner(tmp_path)
    with run_folder.place_of(tmp_path / "out"):
        pass
    owner(tmp_path, began=output_place._began(os.getpid()))
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), run_folder.place_of(tmp_path / "out"):
        pass


def test_another_host_is_refused_with_the_way_on(tmp_path: Path):
    owner(tmp_path, host="elsewhere", pid=7, boot="another")
    kept = tmp_path / ".out.dynlora" / "kept"
    kept.mkdir()
    (kept / "old").touch()
    with pytest.raises(UsageError, match="process 7 on the host elsewhere") as refused:
        run_folder.refuse_occupied(tmp_path / "out", overwrite=True)
    command = f"truncate -s 0 {tmp_path / '.out.dynlora' / 'owner.json'}"
    assert str(refused.value.hint).endswith(command)
    subprocess.run(command.split(), check=True)
    with run_folder.place_of(tmp_path / "out"):
        assert (tmp_path / "out" / "old").exists(), "what was kept comes back"


@pytest.mark.skipif(output_place._boot() is None, reason="the machine does not name its starts")
def test_a_container_that_came_back_under_another_name_takes_its_place_over(tmp_path: Path):
    owner(tmp_path, host="elsewhere", pid=7, boot=output_place._boot())
    with run_folder.place_of(tmp_path / "out"):
        written = json.loads((tmp_path / ".out.dynlora" / "owner.json").read_text())
    assert written["host"] == socket.gethostname()


@pytest.mark.parametrize("length", [0, 1, 17, 60])
def test_an_owner_who_died_while_writing_its_name_is_none(tmp_path: Path, length: int):
    owner(tmp_path)
    os.truncate(tmp_path / ".out.dynlora" / "owner.json", length)
    with run_folder.place_of(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_died_while_writing_its_first_file_is_in_nobodys_way(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".dynlora.json.tmp").write_text('{"schema_ver')
    run_folder.refuse_occupied(out, overwrite=False)


@pytest.mark.parametrize("content", ["[]", "{}", '{"dynlora": 1}', "not JSON"])
def test_what_lies_where_we_work_and_is_not_ours_stays(tmp_path: Path, content: str):
    work = tmp_path / ".out.dynlora"
    work.mkdir()
    for name in ("owner.json", "thesis.txt"):
        (work / name).write_text(content)
        before = contents(tmp_path)
        with pytest.raises(UsageError, match=r"was not written by dynlora|is in the way"):
            run_folder.refuse_occupied(tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == before
        (work / name).unlink()


FOREIGN = {
    "another tool's record": {"export.json": '{"my": "own file"}'},
    "a record alone": {"dynlora.json": '{"schema_version": 1, "dynlora_version": "0.1"}'},
    "an export of other files": {
        "export.json": '{"command": "export", "dynlora_version": "1", "files": {"a.gguf": 1}}'
    },
    "a merge without a model": {"merge.json": '{"command": "merge", "dynlora_version": "1"}'},
    "no objects": {"dynlora.json": "[]", "merge.json": "null", "export.json": '"files"', "metrics.jsonl": ""},
    "no JSON": {"dynlora.json": "{", "metrics.jsonl": ""},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_names_prove_nothing(tmp_path: Path, files: dict[str, str]):
    out = tmp_path / "project"
    out.mkdir()
    for name, content in (files | {"thesis.txt": "ten years"}).items():
        (out / name).write_text(content)
    before = contents(tmp_path)
    with (
        pytest.raises(UsageError, match="--overwrite replaces only what dynlora made"),
        run_folder.replaced(out, overwrite=True),
    ):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("path", ["/proc/x", "/proc/x/y", "FILE/x", "FILE/x/y", "/dev/null/x", "a" * 300, "b\0"])
def test_places_where_nobody_can_write_are_told(tmp_path: Path, path: str):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as refused:
        run_folder.refuse_occupied(Path(path.replace("FILE", str(tmp_path / "file"))), overwrite=False)
    assert refused.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(MachineError, match="No space left"):
        run_folder.refuse_occupied(tmp_path / "out", overwrite=False)


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path):
    run_folder.refuse_occupied(tmp_path / "a" / "b" / "c", overwrite=False)
    assert not list(tmp_path.iterdir())
