"""The guess at a learning rate: it follows rank, width, length and variant, and is never absurd."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import assembled, make_recipe
from torch import nn

from dynlora_cli import plugins
from dynlora_cli.training.rate.prior import HIGHEST, LOWEST, prior, rate_for, rounded, weight_size


def test_more_components_wider_models_smaller_weights_and_longer_runs_want_lower_rates():
    usual = rate_for(16, 192, 0.1, 200)
    assert rate_for(1, 192, 0.1, 200) > 2 * usual
    assert rate_for(64, 192, 0.1, 200) < usual
    assert rate_for(16, 4096, 0.1, 200) < usual / 3
    assert rate_for(16, 192, 0.02, 200) < usual / 2
    assert rate_for(16, 192, 0.1, 20_000) < usual / 2
    assert rate_for(16, 192, 0.1, 2) == rate_for(16, 192, 0.1, 30)


@pytest.mark.parametrize("rank", [0.25, 1, 16, 256])
@pytest.mark.parametrize("width", [32, 576, 4096, 16384])
@pytest.mark.parametrize("steps", [2, 200, 100_000])
def test_it_is_never_absurd(rank: float, width: float, steps: int):
    assert 1e-6 < rounded(rate_for(rank, width, 0.025, steps)) <= 5e-2


def test_it_lies_where_others_train_large_models():
    """Rank 16, alpha 32: 1e-4 to 5e-4 is what tools ship for 7 to 8 B and Tinker's sweep found, halved for s = 2."""
    assert 1e-4 < rate_for(16, 4096, 0.02, 1000) < 5e-4


def test_the_size_of_weights():
    bases = [nn.Linear(8, 8) for _ in range(40)]
    for base in bases:
        base.weight.data.fill_(0.25)
    assert weight_size(bases) == pytest.approx(0.25)
    bases[0].weight.data.fill_(0.0)  # a layer of zeros decides nothing alone
    assert weight_size(bases) > 0.1


def test_it_is_a_number_that_can_be_written_down():
    assert rounded(0.00123456) == 0.0012
    assert rounded(1.0) == HIGHEST
    assert rounded(0.0) == LOWEST


def test_that_of_a_run(tmp_path: Path):
    """By components, whatever the budget is called, and by the variant."""
    rates = {
        settings: prior(assembled(make_recipe(tmp_path, "train.learning_rate=auto", *settings.split()), fill=False))
        for settings in ("rank.init=8", "rank.init=2", "adapter.variant=hira", "adapter.variant=full")
    }
    assert rates["rank.init=2"] == pytest.approx(2 * rates["rank.init=8"], rel=0.06)
    assert rates["adapter.variant=hira"] > 3 * rates["rank.init=8"]
    assert rates["adapter.variant=full"] < rates["rank.init=8"] / 3


def test_the_factors_of_variants_are_numbers():
    for name in plugins.names("variants"):
        assert 0.01 <= plugins.declared("variants", name, "RATE", 1.0) <= 20
