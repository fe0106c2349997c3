"""Decisions on single requests, in libraries of keys that are made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hand_made_library import APART, Places, library

from dynlora_cli.errors import UsageError
from dynlora_cli.library.activation import Activator
from dynlora_cli.library.library import Library


def decide(lib: Library, **at: Sequence[float]) -> Any:
    (decision,) = Activator(lib, Places(at)).decide(list(at))
    return decision


def test_the_update_whose_evidence_passes_is_active(tmp_path: Path):
    decision = decide(library(tmp_path / "lib", APART), ask=(1, 0.1, 0))
    assert decision.chosen == ("law",)
    assert decision.key == ("the law", "row 0")
    score = 1 / math.hypot(1, 0.1)
    assert decision.confidence["law"] == pytest.approx(1 / (1 + math.exp(5 - 10 * score)), rel=1e-5)
    assert decision.reason.startswith("law: confidence 0.99, evidence 4.95 (needed: more than 0.00)")


def test_else_the_base_answers_and_the_reason_names_the_nearest(tmp_path: Path):
    decision = decide(library(tmp_path / "lib", APART), ask=(0.3, 0.2, 1))
    assert decision.chosen == ()
    assert decision.reason.startswith("base: the most likely is law: confidence 0.10")
    assert decision.key == ("the law", "row 0")


def test_the_threshold_must_be_passed_not_met(tmp_path: Path):
    lib = library(tmp_path / "lib", APART, above=5.0)
    assert decide(lib, ask=(1, 0, 0)).chosen == ()
    assert decide(library(tmp_path / "other", APART, above=4.999), ask=(1, 0, 0)).chosen == ("law",)


def test_a_threshold_that_nothing_passes(tmp_path: Path):
    decision = decide(library(tmp_path / "lib", APART, above=math.inf), ask=(1, 0, 0))
    assert decision.chosen == ()
    assert "nothing is enough" in decision.reason


def test_of_two_on_the_same_key_the_newer_speaks(tmp_path: Path):
    same = {"old": ("2025-01-01", {"the tax": (1, 0, 0)}), "new": ("2026-01-01", {"the tax now": (1, 0.2, 0)})}
    decision = decide(library(tmp_path / "lib", same), ask=(1, 0, 0))
    assert decision.chosen == ("new",)
    assert decision.confidence["old"] > decision.confidence["new"]
    assert "newer than old on the same key" in decision.reason


def test_of_two_on_the_same_key_and_day_the_one_with_more_evidence_speaks(tmp_path: Path):
    same = {"one": ("2026-01-01", {"the tax": (1, 0.2, 0)}), "two": ("2026-01-01", {"the tax now": (1, 0, 0)})}
    assert decide(library(tmp_path / "lib", same), ask=(1, 0, 0)).chosen == ("two",)


def test_updates_on_different_keys_are_no_conflict(tmp_path: Path):
    """Both pass, the older one has more evidence, and their keys are 60 degrees apart."""
    apart = {"old": ("2025-01-01", {"x": (1, 0, 0)}), "new": ("2026-01-01", {"y": (0.5, 0.866, 0)})}
    assert decide(library(tmp_path / "lib", apart), ask=(1, 0.5, 0)).chosen == ("old",)


def test_at_most_k_are_active_the_newest_named_first(tmp_path: Path):
    three = {
        "a": ("2026-01-01", {"x": (1, 0, 0)}),
        "b": ("2026-03-01", {"y": (0, 1, 0)}),
        "c": ("2026-02-01", {"z": (0, 0, 1)}),
    }
    lib = library(tmp_path / "lib", three, at_most=2)
    assert decide(lib, ask=(1, 0.9, 0.8)).chosen == ("b", "a")


def test_only_the_best_three_by_score_are_looked_at(tmp_path: Path):
    many = {f"u{n}": ("2026-01-01", {f"key {n}": (1, 0.5 * n, 0)}) for n in range(5)}
    assert list(decide(library(tmp_path / "lib", many), ask=(1, 0, 0)).confidence) == ["u0", "u1", "u2"]


def test_an_update_that_the_calibration_has_not_seen_is_never_active_and_changes_nothing(tmp_path: Path):
    alone = decide(library(tmp_path / "one", {"law": APART["law"]}), ask=(1, 0.1, 0))
    lib = library(tmp_path / "lib", APART, seen=["law"])
    activator = Activator(lib, Places({"ask": (1, 0.1, 0), "news": (0, 1, 0)}))
    assert activator.decide(["ask", "news"])[0] == alone
    assert activator.decide(["news"])[0].chosen == ()
    assert any("news came after the calibration and is never active" in note for note in activator.notes)


def test_no_request_no_update(tmp_path: Path):
    activator = Activator(library(tmp_path / "lib", APART, above=-100.0), Places({}))
    assert activator.decide([]) == []
    (silent,) = activator.decide(["  "])
    assert (silent.chosen, silent.reason) == ((), "base: there is no request to go by")


def test_one_decision_does_not_depend_on_the_others(tmp_path: Path):
    at = {f"ask {n}": (math.cos(n), math.sin(n), 0.1) for n in range(20)}
    activator = Activator(library(tmp_path / "lib", APART), Places(at))
    assert activator.decide(list(at)) == [activator.decide([text])[0] for text in at]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"calibration": None}, "is not calibrated"),
        ({"calibration": {"entries": ["law"]}}, "is damaged: background"),
        ({"entries": []}, "has seen law, news, which is not there"),
    ],
)
def test_a_library_that_cannot_decide(tmp_path: Path, change: dict[str, Any], said: str):
    lib = library(tmp_path / "lib", APART)
    lib.form = lib.form.model_copy(update=change)
    with pytest.raises(UsageError, match=said):
        Activator(lib, Places({}))
