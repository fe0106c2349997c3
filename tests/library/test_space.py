"""Spaces and nearest keys, against the definition in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dynlora_cli.library.keys import BLOCK, Key, Keys, choose, nearest, space_of
from dynlora_cli.library.space import RIDGE, Space


def cone(count: int, seed: int, dimension: int = 12) -> np.ndarray:
    """Vectors of length 1 that all point much the same way, as hidden states do."""
    random = np.random.default_rng(seed)
    vectors = 3 + random.normal(size=(count, dimension)) * np.linspace(0.1, 2, dimension)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("counts", [(40, 30), (5, 3)], ids=["many", "fewer than dimensions"])
def test_cosines_are_those_of_the_definition(counts: tuple[int, int]):
    groups = [cone(count, seed) for seed, count in enumerate(counts)]
    asked = cone(7, 9)
    mean = np.mean([group.astype(np.float64).mean(0) for group in groups], axis=0)
    covariance = np.mean([(group - mean).T @ (group - mean) / len(group) for group in groups], axis=0)
    ridge = RIDGE * np.trace(covariance) / 12
    inner = np.linalg.inv(covariance + ridge * np.eye(12))
    keys = groups[0] - mean
    q = asked - mean
    expected = q @ inner @ keys.T
    expected /= np.sqrt(np.einsum("qd,de,qe->q", q, inner, q))[:, None] * np.sqrt(
        np.einsum("kd,de,ke->k", keys, inner, keys)
    )
    np.testing.assert_allclose(Space.of(groups).requests(asked).cosines(groups[0]), expected, atol=1e-4)


def test_the_plain_space_is_the_cosine():
    one, two = cone(5, 1), cone(6, 2)
    np.testing.assert_allclose(Space.plain(12).requests(one).cosines(two), one @ two.T, atol=1e-6)


def test_every_update_says_as_much_about_what_is_common():
    """An update with a hundred times the keys does not decide the space."""
    one, two = cone(10, 1), cone(10, 2)
    often = np.tile(two, (30, 1))
    few, many = (Space.of(groups).requests(one).cosines(two) for groups in ([one, two], [one, often]))
    np.testing.assert_allclose(few, many, atol=1e-4)


def test_keys_that_are_all_the_same_can_be_compared():
    same = np.tile(cone(1, 1), (4, 1))
    found = Space.of([same]).requests(cone(2, 2)).cosines(same)
    assert np.isfinite(found).all()


def test_the_nearest_key_of_each_update():
    vectors = [cone(BLOCK + 20, 1), cone(3, 2), cone(0, 3)]
    keys = [Keys(SimpleNamespace(name=str(n)), each) for n, each in enumerate(vectors)]  # type: ignore[arg-type]
    asked = cone(4, 5)
    score, index = nearest(asked, keys)
    cosine = asked @ vectors[0].T
    np.testing.assert_allclose(score[:, 0], cosine.max(1), atol=1e-6)
    assert (index[:, 0] == cosine.argmax(1)).all()
    assert (score[:, 2] == -1).all()
    assert (index[:, 2] == -1).all()
    assert space_of("base", keys).axes_RD.size
    assert not space_of("minilm", keys).axes_RD.size


def test_keys_are_few_different_and_chosen_by_hash():
    texts = [Key(f" text {number % 50} ", f"row {number}") for number in range(100)]
    kept, different = choose(texts, most=20)
    assert (len(kept), different) == (20, 50)
    assert kept == sorted(kept, key=lambda key: int(key.source.split()[1])), "in the order in which they came"
    again, _ = choose(reversed(texts), most=20)
    assert {key.text for key in again} == {key.text for key in kept}
    assert [key.text for key in choose([Key("", "row 1"), Key("  ", "row 2")])[0]] == []
