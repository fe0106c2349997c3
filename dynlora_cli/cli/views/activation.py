"""What a person sees of a calibrated library: how good the confidence is, what was activated, and what that gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.evaluation import shown_sample
from dynlora_cli.cli.views.progress import middle_cut, printable
from dynlora_cli.config.mix import mix_text
from dynlora_cli.library.learn import Calibration
from dynlora_cli.library.library import REPORT
from dynlora_cli.library.report import tiles
from dynlora_cli.text import counted, number, percent

LONGEST_HEAD = 14  # characters of a column's head
LONGEST_TEXT = 100  # characters of a request or a key


def show_calibration(console: Console, root: Path, calibration: Calibration, notes: Sequence[str]) -> None:
    """The numbers of a calibration, and where its pictures are."""
    console.line()
    table = Table.grid(padding=(0, 3, 0, 0))
    for label, value, note in tiles(calibration):
        table.add_row(Text(label, style="label"), Text(value, style="head"), printable(note))
    console.show(table)
    for note in notes:
        console.note(note)
    console.line(f"pictures: {root / REPORT}")


def show_library_evaluation(console: Console, report: Mapping[str, Any], *, explain: bool) -> None:
    """Losses by set of rows, what was active, and with `explain` a line for every decision."""
    if explain:
        console.line()
        for decision in report["decisions"]:
            _explain(console, decision)
    console.line()
    console.line(Text("loss in nats per target", style="head"))
    console.show(_losses(report))
    _active(console, report)
    for sample in report["samples"]:
        console.line()
        speaker = report["router"] if report["unit"] == "token" and sample["chosen"] else " + ".join(sample["chosen"])
        named = {"base": sample["answers"]["base"]} | ({speaker: sample["answers"]["library"]} if speaker else {})
        console.show(shown_sample(sample | {"answers": named}))
    if report["samples"]:
        console.line()
    for note in report["notes"]:
        console.note(note)


def _explain(console: Console, decision: Mapping[str, Any]) -> None:
    """The request, what is active on it and why, and the key that it was found by."""
    chosen = _speaking(decision)
    request = middle_cut(printable(" ".join(decision["request"].split())), LONGEST_TEXT)
    style = "accent" if decision["chosen"] else "label"
    console.line(Text.assemble((printable(chosen), style), f"  “{request}”  ", printable(_why(decision))))


def _speaking(decision: Mapping[str, Any]) -> str:
    """What speaks on a request: `base`, `law`, `0.7*law+0.3*news`, or how much of each by token."""
    if decision["shares"] is None:
        return mix_text(decision["weights"])
    return ", ".join(f"{name} {percent(share)}" for name, share in decision["shares"].items()) or "base"


def _why(decision: Mapping[str, Any]) -> str:
    key = decision["key"]
    if key is None:
        return str(decision["reason"])
    text = middle_cut(" ".join(key["text"].split()), LONGEST_TEXT)
    return f"{decision['reason']}; nearest key “{text}” ({key['source']})"


def _losses(report: Mapping[str, Any]) -> Table:
    """A line for each set of rows, and one for all."""
    newest = report["newest"]
    heads = ["rows", "", "base", *([f"always {newest}"[:LONGEST_HEAD]] if newest else []), _who(report), "best choice"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="label")
    for head in (*heads, "activated", "false"):
        side: Literal["left", "right"] = "left" if head == "rows" else "right"
        # Names are cut before numbers are.
        table.add_column(printable(head), justify=side, no_wrap=True, max_width=None if side == "right" else 20)
    every = {"source": "all", **report["all"], "false_activations": report["false_activations"]}
    sets = [*report["sets"], every]
    for one in sets if len(report["sets"]) > 1 else sets[:1]:
        table.add_row(
            printable(one["source"]),
            str(one["rows"]),
            number(one["losses"]["base"]),
            *([number(one["losses"][newest])] if newest else []),
            Text(number(one["routed"]), style="head"),
            number(one["oracle"]),
            percent(1 - one["active"].get("base", 0.0)),
            percent(one["false_activations"]),
        )
    return table


def _who(report: Mapping[str, Any]) -> str:
    """What decides: the library itself, or a router that was named."""
    return "library" if report["router"] == "calibrated" else str(report["router"])


def _active(console: Console, report: Mapping[str, Any]) -> None:
    """Which update was active how often, and what the decisions are worth."""
    console.line()
    shares = (f"{name} {percent(share)}" for name, share in report["all"]["active"].items())
    weighed = "average weight" if report["unit"] == "token" else "active"
    console.sentence(f"{weighed} on {counted(report['all']['rows'], 'row')}: {printable(', '.join(shares))}")
    right = [(one["origin"], one["right"]) for one in report["sets"] if one["origin"] not in (None, "unrelated")]
    if right:
        shares = (f"{name} {percent(share)}" for name, share in right)
        console.sentence(f"of its own rows each adapter had: {printable(', '.join(shares))}")
    best = min(
        ((loss, name) for name, loss in report["all"]["losses"].items() if name not in ("base", "library")),
    )
    console.sentence(f"the best single one for all of these rows is {printable(best[1])}: {number(best[0])}")
    difference = report["all"]["difference"]
    interval = f"95 % interval {difference['low']:+.4f} to {difference['high']:+.4f}"
    console.sentence(f"{_who(report)} against base: {difference['loss']:+.4f} nats per target ({interval})")
    if report["false_activations"] is not None:
        share = percent(report["false_activations"])
        wanted = "" if report["rate"] is None else f"; {percent(report['rate'])} was wanted"
        console.sentence(f"activated on {share} of the unrelated rows{wanted}")
