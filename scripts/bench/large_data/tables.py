"""large_data.md and large_data.svg from large_data.jsonl: python scripts/bench/large_data/tables.py

Of several lines of one case and start the one with the fewest seconds counts: others work on the machine as well.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from quality_tables import draw  # noqa: E402

Line = dict[str, Any]
SMALL, LARGE = "small", "5000"
KINDS = ("rss", "pss", "anon")
DRAWN = "pss"
HEAD = """# Data larger than memory: `dataset.cache`

Made by `large_data/tables.py` from large_data.jsonl; do not edit. Each case is `dynlora train` for 5 steps, first without
anything kept (first), then once more (second). Case `small` is a file of 10 MB; the others are named by their MB, `one` and
`two` by their processes (`dataset.workers`), `bpe` by builtin:tiny, whose tokenizer is a BPE; all others have a small Llama
whose tokenizer parts texts at spaces. `To step 1`: seconds from the start of the program, imports included; `CPU`:
processor seconds until then, of all processes. Memory is the highest at any moment, MB of all processes together:

- `rss`: resident pages of each. Files that are mapped, and pages that processes share, count for each.
- `pss`: the same, pages that are shared divided by who shares them.
- `anon`: what no file backs, so what the system cannot take back. `rss` and `pss` also count pages of the kept columns that
  the system happens to keep in memory, and drops when anybody needs the room.

"""


def read(path: Path) -> dict[tuple[str, str], Line]:
    """The fastest line of each case and start."""
    found: dict[tuple[str, str], Line] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        name = line["case"], line["start"]
        if name not in found or line["seconds_to_first_step"] < found[name]["seconds_to_first_step"]:
            found[name] = line
    return found


def row(line: Line, small: Line) -> list[object]:
    """A line of the table; memory also as what it is above the small run's, of the same model and start."""
    above = [f"{line['peak'][kind]:.0f}" for kind in KINDS]
    if line["model"] == small["model"] and line is not small:
        above = [f"{line['peak'][kind]:.0f} ({line['peak'][kind] - small['peak'][kind]:+.0f})" for kind in KINDS]
    spent = [f"{line[f'{kind}seconds_to_first_step']:.1f}" for kind in ("", "processor_")]
    return [
        line["case"],
        line["start"],
        f"{line['rows']:,}",
        f"{line['kept_mb']:,}",
        *spent,
        *above,
        f"{line['load']:.1f}",
    ]


def curve(line: Line) -> list[tuple[float, float]]:
    """The highest memory in every eighth of a doubling of the time."""
    found: dict[int, tuple[float, float]] = {}
    for point in line["curve"]:
        if point["t"] >= 0.5:
            at = round(8 * math.log2(point["t"]))
            found[at] = max(found.get(at, (0.0, 0.0)), (point["t"], point[DRAWN]), key=lambda each: each[1])
    return list(found.values())


def main() -> None:
    """Write both files."""
    lines = read(HERE / "large_data.jsonl")
    head = [
        "case",
        "start",
        "rows",
        "MB kept",
        "to step 1",
        "CPU",
        *(f"{kind} (above small)" for kind in KINDS),
        "load",
    ]
    cells = [head, ["---"] * len(head), *(row(line, lines[SMALL, line["start"]]) for line in lines.values())]
    table = "\n".join(f"| {' | '.join(map(str, each))} |" for each in cells)
    foot = "\n\n`load`: processes that ran or waited on the two cores at the end of the case: others worked there as well.\n"
    (HERE / "large_data.md").write_text(HEAD + table + foot, encoding="utf-8")
    names = {SMALL: "10 MB", LARGE: "5 GB"}
    drawn = {
        f"{name}, {start}": curve(lines[case, start]) for case, name in names.items() for start in ("first", "second")
    }
    picture = draw(drawn, "seconds since the start", f"MB of all processes ({DRAWN})", " s")
    (HERE / "large_data.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
