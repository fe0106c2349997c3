"""Intervals and classification metrics, against what statistics and scikit-learn say; thresholds, as a person writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef

from dynlora_cli.cli.thresholds import read_thresholds
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.scores import paired_difference
from dynlora_cli.evaluation.thresholds import METRICS
from dynlora_cli.tasks.scores import RowSums, classification, confusion


def sums(loss_R, targets_R=None) -> RowSums:
    targets_R = np.ones(len(loss_R), dtype=np.int64) if targets_R is None else np.asarray(targets_R)
    return RowSums(np.asarray(loss_R, dtype=np.float64), targets_R, np.zeros_like(targets_R))


# -- the interval of a difference ------------------------------------------------------------------------------------


def test_every_token_weighs_the_same():
    both = sums([1.0, 9.0], [1, 3])
    assert both.loss == pytest.approx(10 / 4)
    assert paired_difference(both, sums([0.0, 3.0], [1, 3]))["loss"] == pytest.approx(7 / 4)


def test_the_interval_is_as_wide_as_theory_says():
    """Rows of one token: the mean's standard error is known."""
    chance = np.random.default_rng(1)
    easy_or_hard = 10 * chance.standard_normal(400)  # common to both models, so it must not matter
    noise = chance.standard_normal(400)
    found = paired_difference(sums(easy_or_hard + 0.5 + noise), sums(easy_or_hard))
    error = noise.std() / np.sqrt(400)
    assert found["loss"] == pytest.approx(0.5 + noise.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    chance = np.random.default_rng(2)
    held = 0
    for number in range(100):
        targets_R = chance.integers(1, 30, 60)
        difference_R = targets_R * 0.2 + np.sqrt(targets_R) * chance.standard_normal(60)
        found = paired_difference(sums(difference_R, targets_R), sums(np.zeros(60), targets_R), seed=number)
        held += found["low"] <= 0.2 <= found["high"]
    assert held >= 88  # 95 expected


def test_no_difference_no_width():
    rows = sums(np.random.default_rng(3).random(50))
    assert paired_difference(rows, rows) == {"loss": 0.0, "low": 0.0, "high": 0.0}


def test_the_same_seed_gives_the_same_interval_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch):
    chance = np.random.default_rng(4)
    first, second = sums(chance.random(20)), sums(chance.random(20))
    whole = paired_difference(first, second)
    monkeypatch.setattr("dynlora_cli.evaluation.scores._AT_ONCE", 900)
    assert paired_difference(first, second) == whole


def test_one_row_has_an_interval_of_no_width():
    found = paired_difference(sums([1.0]), sums([0.25]))
    assert found == {"loss": 0.75, "low": 0.75, "high": 0.75}


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(sums([1.0, 2.0], [3, 4]), sums([1.0, 2.0], [4, 3]))


# -- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
def test_as_scikit_learn(classes: int, skill: float):
    chance = np.random.default_rng(classes)
    truth = chance.integers(0, classes, 80)
    predicted = np.where(chance.random(80) < skill, truth, chance.integers(0, classes, 80))
    counts = confusion(truth, predicted, classes)
    found = classification(counts)
    assert counts.tolist() == found["confusion"] == confusion_matrix(truth, predicted).tolist()
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(truth, predicted))


def test_always_the_same_class_and_a_class_that_never_occurs():
    truth, predicted = np.array([0, 0, 1, 1, 1]), np.array([1, 1, 1, 1, 1])
    found = classification(confusion(truth, predicted, 4))
    assert found["matthews"] == 0.0
    assert found["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))


# -- thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail_below": ["accuracy"]}, "METRIC=X"),
        ({"fail_below": ["acuracy=0.8"]}, "did you mean 'accuracy'"),
        ({"fail_below": ["loss=0.8"]}, "unknown metric 'loss'"),
        ({"fail_below": ["accuracy=high"]}, "no number"),
        ({"fail_below": ["accuracy=80"]}, "goes up to 1"),
        ({"fail_below": ["bleu=nan"]}, "goes up to 100"),
        ({"fail_above": ["nan"]}, "no loss"),
        ({"fail_above": ["high"]}, "no number"),
        ({"fail_above": ["forgetting=much"]}, "no number"),
        ({"fail_above": ["forgetting=inf"]}, "no limit"),
        ({"fail_above": ["accuracy=0.5"]}, "not 'accuracy'"),
        ({"max_regression": "1%"}, "--baseline"),
    ],
)
def test_gates_that_mean_nothing(options: dict, message: str):
    with pytest.raises(UsageError) as caught:
        read_thresholds(**options)
    assert message in f"{caught.value.message} {caught.value.hint}"


def report(path: Path, **losses: float) -> Path:
    adapters = [{"name": name, "loss": loss} for name, loss in losses.items()]
    path.write_text(json.dumps({"rows": 3, "tokens": 9, "data": {"sha256": "x"}, "adapters": adapters}))
    return path


@pytest.mark.parametrize("text", ["lots", "-1%", "1", "5", "nan", "%", ""])
def test_a_regression_that_is_no_share(text: str, tmp_path: Path):
    if not text:
        assert read_thresholds(baseline=report(tmp_path / "a.json", a=1.0), max_regression=None).max_regression == 0.01
        return
    with pytest.raises(UsageError, match="no share"):
        read_thresholds(baseline=report(tmp_path / "a.json", a=1.0), max_regression=text)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"adapters": []}', '{"adapters": [{"name": "a"}]}'])
def test_a_baseline_that_is_none(content: str | None, tmp_path: Path):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="--baseline"):
        read_thresholds(baseline=path)


def test_a_baseline_of_other_rows_or_adapters(tmp_path: Path):
    thresholds = read_thresholds(baseline=report(tmp_path / "a.json", a=1.0, b=2.0))
    thresholds.refuse_other_rows(3, 9, "x", ["b", "a"])
    with pytest.raises(UsageError, match="other rows"):
        thresholds.refuse_other_rows(3, 9, "y", ["a"])
    with pytest.raises(UsageError, match="no adapter named c"):
        thresholds.refuse_other_rows(3, 9, "x", ["c"])
    only = read_thresholds(baseline=report(tmp_path / "a.json", a=1.0))
    only.refuse_other_rows(3, 9, "x", ["renamed"])


def test_what_fails(tmp_path: Path):
    baseline = report(tmp_path / "a.json", a=2.0, b=2.0)
    thresholds = read_thresholds(fail_above=["2.05"], fail_below=["f1=0.5"], baseline=baseline, max_regression="2%")
    good, bad = {"name": "a", "loss": 2.03, "f1": 0.5, "also": {}}, {"name": "b", "loss": 2.1, "f1": 0.4, "also": {}}
    assert thresholds.failures([good]) == []
    above, below, worse = thresholds.failures([good, bad])
    assert above == "b: held-out loss 2.1000 is above --fail-above 2.05"
    assert below == "b: f1 0.4000 is below --fail-below 0.5"
    assert worse.startswith("b: held-out loss 2.1000 is 5.0 % above the baseline's 2.0000")


def test_metrics_are_lower_case_words():
    assert all(metric.islower() and metric.replace("@", "_").isidentifier() for metric in METRICS)
