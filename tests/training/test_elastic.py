"""`rank.elastic`: any first part of the components is an adapter, and `prune --policy prefix` takes it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from tiny_run import assembled, make_recipe, train

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import RecipeError
from dynlora_cli.lora.nested import NestedLinear

ELASTIC = ("rank.elastic=true", "rank.init=6", "rank.budget=6", "train.learning_rate=2e-2")


def test_a_step_uses_the_same_first_share_of_all_layers_and_evaluation_all(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, *ELASTIC))
    pool, batch = run.trained, run.batches.step(0, 0)[0]
    pool.begin_step(3, 12)
    shares = {layer.share for layer in pool.layers.values()}
    assert len(shares) == 1
    assert 0 < shares.pop() < 1
    for layer in pool.layers.values():
        layer.share = 0.5
    run.model.eval()
    with torch.no_grad():
        half = run.model(**batch.inputs).logits
        pool.after_update(0.0)
        keep_K = torch.cat([torch.arange(count) < count // 2 for count in pool.counts.values()])
        with pool.masked(keep_K):
            torch.testing.assert_close(run.model(**batch.inputs).logits, half, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(run.model(**batch.inputs).logits, half, rtol=1e-3, atol=1e-3)


def test_a_prefix_is_cut_off_number_for_number_and_is_worth_more_than_a_last_part(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path, *ELASTIC)
    train(recipe)
    prune = ["prune", "--adapter", recipe.output_dir, "--budget", "0.5", "--policy", "prefix"]
    answer = dynlora(*prune, "--out", tmp_path / "half", "--json")
    assert answer.code == 0, answer.err
    whole, half = read_adapter(Path(recipe.output_dir)), read_adapter(tmp_path / "half")
    for name, factors in whole.layers.items():
        assert torch.equal(half.layers[name].a_CI, factors.a_CI[:3])
        assert torch.equal(half.layers[name].b_OC, factors.b_OC[:, :3])
    first, last = (sum(_energy(f, part) for f in whole.layers.values()) for part in (slice(3), slice(3, None)))
    assert first > 1.2 * last


def _energy(factors, part) -> float:
    return (factors.b_OC[:, part] @ factors.a_CI[part]).square().sum().item()


@pytest.mark.slow
def test_it_is_what_variant_dylora_does(tmp_path: Path):
    found = []
    for how in (("rank.elastic=true",), ("adapter.variant=dylora",)):
        recipe = make_recipe(tmp_path, *ELASTIC[1:], *how, out=how[0])
        summary, _ = train(recipe)
        found.append(summary["loss_after"])
    assert found[0] == found[1]


def test_components_that_training_prunes_go_from_the_end(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, "rank.elastic=true"))
    layer = next(iter(run.trained.layers.values()))
    assert isinstance(layer, NestedLinear)
    assert not layer.turns
    ranked_C = layer.ranked(torch.rand(layer.count, generator=torch.Generator().manual_seed(0)))
    assert (ranked_C.diff() <= 0).all(), "and where scores are equal, the last goes first"


REFUSED = [
    ("adapter.variant=dora", "without an order"),
    ("adapter.variant=dylora", "elastic already"),
    ("adapter.from=v1", "old components stand before new ones"),
    ("adapter.init_weights=pissa", "no adapter"),
    ("train.compile=true", "compiled anew"),
    ("train.cuda_graphs=true", "same components"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_does_not_go_with_it(override: str, message: str, tmp_path: Path):
    with pytest.raises(RecipeError) as error:
        make_recipe(tmp_path, "rank.elastic=true", override)
    assert message in error.value.message
