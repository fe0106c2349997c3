"""Libraries that somebody has edited, and updates that do not go together: each is answered by one message."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import Run
from library_helpers import Made, silent

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.foreign import fits
from dynlora_cli.library.add import refuse_other_kind
from dynlora_cli.library.calibrate import Wanted, calibrate
from dynlora_cli.library.held_out import HeldOut, unreadable
from dynlora_cli.library.keys import Keys
from dynlora_cli.library.learn import CalibrationForm
from dynlora_cli.library.library import Library
from dynlora_cli.models.quiet import quiet


def row(ids: list[int], labels: list[int]) -> HeldOut:
    return HeldOut("what?", OneText(array("i", ids), array("i", labels), 0))


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (row([1, 2, 3], [-100, 2, 3]), None),
        (row([1, 100, 3], [-100, -100, 3]), "a token that the base does not know"),
        (row([1, 2, 3] * 5, [-100, 2, 3] * 5), "15 tokens, and the base reads 8"),
        (row([1, 2, 3], [-100, -100, -100]), "no target"),
    ],
)
def test_a_held_out_row_that_the_base_cannot_read(held_out: HeldOut, said: str | None):
    found = unreadable(held_out, known=100, context=8)
    assert found is None if said is None else said in (found or "")


def test_keys_without_a_shape(made: Made):
    (entry,) = Library.open(made.root).entries
    np.save(entry.paths.vectors, np.float32(3))
    with pytest.raises(UsageError, match="is damaged"):
        Keys.of(entry)


@pytest.mark.parametrize("curve", [[[0, 0.5], [-1, 0.7]], [[0, 0.7], [1, 0.5]], [[0, 0], [1, 7]]])
def test_a_curve_of_confidence_that_does_not_rise_from_0_to_1(curve: list[list[float]]):
    data = {
        "entries": ["one"],
        "background": {"one": [0.0, 1.0]},
        "model": {"weights": [1, 0, 0], "intercept": 0, "curve": curve, "platt": [1, 0]},
        "threshold": {"evidence": 0.0, "rate": 0.01, "requests": 9, "promised": False},
        "at_most": 1,
        "quality": {},
    }
    with pytest.raises(UsageError, match=r"library.json is damaged: input should have a curve that rises"):
        fits(CalibrationForm, data, Path("library.json"))


def refused(made: Made, unrelated: Path) -> str:
    with quiet, pytest.raises(DynloraError) as caught:
        calibrate(made.root, Wanted(unrelated), silent)
    return caught.value.message


def test_unrelated_requests_of_another_encoding_or_of_an_update(made: Made, tmp_path: Path):
    latin, own = tmp_path / "latin.txt", tmp_path / "own.txt"
    latin.write_bytes("café\n".encode("latin-1"))
    assert refused(made, latin).startswith(f"--unrelated {latin} cannot be read")
    (entry,) = Library.open(made.root).entries
    keys = [json.loads(line)["text"] for line in entry.paths.texts.read_text().splitlines()]
    own.write_text("\ufeff" + "".join(f"{text}\n" for text in keys[:3]), encoding="utf-8")
    assert refused(made, own).endswith(f"in {own}: all 3 are empty or an update's own")


def test_a_library_has_one_task_and_one_set_of_classes(runs: Callable[[str], Run]):
    writer, classes = read_adapter(runs("gpt2").folder), read_adapter(runs("bert").folder)
    refuse_other_kind(Path("lib"), classes, classes)
    with pytest.raises(UsageError, match=r"lib holds updates for causal-lm, and .* is one for sequence-classification"):
        refuse_other_kind(Path("lib"), writer, classes)
    data = {**classes.record["data"], "labels": ["a", "b", "c", "d"]}
    with pytest.raises(UsageError, match="other classes"):
        refuse_other_kind(Path("lib"), classes, replace(classes, record={**classes.record, "data": data}))
