"""RELIABILITY.md, from the lines of the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .attempts import IMPOSSIBLE, NOTHING, SURVIVED, Line, newest, read
from .kinds import KINDS

HEAD = """# What dynlora survives

Trials by the thousand: dynlora is killed, given damaged input, a full disk, a wrong clock, a second writer. Whatever
befalls it, what was whole before must be whole or replaced afterwards, and what it says must be words with the right exit
code. Repeat it, or try other seeds:

```bash
python scripts/reliability --seed 3
```

A trial *survived* if every promise was kept, *proves nothing* if the fault came too late to matter or changed nothing, and
is *not possible* where the machine lacks what it needs. The minutes are of a busy machine. What is promised, and which tests show it, is in
[docs/promises.md](../../docs/promises.md). This page is generated from
[reliability/trials.jsonl](reliability/trials.jsonl) by `python scripts/reliability --page`.
"""

FOUND = """## What such trials have found

All mended, each with a test of its own:

- A run with `--overwrite` that was killed while it wrote its very first file: the old run was given up. The worst of them.
- A new run killed there: its folder could be neither used nor replaced.
- A kill, or a loss of power, in the middle of writing who holds a folder: the folder was refused to everybody.
- A run whose record had a letter of a layer's name changed: `--resume` ended with a traceback.
- A disk without room for a small merged model: "takes 0.00 GB, and 0.00 GB are left".
"""


def write(record: Path, page: Path) -> None:
    """Write the page of a record."""
    page.write_text(text(read(record)), encoding="utf-8")


def text(lines: Sequence[Line]) -> str:
    """The page."""
    now = newest(lines)
    parts = [
        HEAD,
        "## Tried, survived, lost\n",
        _table(now),
        *_lost(now),
        *_mended(lines, now),
        "## How they were survived\n",
    ]
    parts += [_survived(name, [line for line in now if line["kind"] == name]) for name in _kinds(now)]
    return "\n".join(parts)


def _kinds(lines: Iterable[Line]) -> list[str]:
    tried = {line["kind"] for line in lines}
    return [name for name in KINDS if name in tried]


def _table(lines: Sequence[Line]) -> str:
    rows = [
        "| kind | seed | tried | survived | proves nothing | not possible | lost | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in _kinds(lines):
        for seed in sorted({line["seed"] for line in lines if line["kind"] == name}):
            of = [line for line in lines if (line["kind"], line["seed"]) == (name, seed)]
            counts = [_counted(of, which) for which in (SURVIVED, NOTHING, IMPOSSIBLE)]
            lost, tried = sum(len(line["lost"]) for line in of), sum(line["tried"] for line in of)
            minutes = sum(line["seconds"] for line in of) / 60
            cells = [name, seed, f"{tried:,}", *(f"{count:,}" for count in counts), lost or "nothing", f"{minutes:.1f}"]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def _counted(lines: Iterable[Line], which: str) -> int:
    return sum(sum(line[which].values()) for line in lines)


def _told(lines: Iterable[Line]) -> list[str]:
    return [
        f"- {line['kind']}, trial {lost['trial']} of seed {line['seed']}: {_short(lost['what'])}\n"
        f"  `python scripts/reliability --seed {line['seed']} --once {line['kind']}:{lost['trial']}`"
        for line in lines
        for lost in line["lost"]
    ]


def _short(what: str) -> str:
    words = " ".join(what.replace("`", "'").replace("<", "&lt;").split())
    return words if len(words) < 300 else f"{words[:300]} ..."


def _lost(now: Sequence[Line]) -> list[str]:
    told = _told(now)
    return ["## Lost\n", "\n".join(told) + "\n"] if told else ["Nothing was lost.\n"]


def _mended(lines: Sequence[Line], now: Sequence[Line]) -> list[str]:
    told = _told(line for line in lines if not any(line is kept for kept in now))
    if not told:
        return []
    before = "Lost by an earlier state of the code; the same batch was tried again since, and the table has what came of it.\n"
    return ["## Found and mended\n", before, "\n".join(told) + "\n"]


def _survived(name: str, lines: Sequence[Line]) -> str:
    rows = [f"**{name}**: {KINDS[name].what}.\n"]
    for which, word in ((SURVIVED, ""), (NOTHING, "proves nothing: "), (IMPOSSIBLE, "not possible: ")):
        ways: Counter[str] = Counter()
        for line in lines:
            ways.update(line[which])
        rows += [f"- {word}{_short(way)}: {count:,}" for way, count in ways.most_common()]
    return "\n".join(rows) + "\n"
