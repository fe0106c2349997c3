"""Thresholds of an evaluation, for CI: checked before anything heavy loads, judged at the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.text import number, percent

# What `--fail-below` may name, in the order in which a table shows it, with the highest value it can take.
METRICS = {
    "accuracy": 1, "f1": 1, "matthews": 1, "token_accuracy": 1, "exact_match": 1, "bleu": 100, "chrf": 100,
    "rouge_l": 1, "margin": math.inf, "reward_chosen": math.inf, "recall@1": 1, "recall@5": 1, "recall@10": 1,
    "mrr": 1, "ndcg@10": 1, "spearman": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """A former report.

    Attributes:
        path: it was read from.
        losses: held-out loss by the adapter's name.
        tokens, rows: that it was measured on.
        data_sha256: of the rows.
    """

    path: Path
    losses: dict[str, float]
    rows: int
    tokens: int
    data_sha256: str

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """A report of `dynlora eval --json`.

        Raises:
            UsageError: it is none.
        """
        made = "make one with `dynlora eval --json > REPORT.json`"
        try:
            report = read_object(path)
        except UsageError as error:
            raise UsageError(f"--baseline {error.message}", made) from None
        try:
            losses = {str(adapter["name"]): float(adapter["loss"]) for adapter in report["adapters"]}
            baseline = cls(path, losses, report["rows"], report["tokens"], report["data"]["sha256"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UsageError(f"--baseline {path} is no report of dynlora eval", made) from None
        if not losses or not all(loss > 0 for loss in losses.values()):
            raise UsageError(f"--baseline {path} holds no adapter's loss", made)
        return baseline

    def loss_of(self, name: str, names: Sequence[str]) -> float:
        """The former loss of an adapter: of the one with its name, or of the only one where there is one then and now.

        Raises:
            UsageError: it holds none.
        """
        if name in self.losses:
            return self.losses[name]
        if len(self.losses) == len(names) == 1:
            return next(iter(self.losses.values()))
        raise UsageError(
            f"--baseline {self.path} holds no adapter named {name}",
            f"it holds {', '.join(self.losses)}; make a new baseline with --json",
        )


@dataclass(frozen=True)
class Thresholds:
    """The thresholds that every adapter must reach.

    Attributes:
        fail_above: highest held-out loss allowed, nats per target.
        forgetting: most that may be forgotten, nats per target, by name of the set; "" stands for every set.
        fail_below: lowest value allowed, by metric.
        baseline: losses to compare with.
        max_regression: how much higher than there a loss may be, as a share of it.
    """

    fail_above: float | None = None
    forgetting: dict[str, float] = field(default_factory=dict)
    fail_below: dict[str, float] = field(default_factory=dict)
    baseline: Baseline | None = None
    max_regression: float = 0.0

    def refuse_unmeasured(self, measured: Collection[str], why: str) -> None:
        """Refuse a threshold for a number that will not be measured.

        Args:
            measured: metrics that will be measured, `loss` among them.
            why: for the person, such as what the rows are.

        Raises:
            UsageError: names the metric and what there is.
        """
        if "loss" not in measured and (self.fail_above is not None or self.baseline is not None):
            raise UsageError(f"--fail-above and --baseline: no loss is measured: {why}", "name rows with --data FILE")
        for metric in self.fail_below:
            if metric not in measured:
                there = ", ".join(name for name in METRICS if name in measured) or "none"
                raise UsageError(f"--fail-below {metric}: not measured here: {why}", f"measured here: {there}")

    def refuse_unforgotten(
        self, measured: Mapping[str, Collection[str]], missing: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Refuse a threshold for a set that will not be measured.

        Args:
            measured: by name of the adapter: names of its sets.
            missing: the same: sets that it had, and why they are not measured.

        Raises:
            UsageError: names the set and what there is.
        """
        for limit in self.forgetting:
            for adapter, sets in measured.items():
                if not sets or (limit and limit not in sets):
                    known = f"the sets {', '.join(sets)}" if sets else "no rows of other kinds"
                    gone = "".join(f"; {name} is left out: {why}" for name, why in missing[adapter].items())
                    raise UsageError(
                        f"--fail-above {_gate(limit)}: not measured for {adapter}, which has {known}{gone}",
                        "name rows with --also NAME=FILE, or train with eval.also",
                    )

    def refuse_other_rows(self, rows: int, tokens: int, data_sha256: str, names: Sequence[str]) -> None:
        """Refuse a baseline that was measured on something else.

        Raises:
            UsageError: other rows, or it lacks one of the adapters.
        """
        if self.baseline is None:
            return
        then = self.baseline
        if (then.rows, then.tokens, then.data_sha256) != (rows, tokens, data_sha256):
            raise UsageError(
                f"--baseline {then.path} was measured on other rows ({then.rows} rows, {then.tokens} tokens there; "
                f"{rows} rows, {tokens} tokens here)",
                "losses on different rows say nothing about each other; make a new baseline with --json",
            )
        for name in names:
            then.loss_of(name, names)

    def failures(self, adapters: Sequence[Mapping[str, Any]]) -> list[str]:
        """One sentence for each number that misses its threshold.

        Args:
            adapters: of the report, each with name, loss and metrics.
        """
        failed = []
        names = [adapter["name"] for adapter in adapters]
        for adapter in adapters:
            name, loss = adapter["name"], adapter["loss"]
            if self.fail_above is not None and not loss <= self.fail_above:
                failed.append(f"{name}: held-out loss {number(loss)} is above --fail-above {self.fail_above:g}")
            failed += self._forgotten(adapter)
            for metric, least in self.fail_below.items():
                if not adapter[metric] >= least:
                    failed.append(f"{name}: {metric} {number(adapter[metric])} is below --fail-below {least:g}")
            if self.baseline is not None:
                then = self.baseline.loss_of(name, names)
                if not loss <= then * (1 + self.max_regression):
                    failed.append(
                        f"{name}: held-out loss {number(loss)} is {percent(loss / then - 1)} above the baseline's "
                        f"{number(then)}; --max-regression allows {percent(self.max_regression)}"
                    )
        return failed

    def _forgotten(self, adapter: Mapping[str, Any]) -> list[str]:
        """One sentence for each set of which an adapter has forgotten too much."""
        who = adapter["name"]
        return [
            f"{who}: forgetting on {name} is {one['forgetting']:.4f}, above --fail-above {_gate(gate)}={most:g}"
            for gate, most in self.forgetting.items()
            for name, one in adapter["also"].items()
            if gate in ("", name) and not one["forgetting"] <= most
        ]


def _gate(name: str) -> str:
    """How the threshold of a set is written."""
    return f"forgetting:{name}" if name else "forgetting"
