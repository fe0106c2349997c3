"""The library as a folder: what an update brings with it, and that nothing of it stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents
from library_helpers import Made, silent
from safetensors.numpy import load_file

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import UsageError
from dynlora_cli.library import add as adding
from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.library.held_out import read_held_out
from dynlora_cli.library.keys import Keys
from dynlora_cli.library.library import EMPTY, PENDING, Library, library_for_writing


def add_other(made: Made, **options: object) -> None:
    add(made.root, Addition(made.other, **{"name": "other", "data": made.rows, **options}), silent)


def test_what_a_hint_says_can_be_copied_into_a_shell(tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        Library.open(tmp_path / "no library")
    assert f"dynlora library add '{tmp_path}/no library' --adapter FOLDER" in str(caught.value.hint)


def test_an_update_of_a_run(made: Made):
    library = Library.open(made.root)
    (entry,) = library.entries
    assert (entry.name, entry.tags, entry.damage()) == ("first", ["sorting"], [])
    record = json.loads((made.run / "dynlora.json").read_text())
    assert entry.date == record["finished"][:10]
    assert entry.data_sha256 == record["data"]["sha256"]
    assert entry.card.loss_after == record["summary"]["loss_after"]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (entry.folder, made.run))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours), "a run's own adapter stays number for number"


def test_training_rows_are_keys_and_held_out_rows_are_kept_for_calibration(made: Made):
    (entry,) = Library.open(made.root).entries
    keys, held_out = Keys.of(entry), read_held_out(entry)
    asked = [json.loads(line)["prompt"].strip() for line in made.rows.read_text().splitlines()]
    assert sorted(keys.texts + [row.text for row in held_out]) == sorted(asked)
    assert len(held_out) == json.loads((made.run / "dynlora.json").read_text())["data"]["val_rows"]
    assert all(row.example.supervised() for row in held_out)
    assert keys.vectors.shape == (len(keys.texts), 32)
    np.testing.assert_allclose(np.linalg.norm(keys.vectors, axis=1), 1, rtol=1e-6)


def test_an_update_that_is_removed_leaves_nothing(made: Made):
    before = contents(made.root)
    add_other(made)
    assert contents(made.root) != before
    with library_for_writing(made.root) as library:
        assert not library.remove("other")
    assert contents(made.root) == before
    with library_for_writing(made.root) as library:
        library.remove("first")
    assert list(contents(made.root)) == ["library.json"]
    assert "first" not in (made.root / "library.json").read_text()


def test_what_was_learned_from_an_update_goes_with_it(made: Made):
    with library_for_writing(made.root) as library:
        library.put_calibration({"entries": ["first"]})
    (made.root / "report.html").write_text("first was right 9 times of 10")
    add_other(made)
    with library_for_writing(made.root) as library:
        assert not library.remove("other"), "it was not part of the calibration"
        assert library.calibration == {"entries": ["first"]}
    add_other(made)
    with library_for_writing(made.root) as library:
        assert library.remove("first")
    library = Library.open(made.root)
    assert library.calibration is None
    assert [entry.name for entry in library.entries] == ["other"]
    assert not [path for path, text in contents(made.root).items() if b"first" in text or "first" in path]


def test_an_interrupted_addition_leaves_nothing(made: Made, monkeypatch: pytest.MonkeyPatch):
    before = contents(made.root)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adding, "write_held_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        add_other(made)
    assert contents(made.root) == before


def test_a_killed_addition_is_put_in_order(made: Made):
    """As a killed process leaves it: without any of the tidying that an exception would do."""
    before = contents(made.root)
    with library_for_writing(made.root) as library:
        library._begin("other")
        (made.root / "adapters" / "other").mkdir()
        (made.root / "keys" / "other.jsonl").write_text("half")
    assert (made.root / PENDING).is_file()
    with library_for_writing(made.root):
        pass
    assert contents(made.root) == before


def test_a_killed_removal_is_put_in_order(made: Made):
    with library_for_writing(made.root) as library:
        library._begin("first")
        library._write(**dict(EMPTY))
    assert (made.root / "keys" / "first.npy").is_file()
    with library_for_writing(made.root):
        pass
    assert list(contents(made.root)) == ["library.json"]


def test_a_removal_killed_at_its_start_has_not_been(made: Made):
    before = contents(made.root)
    with library_for_writing(made.root) as library:
        library._begin("first")
    with library_for_writing(made.root):
        pass
    assert contents(made.root) == before


def test_what_a_killed_write_leaves_goes(made: Made):
    """A torn library.json holds the record of an update that is to leave no trace."""
    before = contents(made.root)
    for name in ("library.json", "pending", "report.html"):
        (made.root / f".{name}.tmp").write_text("half")
    with library_for_writing(made.root):
        pass
    assert contents(made.root) == before


def test_what_is_written_as_pending_is_no_path(made: Made):
    (made.root.parent / "up.npy").write_text("mine")
    (made.root / PENDING).write_text("../../up")
    with library_for_writing(made.root):
        pass
    assert (made.root.parent / "up.npy").read_text() == "mine"
    assert not (made.root / PENDING).exists()


def test_the_same_adapter_twice_is_refused(made: Made):
    before = contents(made.root)
    with pytest.raises(UsageError, match="has this adapter already: first"):
        add(made.root, Addition(made.run, name="again"), silent)
    assert contents(made.root) == before
    with pytest.raises(UsageError, match="has an update 'first' already") as caught:
        add_other(made, name="First")
    assert "remove" in str(caught.value.hint)


def test_damage_is_named(made: Made):
    (entry,) = Library.open(made.root).entries
    entry.check()
    (made.root / "keys" / "first.jsonl").write_text("")
    (made.root / "adapters" / "first" / "tokenizer.json").unlink()
    assert len(entry.damage()) == 2
    with pytest.raises(UsageError, match=r"tokenizer\.json is missing"):
        entry.check()


def test_an_adapter_that_nothing_finds_is_refused(made: Made, tmp_path: Path):
    with pytest.raises(UsageError, match="does not say what it was trained on"):
        add(tmp_path / "new", Addition(made.other), silent)
    assert not (tmp_path / "new").exists()


def test_the_card_of_a_cut_adapter_begins_before_its_training(made: Made, tmp_path: Path):
    adapter = replace(
        read_adapter(made.run),
        record={"summary": {"loss_before": 3.0, "loss_after": 3.5}, "trained": {"loss_before": 6.0}},
    )
    card = adding._card(adapter)
    assert (card.loss_before, card.loss_after) == (6.0, 3.5)
    for odd in (
        {"summary": {}, "trained": "no"},
        {"summary": {"loss_after": float("nan")}},
        {"data": {"val_rows": -1}},
    ):
        assert adding._card(replace(adapter, record=odd)).loss_after is None
