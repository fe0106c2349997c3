"""How tokens are chosen, as people and requests say it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.7}, Sampling(do_sample=True, temperature=0.7)),
        ({"temperature": 0}, Sampling()),
        ({"temperature": 0, "top_p": 0.9}, Sampling(top_p=0.9)),
        ({"top_k": 0}, Sampling(do_sample=True)),
        ({"top_k": 40}, Sampling(do_sample=True, top_k=40)),
        ({"min_p": 0.1}, Sampling(do_sample=True, min_p=0.1)),
        ({"seed": 3}, Sampling(seed=3)),
        ({"do_sample": True}, Sampling(do_sample=True)),
        ({"do_sample": False}, Sampling()),
        ({"max_new_tokens": 5, "stop_strings": ["a"]}, Sampling(max_new_tokens=5, stop_strings=("a",))),
        ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"top_p": None, "temperature": None, "max_new_tokens": None}, Sampling()),
    ],
    ids=str,
)
def test_what_is_given(given: dict[str, Any], expected: Sampling):
    assert Sampling.of(**given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1.0}, "max_new_tokens is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is"),
        ({"stop_strings": [""]}, "one of them is empty"),
        ({"stop_strings": ["a"] * 65}, "there are 65"),
        ({"do_sample": False, "top_p": 0.9}, "top_p is for drawn tokens"),
        ({"do_sample": True, "temperature": 0}, "temperature 0 draws nothing"),
    ],
    ids=str,
)
def test_what_makes_no_sense(given: dict[str, Any], words: str):
    with pytest.raises(UsageError) as refused:
        Sampling.of(**given)
    assert words in refused.value.message
