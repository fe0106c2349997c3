"""`dynlora eval --router`: decisions of routers of both units on real adapters of a tiny model, and their losses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Dynlora
from library_helpers import Made, silent
from tiny_run import write_rows

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.commands.evaluate_library import Wanted, run
from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.library.calibration import Confidence, Threshold
from dynlora_cli.library.features import Background
from dynlora_cli.library.held_out import read_held_out
from dynlora_cli.library.learn import Calibration, Judge
from dynlora_cli.library.library import library_for_writing
from dynlora_cli.library.loaded import Loaded, load
from dynlora_cli.library.losses import RowLosses
from dynlora_cli.models.quiet import quiet
from dynlora_cli.routing.router import Context, open_router
from dynlora_cli.routing.shares import Shares


@pytest.fixture(scope="session")
def pair_once(made_once: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A library of two updates that is not calibrated."""
    root = Path(shutil.copytree(made_once.root, tmp_path_factory.mktemp("pair") / "lib"))
    rows = write_rows(root.parent / "other.jsonl", 30)
    rows.write_text(rows.read_text().replace(" -> ", " becomes "))
    with quiet:
        add(root, Addition(made_once.other, name="other", data=rows, date="2020-01-01"), silent)
    return made_once._replace(root=root)


@pytest.fixture
def pair(pair_once: Made, tmp_path: Path) -> Made:
    return pair_once._replace(root=Path(shutil.copytree(pair_once.root, tmp_path / "pair")))


@pytest.fixture(scope="session")
def loaded(pair_once: Made) -> Loaded:
    with quiet:
        return load(pair_once.root)


def set_threshold(root: Path, evidence: float) -> None:
    """A calibration by the score alone, with this threshold."""
    judge = Judge(Confidence((1.0, 0.0, 0.0), 0.0), Background((0.0, 0.0), (1.0, 1.0)))
    learned = Calibration(("first", "other"), judge, Threshold(evidence, 0.2, 30, True), 1, {})
    with library_for_writing(root) as library:
        library.put_calibration(learned.as_dict())


def evaluate(pair: Made, router: str | None, *options: str, **more: Any) -> dict[str, Any]:
    return run(pair.root, Wanted(router=router, options=options, **more), silent)


def plain(loaded: Loaded, name: str) -> dict[str, Any]:
    """The loss of every held-out row of an update, by what is on the base."""
    rows = [row.example for row in read_held_out(loaded.library.entry(name))]
    measure = RowLosses(loaded.base, rows)
    found: dict[str, Any] = {n: measure.of(loaded.adapter(n), n) for n in ("first", "other")}
    return found | {"base": measure.of(None, "base"), "measure": measure}


@pytest.mark.parametrize(
    ("router", "options"),
    [("embedding", ("least=0.3",)), ("likelihood", ()), ("fixed", ("mix=base",)), ("fixed", ("mix=other",))],
)
def test_each_row_has_the_loss_of_what_was_chosen_to_the_bit(
    router: str, options: tuple[str, ...], pair: Made, loaded: Loaded
):
    report = evaluate(pair, router, *options)
    assert (report["router"], report["unit"]) == (router, "request")
    for one in report["sets"]:
        losses = plain(loaded, one["origin"])
        mine = [decision for decision in report["decisions"] if decision["source"] == one["source"]]
        assert len(mine) == one["rows"]
        for row, decision in enumerate(mine):
            assert decision["loss"] == losses[(decision["chosen"] or ["base"])[0]][row]
            assert decision["base_loss"] == losses["base"][row]
        right = sum(decision["chosen"] == [one["origin"]] for decision in mine) / len(mine)
        assert one["right"] == right
        assert one["losses"]["library"] == one["routed"]


def test_a_blend_is_what_the_bank_computes(pair: Made, loaded: Loaded):
    report = evaluate(pair, "fixed", "mix=0.6*first-0.2*other")
    losses = plain(loaded, "first")
    measure: RowLosses = losses["measure"]
    with quiet, Bank(loaded.base.model, {n: loaded.adapter(n) for n in ("first", "other")}) as bank:
        expected = measure.under(bank.active([{"first": 0.6, "other": -0.2}]), "blend")
    mine = [d["loss"] for d in report["decisions"] if d["source"] == "held-out rows of first"]
    assert mine == pytest.approx(expected, rel=1e-4)
    assert not np.allclose(mine, losses["first"], rtol=1e-2)


@pytest.mark.parametrize("router", ["arrow", "spectr", "lag"])
def test_rows_that_are_decided_by_token_are_measured_so(router: str, pair: Made, loaded: Loaded):
    report = evaluate(pair, router)
    losses = plain(loaded, "first")
    with quiet, Bank(loaded.base.model, {n: loaded.adapter(n) for n in ("first", "other")}) as bank:
        gates: Any = open_router(router, Context(bank=bank))
        expected = losses["measure"].under(bank.routed(gates), "routed")
    mine = [d for d in report["decisions"] if d["source"] == "held-out rows of first"]
    assert [d["loss"] for d in mine] == pytest.approx(expected, rel=1e-6)
    assert not np.allclose(expected, losses["base"], rtol=1e-3)
    assert report["unit"] == "token"
    assert any("when none of the adapters fits" in note for note in report["notes"])
    for decision in mine:
        assert decision["weights"] is None
        assert 0.99 < sum(decision["shares"].values()) < 1 + 1e-5
    assert sum(report["all"]["active"].values()) == pytest.approx(1)


def test_shares_are_of_tokens_that_are_no_padding(pair: Made, loaded: Loaded):
    """The share of a row is that of the row alone, whatever it is padded to beside others."""
    report = evaluate(pair, "lag")
    rows = [row.example for row in read_held_out(loaded.library.entry("other"))]
    assert len({len(row.input_ids) for row in rows[:8]}) > 1
    mine = [d for d in report["decisions"] if d["source"] == "held-out rows of other"]
    with quiet, Bank(loaded.base.model, {n: loaded.adapter(n) for n in ("first", "other")}) as bank:
        gates: Any = open_router("lag", Context(bank=bank))
        for row in range(4):
            alone = RowLosses(loaded.base, rows[row : row + 1])
            shares = Shares(gates, bank.names, 1)
            alone.under(bank.routed(shares), "alone", watch=shares.watch)
            assert shares.of(0) == pytest.approx(mine[row]["shares"], abs=0.02)


@pytest.mark.parametrize("router", ["arrow", "likelihood", "embedding"])
def test_under_a_calibration_the_base_s_rows_have_its_loss_to_the_bit(router: str, pair: Made, loaded: Loaded):
    set_threshold(pair.root, math.inf)
    report = evaluate(pair, router)
    assert all(decision["loss"] == decision["base_loss"] for decision in report["decisions"])
    assert report["all"]["active"] == {"base": 1.0}
    assert report["rate"] == 0.2
    set_threshold(pair.root, -1e9)
    report = evaluate(pair, router)
    assert "base" not in report["all"]["active"]
    assert not any("guess" in note or "when none" in note for note in report["notes"])


def test_without_a_calibration_and_a_name_the_nearest_answers_and_that_is_said(pair: Made):
    report = evaluate(pair, None)
    assert report["router"] == "embedding"
    assert any("is not calibrated, so the nearest update answers" in note for note in report["notes"])
    set_threshold(pair.root, -1e9)
    assert evaluate(pair, None)["router"] == "calibrated"


def test_answers_by_token_are_those_of_the_routed_model(pair: Made):
    report = evaluate(pair, "arrow", data=(f"first={pair.rows}",), max_samples=4, answers=2)
    assert len(report["samples"]) == 2
    assert all(sample["answers"]["base"] != sample["answers"]["library"] for sample in report["samples"])


def test_adapters_without_a_library(pair: Made, dynlora: Dynlora):
    data = ("--data", f"out={pair.rows}", "--data", f"unrelated={pair.rows}", "--max-samples", 6)
    both = ("--adapter", pair.run, "--adapter", pair.other)
    shown = dynlora("eval", *both, "--router", "likelihood", *data, "--explain", "--json")
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert report["library"] is None
    assert set(report["all"]["losses"]) == {"base", "out", "other"}
    assert "the prompt costs" in shown.err
    assert "likelihood against base" in shown.err
    by_token = dynlora("eval", *both, "--router", "arrow", "--set", "top_k=1", *data, "--explain")
    assert by_token.code == 0, by_token.err
    assert "average weight on 12 rows: " in by_token.err
    assert "decided on every token" in by_token.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--router", "likelihood"], "chooses among adapters, and none is named"),
        (["--router", "likelyhood", "--library", "LIB"], "did you mean 'likelihood'"),
        (["--router", "embedding", "--adapter", "RUN"], "goes by the keys of a library"),
        (["--router", "arrow", "--library", "LIB", "--set", "topk=2"], "no option 'topk'; did you mean 'top_k'"),
        (["--router", "arrow", "--library", "LIB", "--set", "top_k=0"], "must be"),
        (["--router", "fixed", "--library", "LIB", "--set", "mix=frist"], "did you mean 'first'"),
        (
            ["--router", "arrow", "--library", "LIB", "--fail-above", "2"],
            "--library and --fail-above do not go together",
        ),
        (["--router", "arrow", "--adapter", "RUN", "--also", "a=b"], "--router and --also do not go together"),
        (["--adapter", "RUN", "--set", "top_k=2"], "--set is for the router, and there is none"),
    ],
)
def test_what_cannot_be(words: list[str], said: str, pair: Made, dynlora: Dynlora):
    named = {"LIB": pair.root, "RUN": pair.run}
    answer = dynlora("eval", *(named.get(word, word) for word in words))
    assert answer.code == 2
    assert said in answer.err
