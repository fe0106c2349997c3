"""Mixes in text: one grammar, read and written."""

from __future__ import annotations

import random

import pytest

from dynlora_cli.config.mix import mix_text, parse_mix
from dynlora_cli.errors import UsageError

NAMES = ["a", "b", "my-run", "my", "run", "1e-3", "x.y_z"]


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("base", {}),
        ("a", {"a": 1.0}),
        (" a ", {"a": 1.0}),
        ("a+b", {"a": 1.0, "b": 1.0}),
        ("0.7*a+0.3*b", {"a": 0.7, "b": 0.3}),
        ("0.7 * a + .3 * b", {"a": 0.7, "b": 0.3}),
        ("a-0.5*b", {"a": 1.0, "b": -0.5}),
        ("-a", {"a": -1.0}),
        ("- 2*a", {"a": -2.0}),
        ("my-run", {"my-run": 1.0}),
        ("my-run-my", {"my-run": 1.0, "my": -1.0}),
        ("my - run", {"my": 1.0, "run": -1.0}),
        ("1e-3", {"1e-3": 1.0}),
        ("1e-3*a", {"a": 0.001}),
        ("2*1e-3+x.y_z", {"1e-3": 2.0, "x.y_z": 1.0}),
        ("0*a", {}),
        ("0*a+b", {"b": 1.0}),
    ],
)
def test_reads(text: str, mix: dict[str, float]):
    assert parse_mix(text, NAMES) == mix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a name is missing"),
        ("  ", "a name is missing"),
        ("a+", "a name is missing"),
        ("0.5*", "a name is missing"),
        ("a++b", "a name is missing"),
        ("a+a", "there twice"),
        ("my-rum", "did you mean 'my-run'"),
        ("bsae", "did you mean 'base'"),
        ("a+base", "base is the model alone"),
        ("0.5*auto", "auto is the router's choice"),
        ("nan*a", "nan is no weight"),
        ("inf*a", "inf is no weight"),
        ("1e999*a", "1e999 is no weight"),
        ("1e300*a", "1e300 is no weight"),
        ("b - 3.5e38*a", "3.5e38 is no weight"),
        ("1.2.3*a", "1.2.3 is no weight"),
        ("0.5a", "no adapter '0.5a'"),
        ("a b", "no adapter 'a b'"),
        ("A", "no adapter 'A'"),
    ],
)
def test_refuses(text: str, words: str):
    with pytest.raises(UsageError) as refused:
        parse_mix(text, NAMES)
    assert words in refused.value.message


def test_says_what_there_is():
    with pytest.raises(UsageError) as refused:
        parse_mix("c", ["a", "b"])
    assert refused.value.hint is not None
    assert "there are: a, b" in refused.value.hint
    with pytest.raises(UsageError) as refused:
        parse_mix("c", [])
    assert "no adapter is loaded" in str(refused.value.hint)


def test_a_name_with_signs_in_it_is_taken_whole():
    names = ["a", "b", "a+b", "0.5*a"]
    assert parse_mix("a+b", names) == {"a+b": 1.0}
    assert parse_mix("0.5*a", names) == {"0.5*a": 1.0}
    assert parse_mix("2*a+b", names) == {"a+b": 2.0}


def test_written_and_read_again():
    draw = random.Random(0)
    for _ in range(300):
        chosen = draw.sample(NAMES, draw.randint(0, 4))
        weights = [draw.choice([1.0, -1.0, 0.7, 2.0, -0.3, draw.uniform(-5, 5), 1e-7, 3e20]) for _ in chosen]
        mix = dict(zip(chosen, weights, strict=True))
        assert parse_mix(mix_text(mix), NAMES) == mix


@pytest.mark.parametrize(
    ("mix", "text"),
    [({}, "base"), ({"a": 1}, "a"), ({"a": 0.7, "b": -0.3}, "0.7*a - 0.3*b"), ({"a": -1, "b": 2.0}, "-a+2*b")],
)
def test_written(mix: dict[str, float], text: str):
    assert mix_text(mix) == text


def test_a_sum_beside_an_adapter_that_is_called_like_it():
    names = ["a", "b", "a+b", " c"]
    mixes: list[dict[str, float]] = [{"a": 1, "b": 1}, {"a": 0.5, "b": 1}, {"a+b": 0.5}, {"a+b": 1}, {"b": 1, "a": 1}]
    for mix in [*mixes, {" c": 1.0}]:
        assert parse_mix(mix_text(mix, names), names) == mix


@pytest.mark.parametrize("weight", ["1e39", "1e300", "9" * 40])
def test_weights_that_fp32_does_not_have(weight: str):
    with pytest.raises(UsageError, match="is no weight"):
        parse_mix(f"{weight}*a", NAMES)
