"""scripts/bench/cut and forgetting: the formulas of other tools' rules, and what the tables say of a few lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path[:0] = [str(BENCH / "cut"), str(BENCH / "forgetting")]

import cut_rules as rules  # noqa: E402 - they are scripts, not a package
import cut_tables as cuts  # noqa: E402
import forgetting_tables as forgetting  # noqa: E402

SPECTRA = {"a": rules.Spectrum([4.0, 2.0, 1.0, 1.0], 6, 4), "b": rules.Spectrum([1.0, 1.0, 1.0, 1.0], 30, 10)}


@pytest.mark.parametrize(
    ("rule", "parameter", "ranks"),
    [
        ("energy", 0.9, {"a": 2, "b": 4}),  # 16 + 4 of 22
        ("kohya_ratio", 2.5, {"a": 2, "b": 3}),  # never all of them
        ("kohya_cumulative", 0.7, {"a": 2, "b": 3}),
        ("gradience_layer", 0.95, {"a": 4, "b": 4}),  # three are rounded up to four
        ("gradience_median", 0.9, {"a": 4, "b": 4}),  # (2 + 4) / 2 rounded up
        ("gradience_p90", 0.5, {"a": 2, "b": 2}),
        ("effective", None, {"a": 4, "b": 4}),
        ("stable", None, {"a": 2, "b": 4}),  # 22 / 16
        ("hard_threshold", None, {"a": 1, "b": 1}),
        ("mp", None, {"a": 1, "b": 1}),
    ],
)
def test_ranks_that_the_rules_of_others_choose(rule, parameter, ranks):
    assert getattr(rules, rule)(SPECTRA, parameter) == ranks


def test_the_global_rule_spends_what_it_is_given_and_leaves_one_everywhere():
    assert rules.global_energy(SPECTRA, 70) == {"a": 3, "b": 1}  # 10 + 40, then the 4 and a 1 of the cheap layer
    assert rules.global_energy(SPECTRA, 50) == {"a": 1, "b": 1}


def test_the_energy_rule_is_what_peft_does():
    from peft.tuners.lora.conversion import _find_cutoff_index

    for share in (0.99, 0.9, 0.6, 0.3):
        for spectrum in SPECTRA.values():
            values = torch.tensor(spectrum.values, dtype=torch.float64)
            assert rules.energy_rank(spectrum, share) == _find_cutoff_index(values, share)


def cut_line(method, parameter, parameters, loss, adapter="e2e-r16"):
    common = {"adapter": adapter, "method": method, "parameter": parameter, "general": 3.0 + loss / 100, "cpu": 1.0}
    return common | {"parameters": parameters, "loss": loss}


CUT = [
    cut_line("base", None, 0, 2.0, "e2e-base"), cut_line("uncut", None, 1000, 1.0), cut_line("energy", 0.6, 250, 1.3),
    cut_line("activation", 0.6, 250, 1.2), cut_line("mp", None, 500, 1.25), cut_line("trained", None, 250, 1.1, "e2e-r4"),
    cut_line("activation 0.25", None, 250, 1.2), cut_line("activation 0.25 healed 10", 5e-4, 250, 1.05),
]  # fmt: skip


def test_the_table_puts_other_sizes_beside_our_curve():
    assert cuts.curve_at(cuts.of(CUT, "e2e-r16"), 500, "loss") == pytest.approx(1.1)  # halfway over the logarithm
    text = cuts.table(CUT)
    assert "| loraspectra `--policy mp` | 50.0 % | 1.2500 | +0.1500 | -0.0075 |" in text
    assert "activation, healed 10 steps at 0.0005 | 25.0 % | 1.0500" in text
    assert "trained at this size from the start (e2e-r4) | 25.0 % | 1.1000" in text
    assert cuts.picture(CUT) == ""


def run(method, rate, val, test, general, seed=0, budget=1):
    return {
        "task": "t", "method": method, "budget": budget, "rate": rate, "seed": seed, "loss": val, "test": test,
        "general_before": 3.0, "general": general, "parameters": 100 * budget,
    }  # fmt: skip


RUNS = [
    run("lora", 1e-3, 1.2, 1.2, 3.2), run("lora", 2e-3, 1.0, 1.0, 3.6), run("lora", 4e-3, 1.1, 1.1, 4.0),
    run("dynlora", 1e-3, 1.1, 1.1, 3.2), run("dynlora", 2e-3, 0.9, 0.9, 3.4),
    run("dynlora", 2e-3, 0.95, 0.91, 3.5, seed=1), run("dora", 1e-3, None, None, None),
]  # fmt: skip


def test_forgetting_is_told_at_the_tuned_rate_and_at_equal_loss():
    cells = forgetting.by_cell(RUNS)
    assert [r["rate"] for r in forgetting.tuned(cells["t", "lora", 1])] == [2e-3]
    assert forgetting.rise_at(cells["t", "lora", 1], 1.1) == pytest.approx(0.4), "on the side of lower rates"
    assert forgetting.rise_at(cells["t", "lora", 1], 0.5) is None, "never a guess beyond the grid"
    text = forgetting.table(RUNS)
    assert "| 1 | dynlora | 100 | 2.0e-03 | 0.905 (0.900 to 0.910) | 0.450 (0.400 to 0.500) | 2 |" in text
    assert "| 1 | 1.0000 | 0.600 |  |  | 0.328 |" in text
    real = {"task": "e2e", "method": "axolotl", "rank": 0, "rate_used": 2e-4, "parameters": 400, "test": 2.24}
    text = forgetting.table(RUNS, [real | {"general_before": 4.0, "general": 3.99}])
    assert "| e2e | axolotl | its own | 2.0e-04 | 400 | 2.2400 | -0.0100 |" in text


def test_the_tables_can_be_made_of_the_lines_that_are_there():
    for folder, tables in (("cut", cuts), ("forgetting", forgetting)):
        text = (BENCH / folder / f"{folder}.jsonl").read_text(encoding="utf-8")
        assert tables.table([json.loads(line) for line in text.splitlines()]).startswith("# ")
