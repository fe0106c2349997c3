"""scripts/bench/images: masks against dynlora's own schedule, frontiers, and what is seen in a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynlora_cli.lora.timesteps.schedule import Schedule

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench" / "images"))

import image_tables as tables
import layers
import measures
from emoji_data import COLOURS, SIDE

KEYS = [("apple", 0), ("apple", 1), ("dog", 0), ("dog", 1)]


@pytest.mark.parametrize("least", [0, 1, 3])
def test_the_masks_are_those_of_the_schedule(least: int) -> None:
    t = torch.arange(0, 1001, dtype=torch.float32)
    for shape, rank in (("falling", layers.falling(least)), ("rising", layers.rising(least))):
        own = Schedule(min_rank=least, shape=shape)
        assert torch.equal(rank(t, 8), own.ranks_B(own.shares_B(t), 8)), shape
    own = Schedule(min_rank=least, terms=2)
    assert torch.equal(layers.falling(least, 2)(t, 8), own.ranks_B(own.shares_B(t), 8))


def test_a_cost_is_read_off_where_a_curve_reaches_the_fidelity() -> None:
    fidelity, cost = np.array([0.1, 0.5, 0.9]), np.array([0.0, 1.0, 3.0])
    assert tables.at_level(fidelity, cost, 0.7) == pytest.approx(2.0)
    assert tables.at_level(fidelity, cost, 0.3) == pytest.approx(0.5)
    assert np.isnan(tables.at_level(fidelity, cost, 0.95))


def test_an_arm_that_costs_half_at_each_fidelity_is_found_to_be_better() -> None:
    """Though it is the slower one: its last checkpoint is not compared with LoRA's last."""
    gain = {"lora": np.tile([0.1, 0.5, 0.9], (4, 1)), "slow": np.tile([0.1, 0.4, 0.7], (4, 1))}
    scale = np.array([[1.0], [1.1], [2.0], [2.1]])  # concepts differ more than arms do
    cost = {"lora": scale * (gain["lora"] - 0.1), "slow": scale * (gain["slow"] - 0.1) / 2}
    own, difference, low, high = tables.frontier(gain, cost, KEYS, 0.5)["slow"]
    assert own == pytest.approx(0.4 * scale.mean() / 2)
    assert difference == pytest.approx(-own)
    assert low <= difference <= high < 0
    assert np.isnan(tables.frontier(gain, cost, KEYS, 0.8)["slow"][0])


def test_only_what_all_arms_have_is_compared() -> None:
    def line(concept: str, arm: str) -> tables.Line:
        return {"concept": concept, "seed": 0, "arm": arm, "step": 40}

    lines = [line("apple", "base"), *(line(c, "lora") for c in ("apple", "dog")), line("dog", "t-lora")]
    by_arm, keys, _ = tables.complete(lines)
    assert keys == [("dog", 0)]
    assert {arm: len(found) for arm, found in by_arm.items()} == {"lora": 1, "t-lora": 1}


def test_a_context_is_seen_in_the_pixels() -> None:
    picture = np.full((SIDE, SIDE, 3), COLOURS["blue"], np.uint8)
    picture[4:12, 4:12] = COLOURS["red"]
    assert measures.follows(picture, "blue", "")
    assert not measures.follows(picture, "red", "")
    small = np.full((SIDE, SIDE, 3), 255, np.uint8)
    small[9:15, 1:7] = 0
    assert measures.follows(small, "white", "bottom left")
    assert not measures.follows(small, "white", "top left")
