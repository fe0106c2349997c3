"""A router is one new file: the tutorial's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hand_made_library import APART, Places, library
from tutorials import code_of

from dynlora_cli.config.options import given
from dynlora_cli.routing.router import Asked, Context, open_router


def test_it_takes_the_adapter_that_is_named(tmp_path: Path, plug_in: Any):
    (code,) = code_of("routers").values()
    plug_in("routers", "mentioned", code)
    lib = library(tmp_path / "lib", APART)
    asked = [Asked("what does the LAW say"), Asked("a lawyer"), Asked("hello")]
    for whole, expected in (("true", [("law",), (), ()]), ("false", [("law",), ("law",), ()])):
        made = Context(library=lib, encoder=Places({}), options=given("routers", "mentioned", [f"whole_words={whole}"]))
        router = open_router("mentioned", made)
        assert [decision.chosen for decision in router.decide(asked)] == expected
        assert router.notes == ["a request that names no adapter is answered by the base"]
