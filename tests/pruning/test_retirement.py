"""Retiring an update, on adapters made by hand: what goes, what stays, and when that is what there was before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.errors import UsageError
from dynlora_cli.pruning.covariances import Covariances
from dynlora_cli.pruning.retire import altered_births, compare, find, in_words, reasons, retire

WIDTHS = {"up": (6, 9), "down": (9, 6)}


def birth(name, old=None, run=None):
    run = run or f"{name}-0123"
    return {"run": run, "name": name, "date": None, "data_sha256": None, "folder": f"/runs/{name}", "old": old}


def adapter(*births, born=None, **record):
    """Two or three components of each birth in every layer, unless `born` says otherwise."""
    counts = born or {name: tuple(2 + index for index in range(len(births))) for name in WIDTHS}
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, (d_in, d_out) in WIDTHS.items():
        rank = sum(counts[name])
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        layers[name] = Factors(a, b, born=counts[name] if len(births) > 1 else ())
    folder = Path("/runs") / births[-1]["name"]
    return Adapter(folder, layers, {}, {"run_id": births[-1]["run"], "births": list(births), **record})


CHAIN = birth("law"), birth("tax", "freeze"), birth("market", "freeze")


@pytest.mark.parametrize("wanted", ["tax", "tax-0123", "tax-0", "/runs/tax", "/runs/./tax"])
def test_an_update_is_named_by_its_name_its_id_or_its_folder(wanted):
    assert find(adapter(*CHAIN), wanted) == [1]


@pytest.mark.parametrize("wanted", ["finance", "ta", "", "/runs/finance"])
def test_an_unknown_update_is_answered_with_those_that_there_are(wanted):
    with pytest.raises(UsageError, match="no such update") as error:
        find(adapter(*CHAIN), wanted)
    assert all(f"{name} (run {name}-0123)" in error.value.hint for name in ("law", "tax", "market"))


def test_a_name_that_two_updates_have_is_not_guessed():
    twins = adapter(birth("law", run="one1"), birth("law", "freeze", run="two2"))
    with pytest.raises(UsageError, match="several updates"):
        find(twins, "law")
    assert find(twins, "two2") == [1]


def test_what_stays_is_number_for_number_as_it_was():
    before = adapter(*CHAIN)
    found = retire(before, ["tax"])
    for name, factors in found.left.layers.items():
        kept = torch.tensor([True, True, False, False, False, True, True, True, True])
        assert torch.equal(factors.a_CI, before.layers[name].a_CI[kept])
        assert torch.equal(factors.b_OC, before.layers[name].b_OC[:, kept])
        assert factors.born == (2, 4)
    assert [each["name"] for each in found.left.births] == ["law", "market"]
    assert [each["name"] for each in found.gone] == ["tax"]


def test_a_layer_that_held_nothing_else_is_left_out():
    born = {"up": (2, 0, 1), "down": (0, 3, 0)}
    found = retire(adapter(*CHAIN, born=born), ["tax"])
    assert set(found.left.layers) == {"up"}


def test_an_update_of_which_the_budget_left_nothing_is_said_to_be_gone():
    with pytest.raises(UsageError, match="no component left that began in tax"):
        retire(adapter(*CHAIN, born={"up": (2, 0, 1), "down": (1, 0, 0)}), ["tax"])


@pytest.mark.parametrize("wanted", [["law"], ["law-0123", "law"]])
def test_a_whole_adapter_is_not_retired(wanted):
    with pytest.raises(UsageError, match="nothing would be left"):
        retire(adapter(birth("law")), wanted)


def test_all_of_a_chain_is_not_retired_either():
    with pytest.raises(UsageError, match="law and tax and market"):
        retire(adapter(*CHAIN), ["market", "tax", "law"])


def names(*births, gone, **options):
    return "; ".join(reasons(births, {[each["name"] for each in births].index(name) for name in gone}, **options))


def test_the_last_update_beside_frozen_components_is_exact():
    assert names(*CHAIN, gone=["market"]) == ""
    assert names(*CHAIN, gone=["market", "tax"]) == ""


def test_what_was_trained_on_top_is_named():
    assert names(*CHAIN, gone=["tax"]) == "market was trained on top of tax"
    assert names(*CHAIN, gone=["law"]) == "tax and market were trained on top of law"
    assert names(*CHAIN, gone=["law", "market"]) == "tax was trained on top of law"


@pytest.mark.parametrize(("old", "text"), [("tune", "components further"), ("magnitudes", "components' magnitudes")])
def test_an_update_that_trained_the_earlier_components_is_named(old, text):
    chain = birth("law"), birth("tax", old)
    assert names(*chain, gone=["tax"]) == f"tax trained the earlier {text}"
    assert "market trained" not in names(*chain, birth("market", "freeze"), gone=["tax", "market"])


def test_adapters_that_were_merged_side_by_side_did_not_learn_from_each_other():
    merged = birth("law"), birth("tax", "tune"), birth("med"), birth("drugs", "tune")
    assert names(*merged, gone=["med", "drugs"]) == ""
    assert names(*merged, gone=["law", "tax"]) == ""
    assert names(*merged, gone=["drugs"]) == "drugs trained the earlier components further"
    assert names(*merged, gone=["law"]) == "tax was trained on top of law"


def test_what_came_after_training_is_named():
    assert "another basis" in names(*CHAIN, gone=["market"], altered=["pruned"])
    assert "healing" in names(*CHAIN, gone=["market"], altered=["healed"])
    assert "head" in names(*CHAIN, gone=["market"], has_head=True)


def test_an_update_that_was_retired_before_has_left_its_mark():
    first = retire(adapter(birth("law"), birth("tax", "tune"), birth("market", "freeze")), ["tax"])
    assert [(each["name"], each["began_with"]) for each in first.left.record["retired"]] == [("tax", 1)]
    again = adapter(*first.births, retired=first.left.record["retired"])
    found = retire(again, ["market"])
    assert found.why == ["tax, retired before, trained the earlier components further"]
    assert [(each["name"], each["began_with"]) for each in found.left.record["retired"]] == [("tax", 1), ("market", 1)]
    # that only law's components carry it: market's, which were born later, do not
    law = retire(again, ["law"])
    assert not any("retired before" in why for why in law.why)
    assert [each["began_with"] for each in law.left.record["retired"]] == [0, 0]


def test_the_record_of_what_is_left_does_not_speak_of_the_retired_rows():
    recorded = {
        "recipe": {"model": {"name_or_path": "base"}, "dataset": {"train": ["tax.jsonl"]}},
        "data": {"sha256": "1", "date": "d"},
    }
    last = retire(adapter(birth("law"), birth("tax", "freeze"), task="causal-lm", **recorded), ["tax"])
    assert last.left.record.keys() == {"births", "task", "data", "retired", "altered"}, (
        "its folder is not there to say more"
    )
    assert last.left.record["data"] == {"date": "d"}
    first = retire(adapter(birth("law"), birth("tax", "freeze"), **recorded), ["law"])
    assert first.left.record["data"] == recorded["data"], "of tax, which stays"


def test_components_are_compared_with_those_of_the_earlier_adapter():
    before = adapter(*CHAIN[:2])
    found = retire(before, ["tax"])
    earlier = adapter(CHAIN[0], born=dict.fromkeys(WIDTHS, (2,)))
    earlier = earlier.with_layers(
        {
            name: replace(factors, a_CI=before.layers[name].a_CI[:2], b_OC=before.layers[name].b_OC[:, :2])
            for name, factors in earlier.layers.items()
        }
    )
    same = compare(found.left, earlier)
    assert (same.components, same.left, same.same) == (4, 4, 4)
    assert in_words(found, same) == (
        "exact: the components beside tax were held as they were, so what is left is law, number for number as in "
        "/runs/law."
    )
    fewer = found.left.with_layers({name: f.keep(torch.tensor([False, True])) for name, f in found.left.layers.items()})
    less = compare(fewer, earlier)
    assert (less.components, less.left, less.same) == (4, 2, 2)
    assert "less 2 components that the budget has removed since" in in_words(found, less)
    nudged = found.left.with_layers(
        {name: replace(f, b_OC=f.b_OC * (1 + 1e-7 * (name == "up"))) for name, f in found.left.layers.items()}
    )
    assert compare(nudged, earlier).same == 2


def test_covariances_turn_each_birth_by_itself():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 6, generator=generator), torch.randn(9, 5, generator=generator)
    h, z = (torch.randn(40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = Covariances()
    seen.seen = {"inputs.up": h.T @ h, "outputs.up": z.T @ z, "tokens.up": torch.tensor(40.0, dtype=torch.float64)}
    turned = Factors(a, b, born=(2, 3)).turned(lambda *parts: seen.turn("up", *parts))
    for part in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(turned.b_OC[:, part] @ turned.a_CI[part], b[:, part] @ a[part], rtol=1e-4, atol=1e-5)
    energies = seen.energies_K
    assert len(energies) == 5
    assert energies[0] >= energies[1]
    assert energies[2] >= energies[3] >= energies[4]


def test_what_was_done_before_a_later_run_began_is_still_known():
    chain = *CHAIN, birth("news", "freeze")
    assert names(*chain, gone=["news", "market"], altered_births=2) == ""
    assert "up to tax was pruned, healed" in names(*chain, gone=["news", "market", "tax"], altered_births=2)


@pytest.mark.parametrize(("gone", "left"), [(["news"], 2), (["news", "tax"], 1), (["law"], 1)])
def test_it_is_known_after_a_retirement_too(gone, left):
    chain = adapter(*CHAIN, birth("news", "freeze"), altered_births=2)
    assert retire(chain, gone).left.record["altered_births"] == left


@pytest.mark.parametrize(
    ("record", "count"),
    [
        ({}, 0),
        ({"altered": ["pruned"]}, 3),
        ({"altered_births": 1}, 1),
        ({"retired": [{**birth("old", "freeze"), "began_with": 1}]}, 0),
        ({"retired": [{**birth("old", "tune"), "began_with": 1}]}, 3),
    ],
)
def test_a_run_that_goes_on_finds_births_altered(record, count):
    assert altered_births(adapter(*CHAIN, **record)) == count


def test_a_run_on_top_of_merged_adapters_stands_on_all_of_them():
    merged = birth("law"), birth("tax", "freeze"), birth("med"), {**birth("news", "freeze"), "runs_before": 3}
    assert names(*merged, gone=["tax"]) == "news was trained on top of tax"
    assert names(*merged, gone=["news"]) == ""
    left = retire(adapter(*merged), ["law"]).left
    assert left.record["births"][-1]["runs_before"] == 2
    assert retire(left, ["tax"]).why[0] == "news was trained on top of tax"


def test_a_count_of_births_beyond_their_number_is_all_of_them():
    assert "up to market" in names(*CHAIN, gone=["market"], altered_births=99)
