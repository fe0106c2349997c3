"""What all routers share: how they are opened, and a calibration's word on none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hand_made_library import APART, Places, library

from dynlora_cli import plugins
from dynlora_cli.config.options import given
from dynlora_cli.errors import UsageError
from dynlora_cli.library.activation import Activator, Decision
from dynlora_cli.routing.router import Asked, Context, default_router, needs_of, open_router, unit_of

AT = {"about law": (1, 0.1, 0), "about news": (0.1, 1, 0), "about nothing": (0.2, 0.2, 1), "": (0, 0, 0)}
ALL = [Asked(text) for text in AT]


def chosen(decisions: Sequence[Decision]) -> list[tuple[str, ...]]:
    return [decision.chosen for decision in decisions]


def context(root: Path, name: str = "embedding", *options: str, **how: Any) -> Context:
    lib = library(root, how.pop("updates", APART), **how)
    return Context(library=lib, encoder=Places(AT), options=given("routers", name, options))


def test_calibrated_is_the_library_s_activator(tmp_path: Path):
    made = context(tmp_path / "lib", "calibrated")
    router = open_router("calibrated", made)
    assert made.library is not None
    assert router.decide(ALL) == Activator(made.library, Places(AT)).decide(list(AT))
    assert chosen(router.decide(ALL)) == [("law",), ("news",), (), ()]


def test_a_decision_s_mix_is_one_of_each_chosen_unless_it_says_otherwise():
    assert Decision(("a", "b"), {}, "").mix == {"a": 1.0, "b": 1.0}
    assert Decision(("a",), {}, "", weights={"a": 0.3}).mix == {"a": 0.3}
    assert Decision((), {}, "").mix == {}
    with pytest.raises(ValueError, match="no one mix"):
        _ = Decision(("a",), {}, "", by_token=True).mix


def test_what_a_router_needs_is_known_without_opening_it(tmp_path: Path):
    lib = library(tmp_path / "lib", APART)
    assert needs_of("embedding") == needs_of("calibrated", lib) == {"keys"}
    assert needs_of("fixed", lib) == set()
    assert {unit_of(name) for name in plugins.names("routers")} <= {"request", "token"}
    with pytest.raises(UsageError, match="did you mean 'embedding'"):
        unit_of("embeding")


def test_the_default_is_the_calibration_where_there_is_one(tmp_path: Path):
    assert default_router(library(tmp_path / "one", APART)) == ("calibrated", "")
    name, said = default_router(library(tmp_path / "two", APART, calibrated=False))
    assert name == "embedding"
    assert "is not calibrated" in said


@pytest.mark.parametrize("name", ["embedding", "calibrated"])
def test_no_library_no_keys(name: str):
    with pytest.raises(UsageError, match=f"the router {name} goes by the keys of a library"):
        open_router(name, Context())


TOY = """
from dynlora_cli.library.activation import Decision
UNIT, NEEDS = "request", ()
class Toy:
    notes = ["a toy"]
    def __init__(self, context): self.context = context
    def decide(self, requests): return [Decision((self.context.names[-1],), {}, "the last") for _ in requests]
def make(context): return Toy(context)
"""


def test_a_calibration_decides_on_none_for_every_router(tmp_path: Path, plug_in: Any):
    """The toy would take the same update for everything; it is asked only where some update passes."""
    plug_in("routers", "toy", TOY)
    made = context(tmp_path / "lib", "toy")
    assert needs_of("toy", made.library) == {"keys"}
    router = open_router("toy", made)
    decisions = router.decide(ALL)
    assert chosen(decisions) == [("news",), ("news",), (), ()]
    assert decisions[2].reason.startswith("base: the most likely is")
    assert "a toy" in router.notes
    assert [router.decide([one])[0] for one in ALL] == decisions


def test_an_update_that_the_calibration_has_not_seen_is_no_candidate(tmp_path: Path, plug_in: Any):
    plug_in("routers", "toy", TOY)
    router = open_router("toy", context(tmp_path / "lib", "toy", seen=["law"]))
    assert chosen(router.decide(ALL)) == [("law",), (), (), ()]
    assert any("has not seen news" in note for note in router.notes)


def test_a_router_whose_word_is_final_is_asked_always(tmp_path: Path, plug_in: Any):
    plug_in("routers", "toy", TOY + "FINAL = True\n")
    assert chosen(open_router("toy", context(tmp_path / "lib", "toy")).decide(ALL)) == [("news",)] * 4


def test_a_router_by_token_is_asked_for_the_requests_that_pass(tmp_path: Path, plug_in: Any):
    plug_in(
        "routers",
        "toy",
        TOY.replace('"request"', '"token"').replace("def decide(self, requests)", "def gates(self, *of)"),
    )
    router = open_router("toy", context(tmp_path / "lib", "toy"))
    decisions = router.decide(ALL)
    assert [decision.by_token for decision in decisions] == [True, True, False, False]
    assert chosen(decisions) == [("law", "news")] * 2 + [()] * 2
    assert callable(router.gates)  # type: ignore[union-attr]


def test_a_router_that_computes_is_refused_where_there_is_nothing_to_compute_with(tmp_path: Path, plug_in: Any):
    plug_in("routers", "toy", TOY.replace('NEEDS = "request", ()', "NEEDS = \"request\", ('base',)"))
    with pytest.raises(UsageError, match="not in memory here") as raised:
        open_router("toy", replace(context(tmp_path / "lib", "toy")))
    assert "embedding" in str(raised.value.hint)
