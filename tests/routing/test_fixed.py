"""The router fixed: one mix for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_made_library import APART, library

from dynlora_cli.config.options import given
from dynlora_cli.errors import UsageError
from dynlora_cli.routing.router import Asked, Context, open_router


def opened(root: Path, *options: str):
    """On a calibrated library, whose threshold has no say here."""
    return open_router("fixed", Context(library=library(root, APART), options=given("routers", "fixed", options)))


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("law", {"law": 1.0}),
        ("law+news", {"law": 1.0, "news": 1.0}),
        ("0.7*law+0.3*news", {"law": 0.7, "news": 0.3}),
        ("law-0.5*news", {"law": 1.0, "news": -0.5}),
        ("base", {}),
    ],
)
def test_every_request_gets_the_mix(text: str, mix: dict[str, float], tmp_path: Path):
    one, other = opened(tmp_path / "lib", f"mix={text}").decide([Asked("about law"), Asked("")])
    assert one == other
    assert one.mix == mix
    assert set(one.chosen) == set(mix)


def test_it_must_be_told(tmp_path: Path):
    with pytest.raises(UsageError, match="must be told which adapters"):
        opened(tmp_path / "lib")
    with pytest.raises(UsageError, match="did you mean 'law'"):
        opened(tmp_path / "other", "mix=lew")
