"""Parts of `report.html`: how answers change while a model trains (`eval.samples`), and the pictures of a prior."""

from __future__ import annotations

import re

from dynlora_cli.runs.folder import PRIOR
from dynlora_cli.runs.log import Event, RunRecord
from dynlora_cli.runs.report.svg import text
from dynlora_cli.text import count, counted, number

_FILE = re.compile(r"samples/[\w-]+\.png", re.ASCII)
WIDTH = 160  # of a picture in the report
MOST = 8  # evaluations shown: the first, the last, and some between


def samples_part(record: RunRecord) -> str:
    """One table for each prompt: its answer at each evaluation."""
    looks = [event for event in record.samples if event.get("samples")]
    if not looks:
        return ""
    if any(_picture(one) for event in looks for one in event["samples"]):
        return _pictures(record, len(looks[-1]["samples"]))
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


def _pictures(record: RunRecord, count_of_rows: int) -> str:
    """One row of pictures for each caption; the files stand beside the report."""
    cards = ""
    for at in range(count_of_rows):
        looks = [(event["step"], event["samples"][at]) for event in record.samples if len(event["samples"] or ()) > at]
        shown = [(step, file) for step, one in _few(looks) if (file := _picture(one))]
        figures = "".join(
            f'<figure><img src="{text(file)}" alt="step {count(step)}" width="{WIDTH}">'
            f'<figcaption class="muted">step {count(step)}</figcaption></figure>'
            for step, file in shown
        )
        caption = text(looks[-1][1]["prompt"])
        cards += f'<div class="card answers"><p class="prompt">{caption}</p><div class="pictures">{figures}</div></div>'
    lead = "Drawn from the same captions and the same noise as training went on."
    return f'<h2>Pictures while it trained</h2><p class="muted">{lead}</p>{cards}'


def prior_text(record: RunRecord) -> str:
    """What was learned beside the rows, in a sentence; "" where nothing was."""
    found = (record.info.get("data") or {}).get("prior")
    if not isinstance(found, dict):
        return ""
    pictures, caption = counted(found.get("pictures"), "picture"), found.get("caption")
    return (
        f'Prior preservation: {pictures} of "{caption}", drawn by the pipeline before training, were learned beside '
        f"the rows with weight {number(found.get('weight'))}."
    )


def prior_part(record: RunRecord) -> str:
    """The first pictures that the pipeline drew of a class, to be learned beside the rows."""
    if not (said := prior_text(record)):
        return ""
    files = sorted(path.name for path in (record.folder / PRIOR).glob("*.png"))[:MOST]
    figures = "".join(
        f'<figure><img src="{PRIOR}/{text(name)}" alt="" width="{WIDTH}" loading="lazy"></figure>' for name in files
    )
    lead = f'<p class="muted">{text(said)} All are in {PRIOR}/.</p>'
    return f'<h2>Prior</h2>{lead}<div class="card answers"><div class="pictures">{figures}</div></div>'


def _picture(sample: Event) -> str | None:
    """The file of a picture in the folder of the run; None where the answer is no such picture."""
    name = sample.get("picture")
    return name if isinstance(name, str) and _FILE.fullmatch(name) else None


def _row(label: str, value: str, style: str) -> str:
    shown = text(value) if value else '<span class="muted">(nothing)</span>'
    return f'<tr><td class="muted">{label}</td><td class="wrap {style}">{shown}</td></tr>'


def _few(looks: list[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """At most `MOST` of them, evenly spread; the first and the last are among them."""
    if len(looks) <= MOST:
        return looks
    return [looks[round(place * (len(looks) - 1) / (MOST - 1))] for place in range(MOST)]
