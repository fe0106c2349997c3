"""What is read stays: no command replaces a folder in which its own documents, rows or base lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from cli_helpers import Dynlora, contents

from dynlora_cli.documents.begun import Begun
from dynlora_cli.errors import UsageError

ROW = json.dumps({"context": "A text.", "prompt": "What?", "completion": "That."}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What passes for a run of `adapt`, with the rows that it was trained on."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "dynlora.json").write_text('{"schema_version": 1, "dynlora_version": "0"}')
    for name in ("metrics.jsonl", "rows.jsonl", "README.md"):
        (folder / name).write_text(ROW)
    return folder


@pytest.mark.parametrize("own", ["--document README.md", "--data rows.jsonl", "--model base"])
def test_adapt_replaces_no_folder_that_it_reads_from(dynlora: Dynlora, tmp_path: Path, run: Path, own: str):
    (run / "base").mkdir()
    (run / "base" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a.md").write_text("A text about a ferry.")
    option, name = own.split()
    given = {"--model": "builtin:tiny", "--document": tmp_path / "a.md"} | {option: run / name}
    before = contents(run)
    words = [word for pair in given.items() for word in pair]
    done = dynlora("adapt", *words, "--out", run, "--overwrite")
    assert done.code == 2
    assert f"--out {run} would replace {run / name}" in done.err
    assert contents(run) == before


@pytest.mark.parametrize("key", ["path", "descriptions"])
def test_train_replaces_no_folder_that_it_reads_from(dynlora: Dynlora, tmp_path: Path, run: Path, key: str):
    """The recipe that `adapt` leaves names the rows beside it."""
    (tmp_path / "other.jsonl").write_text(ROW)
    source = {"path": str(tmp_path / "other.jsonl")} | {key: str(run / "rows.jsonl")}
    recipe = {"model": "builtin:tiny", "dataset": {"train": [source]}, "output_dir": str(run)}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    before = contents(run)
    done = dynlora("train", run / "recipe.yaml", "--overwrite")
    assert done.code == 2
    assert f"--output-dir {run} would replace {run / 'rows.jsonl'}" in done.err
    assert contents(run) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder with a decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequence"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
    ],
)
def test_a_model_that_does_not_write_is_refused_before_anything_loads(
    dynlora: Dynlora, tmp_path: Path, config: dict[str, object], words: str
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.md").write_text("A text about a ferry.")
    done = dynlora("adapt", "--model", tmp_path / "model", "--document", tmp_path / "a.md", "--out", tmp_path / "out")
    assert done.code == 2
    assert words in done.err
    assert "name a causal language model" in done.err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_bytes_that_are_no_text_are_answered(dynlora: Dynlora, tmp_path: Path):
    (tmp_path / "a\udcff.md").write_text("A text about a ferry.")
    (tmp_path / "hypernet.json").write_text("{}")
    for arguments in (
        ("--model", "builtin:tiny", "--document", tmp_path / "a\udcff.md"),
        ("--hypernet", tmp_path, "--description", "a\udcff"),
    ):
        done = dynlora("adapt", *arguments, "--out", tmp_path / "out")
        assert done.code == 2
        assert "no text in UTF-8" in done.err


def test_a_place_whose_parent_is_closed_is_refused_before_anything_loads(tmp_path: Path):
    """Such as a volume of a container: the run itself could lie in it, its rows not beside it."""
    (tmp_path / "closed" / "out").mkdir(parents=True)
    writable = os.access

    def access(path: Path, mode: int) -> bool:
        return Path(path) != tmp_path / "closed" and writable(path, mode)

    with patch("os.access", access), pytest.raises(UsageError, match="closed may not be written to") as caught:
        Begun(tmp_path / "closed" / "out").refuse(overwrite=False, resume=False)
    assert caught.value.hint == f"name a folder inside of it: --out {tmp_path / 'closed' / 'out' / 'adapter'}"


def test_an_empty_folder_beside_the_output_is_no_work_that_was_begun(tmp_path: Path):
    """A full disk leaves one; what somebody else has there stays."""
    begun = Begun(tmp_path / "out")
    begun.folder.mkdir()
    (begun.folder / ".asked.json.tmp").write_text("{")
    begun.refuse(overwrite=False, resume=False)
    with pytest.raises(UsageError, match="nothing was begun"):
        begun.refuse(overwrite=False, resume=True)
    (begun.folder / "notes.txt").write_text("of somebody else")
    with pytest.raises(UsageError, match="is in the way"):
        begun.refuse(overwrite=True, resume=False)


def test_nothing_can_lie_beside_the_root(dynlora: Dynlora, tmp_path: Path):
    (tmp_path / "a.md").write_text("A text about a ferry.")
    done = dynlora("adapt", "--model", "builtin:tiny", "--document", tmp_path / "a.md", "--out", Path(os.sep))
    assert done.code == 2
    assert "choose another folder" in done.err
