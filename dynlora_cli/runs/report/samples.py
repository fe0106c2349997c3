"""The part of `report.html` that shows how answers change while a model trains (`eval.samples`)."""

from __future__ import annotations

from dynlora_cli.runs.log import Event, RunRecord
from dynlora_cli.runs.report.svg import text
from dynlora_cli.text import count

MOST = 8  # evaluations shown: the first, the last, and some between


def samples_part(record: RunRecord) -> str:
    """One table for each prompt: its answer at each evaluation."""
    looks = [event for event in record.samples if event.get("samples")]
    if not looks:
        return ""
    tables = "".join(_table(at, record) for at in range(len(looks[-1]["samples"])))
    lead = "The most likely answers to the same held-out prompts as training went on, at most 64 tokens of each."
    return f'<h2>Answers while it trained</h2><p class="muted">{lead}</p>{tables}'


def _table(at: int, record: RunRecord) -> str:
    """The answers to prompt number `at`."""
    looks = [(event["step"], event["samples"][at]) for event in record.samples if len(event["samples"] or ()) > at]
    last = looks[-1][1]
    rows = _row("expected", last["expected"], "muted")
    for step, one in _few(looks):
        rows += _row(f"step {count(step)}", one["answer"], "good" if one["right"] else "")
    return (
        f'<div class="card answers"><p class="prompt">{text(last["prompt"])}</p>'
        f'<table class="list"><tbody>{rows}</tbody></table></div>'
    )


def _row(label: str, value: str, style: str) -> str:
    shown = text(value) if value else '<span class="muted">(nothing)</span>'
    return f'<tr><td class="muted">{label}</td><td class="wrap {style}">{shown}</td></tr>'


def _few(looks: list[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """At most `MOST` of them, evenly spread; the first and the last are among them."""
    if len(looks) <= MOST:
        return looks
    return [looks[round(place * (len(looks) - 1) / (MOST - 1))] for place in range(MOST)]
