"""`dynlora library` through the command line: what it says, what it refuses, and what nobody can make it do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora, contents
from library_helpers import Made
from tiny_run import model_folder

from dynlora_cli.library.keys import Keys
from dynlora_cli.library.library import Library, library_for_writing


def test_add_list_remove(made: Made, dynlora: Dynlora):
    before = contents(made.root)
    options = ("--name", "other", "--date", "2026-03-01", "--tags", "law, tax,law", "--data", made.rows)
    answer = dynlora("library", "add", made.root, "--adapter", made.other, *options, "--json")
    assert answer.code == 0, answer.err
    update = answer.json["update"]
    assert (update["name"], update["date"], update["tags"]) == ("other", "2026-03-01", ["law", "tax"])
    assert update["keys"] + update["held_out"] == 40
    assert not update["calibrated"]
    assert "a fifth is held out" in answer.err
    shown = dynlora("library", "list", made.root, "--json")
    assert [each["name"] for each in shown.json["updates"]] == ["first", "other"]
    assert "not calibrated" in shown.err
    assert "off until" not in shown.err, "without a calibration the nearest update answers"
    gone = dynlora("library", "remove", made.root, "other", "--json")
    assert (gone.json["removed"], gone.json["left"]) == ("other", ["first"])
    assert contents(made.root) == before


def test_documents_alone_make_keys_and_nothing_to_calibrate_with(made: Made, tmp_path: Path, dynlora: Dynlora):
    document = tmp_path / "law.md"
    document.write_text("\n\n".join(" ".join([word] * 100) for word in ("tax", "land", "water")))
    answer = dynlora("library", "add", made.root, "--adapter", made.other, "--documents", document, "--json")
    assert answer.code == 0, answer.err
    assert (answer.json["update"]["keys"], answer.json["update"]["held_out"]) == (3, 0)
    assert "which then stays off" in answer.err
    assert answer.json["update"]["sources"][0]["kind"] == "documents"
    entry = Library.open(made.root).entry(made.other.name)
    assert Keys.of(entry).sources[0] == "law.md, passage 1"


def test_another_encoder_is_refused(made: Made, dynlora: Dynlora):
    answer = dynlora("library", "add", made.root, "--adapter", made.other, "--encoder", made.base)
    assert answer.code == 2
    assert "are made by base" in answer.err


def test_an_encoder_of_its_own(made: Made, tmp_path: Path, dynlora: Dynlora):
    new = tmp_path / "new"
    answer = dynlora("library", "add", new, "--adapter", made.run, "--encoder", made.base, "--json")
    assert answer.code == 0, answer.err
    encoder = Library.open(new).encoder
    assert encoder is not None
    assert (encoder.name, encoder.dimension) == (str(made.base.resolve()), 32)


def test_another_base_is_refused(made: Made, tmp_path: Path, dynlora: Dynlora):
    base = model_folder(tmp_path, "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    before = contents(made.root)
    answer = dynlora("library", "add", made.root, "--adapter", made.other, "--base", base, "--data", made.rows)
    assert answer.code == 2
    assert "a library has one base" in answer.err
    assert contents(made.root) == before


def test_rows_that_have_changed_are_refused(made: Made, tmp_path: Path, dynlora: Dynlora):
    run = shutil.copytree(made.run, tmp_path / "run")
    record = json.loads((run / "dynlora.json").read_text())
    record["data"]["sha256"] = "0" * 64
    (run / "dynlora.json").write_text(json.dumps(record))
    answer = dynlora("library", "add", tmp_path / "new", "--adapter", run)
    assert answer.code == 2
    assert "name rows with --data FILE" in " ".join(answer.err.split())
    assert "add it from the folder in which it was trained" in answer.err
    assert not (tmp_path / "new").exists()


def test_damage_is_an_error_that_names_the_file(made: Made, dynlora: Dynlora):
    (made.root / "adapters/first/adapter_model.safetensors").write_bytes(b"other numbers")
    answer = dynlora("library", "list", made.root, "--json")
    assert answer.code == 2
    assert not answer.json["ok"]
    assert "adapter_model.safetensors has changed" in answer.json["error"]
    assert dynlora("library", "remove", made.root, "first").code == 0


WRONG: list[tuple[str, list[str], str]] = [
    ("no library", ["list", "none"], "the library none does not exist"),
    ("no adapter", ["add", "lib", "--adapter", "none"], "none does not exist"),
    ("no update", ["remove", "lib", "frist"], "did you mean 'first'?"),
    ("no day", ["add", "lib", "--adapter", "run", "--date", "2026-02-30"], "is no day"),
    ("no name", ["add", "lib", "--adapter", "run", "--name", "../up"], "cannot be the name"),
    ("a word of reports", ["add", "lib", "--adapter", "run", "--name", "library"], "library and unrelated are taken"),
    ("the router's word", ["add", "lib", "--adapter", "run", "--name", "auto"], "auto, base, library and unrelated"),
    ("name taken", ["add", "lib", "--adapter", "run", "--name", "FIRST"], "remove it first: dynlora library remove"),
    ("no rows", ["add", "lib", "--adapter", "run", "--data", "none.jsonl"], "--data none.jsonl does not exist"),
    ("a recipe", ["add", "lib", "--adapter", "run", "--data", "llama.yaml"], "is a recipe"),
    ("no text", ["add", "lib", "--adapter", "run", "--documents", "law.pdf"], "unknown kind"),
    ("no encoder", ["add", "new", "--adapter", "run", "--encoder", "./none"], "there is no folder ./none"),
    ("no base", ["add", "lib", "--adapter", "run", "--base", "./none"], "there is no folder ./none"),
    ("a file", ["add", "llama.yaml", "--adapter", "run"], "is a file"),
]
PROBE = """
import json, sys
from dynlora_cli.cli import main
answers = []
for arguments in json.load(sys.stdin):
    try:
        main(["library", *arguments])
    except SystemExit as end:
        answers.append(end.code)
    print("--- end", file=sys.stderr)
print(json.dumps([answers, "torch" in sys.modules]))
"""


def test_what_the_disk_can_say_is_said_before_torch_loads(made: Made, tmp_path: Path):
    (tmp_path / "llama.yaml").write_text("model: builtin:tiny\n")
    (tmp_path / "law.pdf").write_text("%PDF")
    (tmp_path / "run").symlink_to(made.run)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([arguments for _, arguments, _ in WRONG]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    codes, heavy = json.loads(done.stdout)
    assert not heavy
    said = [" ".join(text.split()) for text in done.stderr.split("--- end\n")]
    for (name, _, wanted), code, text in zip(WRONG, codes, said, strict=False):
        assert code == 2, (name, text)
        assert wanted in text, name


def changed(made: Made, **changes: Any) -> None:
    """Change the first update's record in library.json."""
    path = made.root / "library.json"
    data = json.loads(path.read_text())
    data["entries"][0] |= changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../up"},
        {"name": "a/b"},
        {"files": {"../library.json": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"vectors": {"count": -1, "sha256": "0" * 64}},
        {"sha256": "short"},
        {"date": "yesterday"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_library_of_somebody_else_names_nothing_outside_itself(changes: dict, made: Made, dynlora: Dynlora):
    changed(made, **changes)
    for command in (["list", made.root], ["remove", made.root, "first"]):
        answer = dynlora("library", *command)
        assert answer.code == 2
        assert "library.json is damaged: entries.0" in answer.err


@pytest.mark.parametrize("place", ["adapters", "keys/first.jsonl", "adapters/first"])
def test_no_link_out_of_a_library_is_followed(place: str, made: Made, tmp_path: Path, dynlora: Dynlora):
    target = tmp_path / "elsewhere"
    (made.root / place).rename(target)
    (made.root / place).symlink_to(target)
    before = contents(target) if target.is_dir() else target.read_bytes()
    answer = dynlora("library", "list", made.root)
    assert answer.code == 2
    assert "link out of its folder" in answer.err
    dynlora("library", "remove", made.root, "first")
    assert (contents(target) if target.is_dir() else target.read_bytes()) == before


def test_a_library_of_a_later_version(made: Made, dynlora: Dynlora):
    path = made.root / "library.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    answer = dynlora("library", "list", made.root)
    assert (answer.code, "update dynlora" in answer.err) == (2, True)


@pytest.mark.slow
def test_two_do_not_write_at_once(made: Made, tmp_path: Path):
    with library_for_writing(made.root):
        for words in (["remove", str(made.root), "first"], ["calibrate", str(made.root)]):
            command = [sys.executable, "-m", "dynlora_cli", "library", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert "is in use by process" in done.stderr
            assert "measuring" not in done.stderr, "it is said before the work"
    assert [entry.name for entry in Library.open(made.root).entries] == ["first"]


def test_an_addition_that_was_cut_short_is_told(made: Made, dynlora: Dynlora):
    assert dynlora("library", "list", made.root, "--json").json["notes"] == []
    (made.root / "pending").write_text("law\n")
    shown = dynlora("library", "list", made.root, "--json")
    assert shown.code == 0
    assert "law is being added or removed, or was when a process was killed" in shown.json["notes"][0]
    assert "law is being added" in shown.err
    assert (made.root / "pending").is_file(), "looking changes nothing"
    dynlora("library", "remove", made.root, "first")
    (made.root / "pending").write_text("law")
    assert "law is being added" in dynlora("library", "list", made.root).err, "of an empty library as well"


def test_an_empty_library_says_so(made: Made, dynlora: Dynlora):
    dynlora("library", "remove", made.root, "first")
    for command in (("library", "calibrate", made.root), ("eval", "--library", made.root)):
        answer = dynlora(*command)
        assert (answer.code, f"the library {made.root} is empty" in answer.err) == (2, True)


def test_a_folder_that_is_no_library_is_left_alone(made: Made, tmp_path: Path, dynlora: Dynlora):
    mine = tmp_path / "mine"
    mine.mkdir()
    assert dynlora("library", "add", mine, "--adapter", made.other).code == 2
    assert list(mine.iterdir()) == [], "an empty folder stays, empty"
    (mine / "letter.txt").write_text("dear")
    answer = dynlora("library", "add", mine, "--adapter", made.run)
    assert (answer.code, "is no library, and not empty" in answer.err) == (2, True)
    assert contents(mine) == {"letter.txt": b"dear"}
