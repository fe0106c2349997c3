"""The router embedding: the mean of an update's keys, and its own rule on none of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made_library import APART, Places, Updates, library

from dynlora_cli.config.options import given
from dynlora_cli.errors import UsageError
from dynlora_cli.routing.router import Asked, Context, open_router


def around(x: float, y: float, z: float, count: int = 40, width: float = 0.3) -> dict[str, tuple[float, float, float]]:
    """Keys that lie around a direction."""
    noise = np.random.default_rng(0).normal(scale=width, size=(count, 3))
    return {f"key {n} at {x} {y} {z}": (x + a, y + b, z + c) for n, (a, b, c) in enumerate(noise.tolist())}


CLOUDS: Updates = {"law": ("2026-01-01", around(1, 0, 0)), "news": ("2026-02-01", around(0, 1, 0))}


def opened(root: Path, at: dict[str, Any], *options: str, updates: Updates = CLOUDS, **how: Any) -> Any:
    lib = library(root, updates, **how)
    made = Context(library=lib, encoder=Places(at), options=given("routers", "embedding", options))
    return open_router("embedding", made)


def decide(root: Path, where: tuple[float, float, float], *options: str, **how: Any) -> Any:
    (decision,) = opened(root, {"ask": where}, *options, **how).decide([Asked("ask")])
    return decision


def test_the_nearest_mean_is_taken_and_its_cosine_is_said(tmp_path: Path):
    decision = decide(tmp_path / "lib", (1, 0.2, 0), calibrated=False)
    keys = Places(CLOUDS["law"][1]).encode(list(CLOUDS["law"][1])).astype(np.float64)
    mean, ask = keys.mean(0), np.array([1, 0.2, 0])
    expected = mean @ ask / np.linalg.norm(mean) / np.linalg.norm(ask)
    assert decision.chosen == ("law",)
    assert decision.confidence["law"] == pytest.approx(expected, rel=1e-5)
    assert list(decision.confidence) == ["law", "news"]
    assert decision.key[0] in CLOUDS["law"][1]


def test_what_lies_further_than_nearly_all_keys_is_the_base_s(tmp_path: Path):
    decision = decide(tmp_path / "lib", (0.3, 0, 1), calibrated=False)
    assert decision.chosen == ()
    assert decision.reason.startswith("base: the nearest is law: cosine 0.")
    assert "needed" in decision.reason


@pytest.mark.parametrize("least", [0.0, 0.05, 0.5, 0.9])
def test_the_limit_is_what_it_says_of_the_keys(tmp_path: Path, least: float):
    """So many of an update's own keys lie nearer to the mean of the others than the limit; fp64, one by one."""
    router = opened(tmp_path / "lib", {}, f"least={least}", calibrated=False)
    for update, (_, keys) in enumerate(CLOUDS.values()):
        unit = Places(keys).encode(list(keys)).astype(np.float64)
        cosines = []
        for n in range(len(unit)):
            mean = np.delete(unit, n, 0).mean(0)
            cosines.append(float(unit[n] @ mean / np.linalg.norm(mean)))
        assert router.limit_E[update] == pytest.approx(np.quantile(cosines, least), abs=1e-5)


def test_under_a_calibration_the_limit_is_the_calibration_s(tmp_path: Path):
    """The request is further from the mean than any key, and its nearest key is near enough for the threshold."""
    far = (0.5, -0.1, 0.8)
    assert decide(tmp_path / "one", far, calibrated=False).chosen == ()
    decision = decide(tmp_path / "two", far, above=-100.0)
    assert decision.chosen == ("law",)
    assert "needed" not in decision.reason


def test_several_speak_with_weights_that_sum_to_one(tmp_path: Path):
    decision = decide(tmp_path / "lib", (1, 1, 0), "top_k=2", "least=0", above=-100.0)
    assert set(decision.chosen) == {"law", "news"}
    assert sum(decision.mix.values()) == pytest.approx(1)


def test_neither_the_order_of_updates_nor_other_requests_change_a_decision(tmp_path: Path):
    at = {f"ask {n}": (math.cos(n), math.sin(n), 0.2) for n in range(20)}
    asked = [Asked(text) for text in at]
    one = opened(tmp_path / "one", at, calibrated=False)
    other = opened(tmp_path / "two", at, calibrated=False, updates=dict(reversed(CLOUDS.items())))
    decisions = one.decide(asked)
    alone = [one.decide([each])[0] for each in asked]
    assert [(d.mix, d.reason, d.key) for d in alone] == [(d.mix, d.reason, d.key) for d in decisions]
    assert [decision.mix for decision in other.decide(asked)] == [decision.mix for decision in decisions]


def test_an_empty_request_is_the_base_s(tmp_path: Path):
    router = opened(tmp_path / "lib", {}, calibrated=False)
    assert [decision.chosen for decision in router.decide([Asked("  ")])] == [()]
    assert router.decide([]) == []


def test_a_guess_is_said(tmp_path: Path):
    router = opened(tmp_path / "lib", {}, updates=APART, calibrated=False)
    assert any("which is a guess" in note for note in router.notes)
    assert any("too few keys" in note and "law (1 key)" in note for note in router.notes)
    assert not any("guess" in note for note in opened(tmp_path / "other", {}).notes)


def test_updates_without_keys_are_said(tmp_path: Path):
    router = opened(tmp_path / "lib", {}, calibrated=False, updates={**CLOUDS, "mute": ("2026-01-01", {})})
    assert any("mute has no keys" in note for note in router.notes)
    with pytest.raises(UsageError, match="has keys"):
        opened(tmp_path / "other", {}, calibrated=False, updates={"mute": ("2026-01-01", {})})
