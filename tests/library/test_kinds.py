"""Adapters of every kind, and runs for every task, come into a library as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from eval_helpers import Run
from library_helpers import silent
from peft_adapters import KINDS, SPECIAL, make, peft_logits

from dynlora_cli.adapters.base import find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.evaluation.rows import held_out_rows
from dynlora_cli.files.whole import write_json
from dynlora_cli.library.add import _copy, add
from dynlora_cli.library.addition import Addition
from dynlora_cli.library.held_out import read_held_out
from dynlora_cli.library.library import EMPTY, library_for_writing


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS | SPECIAL if "bert" not in kind and "class" not in kind])
def test_the_copy_computes_the_same(kind: str, tmp_path: Path):
    base, folder = make(kind, tmp_path)
    (tmp_path / "lib").mkdir()
    write_json(tmp_path / "lib" / "library.json", EMPTY.model_dump())
    with library_for_writing(tmp_path / "lib") as library:
        files = _copy(library, read_adapter(folder, str(base)), "one", str(base))
        copy = library.root / "adapters" / "one"
        assert sorted(files) == sorted(file.name for file in copy.iterdir())
        before, after = peft_logits(base, folder), peft_logits(base, copy)
        assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_held_out_rows_come_back_as_they_were(kind: str, tmp_path: Path, runs: Callable[[str], Run]):
    folder = runs(kind).folder
    entry, _ = add(tmp_path / "lib", Addition(folder), silent)
    adapter = read_adapter(folder)
    place = find_base(adapter)
    expected = held_out_rows(adapter, place, read_tokenizer(adapter, place)).examples
    found = [row.example for row in read_held_out(entry)]
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        assert list(ours.input_ids) == list(theirs.input_ids)
        assert list(ours.label_ids) == list(theirs.label_ids)
