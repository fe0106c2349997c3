"""LIB/report.html: how good the confidence is, and what activation by it gives. No script, no package to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dynlora_cli.library.learn import Calibration
from dynlora_cli.runs.report import svg
from dynlora_cli.runs.report.page import ASSETS
from dynlora_cli.runs.report.svg import Series, text
from dynlora_cli.text import count, number, percent


def page(name: str, calibration: Calibration, notes: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        name: of the library.
        calibration: with its `quality`.
        notes: sentences for the person.
    """
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    sections = (_header(name, calibration), _pictures(calibration.quality), _updates(calibration), _notes(notes))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(name)} · dynlora library</title><style>\n{style}</style></head>\n<body>\n"
        f"{chr(10).join(section for section in sections if section)}\n</body>\n</html>\n"
    )


def tiles(calibration: Calibration) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that a reader wants first."""
    quality, limit = calibration.quality, calibration.threshold
    at = quality["at_threshold"]
    kind = "isotonic" if calibration.judge.confidence.curve else "Platt"
    promise = f"{percent(limit.rate)} wanted" if limit.promised else f"{percent(limit.rate)} cannot be promised"
    return [
        ("calibration error", number(quality["calibration_error"], 3), f"{count(quality['pairs'])} pairs, {kind}"),
        (
            "Brier score",
            number(quality["brier"], 3),
            f"{number(quality['brier_of_constant'], 3)} if always the same",
        ),
        ("share of the best gain", percent(at["utility"]), "an oracle has 100 %"),
        ("false activations", percent(at["false"]), f"{promise}; {count(limit.requests)} requests"),
        ("active on own requests", percent(at["active"]), f"the right update in {percent(at['right'])}"),
    ]


def _header(name: str, calibration: Calibration) -> str:
    shown = "".join(
        f"<div><dt>{text(label)}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>"
        for label, value, note in tiles(calibration)
    )
    lead = f"{len(calibration.entries)} updates, at most {calibration.at_most} active on a request"
    return (
        f'<header><h1>{text(name)}</h1><p class="lead">{text(lead)}</p><dl class="tiles">{shown}</dl></header>'
        '<p class="muted">Confidence is the probability that an update lowers the loss on a request, learned from '
        "requests with known outcome. Every number here is of requests that the model in question had not seen.</p>"
    )


def _pictures(quality: Mapping[str, Any]) -> str:
    chart = partial(svg.line_chart, last_step=100, y_text=percent, from_zero=True)
    said = [(100 * confidence, helped) for _, confidence, helped in quality["reliability"]]
    curve = [(100 * at["false"], at["utility"]) for at in quality["curve"] if at["false"] is not None]
    here = quality["at_threshold"]
    drawn = chart(
        "Reliability: what was said, and what was true",
        [Series("measured", said, "dots"), Series("perfect", [(0, 0.0), (100, 1.0)], "dash")],
        unit="share in which the update helped",
        x_unit="percent of confidence",
    )
    if curve:
        point = [] if here["false"] is None else [(100 * here["false"], here["utility"])]
        drawn += chart(
            "Gain against false activations",
            [Series("other thresholds", curve, "line"), Series("this threshold", point, "dots")],
            unit="share of the best possible gain",
            x_unit="percent of unrelated requests",
        )
    return f'<h2>How good it is</h2><div class="charts">{drawn}</div>'


def _updates(calibration: Calibration) -> str:
    rows = "".join(
        f'<tr><td>{text(name)}</td><td class="n">{count(calibration.quality["requests"].get(name, 0))}</td></tr>'
        for name in calibration.entries
    )
    rows += f'<tr><td>unrelated</td><td class="n">{count(calibration.quality["unrelated"])}</td></tr>'
    head = '<th scope="col">update</th><th scope="col" class="n">requests</th>'
    return (
        '<h2>Learned from</h2><div class="tablewrap"><table class="list">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{text(note)}</li>' for note in notes)}</ul>" if notes else ""
