"""Ask for known advisories about the pins of constraints.txt; `scripts/advisories` runs it.

With the pins an old version of requests is asked about, whose advisory everybody knows. If it is not found, the answer
is worth nothing, whatever it says of the pins. Standard library alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
CANARY, CANARY_ID = "requests==2.19.0", "CVE-2018-18074"  # it sent passwords on to other hosts
CLEAN, FOUND, NOT_ASKED = 0, 1, 3
Report = dict[str, Any]
Ask = Callable[[Sequence[str]], Report]


class CannotAsk(Exception):  # noqa: N818 - nobody's fault
    """The service of advisories gave no answer; the text says why."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/advisories")
    parser.add_argument("--tool", default="pip-audit", help="the program pip-audit")
    parser.add_argument("--osv-url", help="ask this address, which must speak as https://api.osv.dev/v1/query does")
    asked = parser.parse_args()
    where = ["--osv-url", asked.osv_url] if asked.osv_url else []
    return check(PINS.read_text(encoding="utf-8"), lambda pins: ask(pins, [asked.tool, "-s", "osv", *where]))


def check(constraints: str, question: Ask) -> int:
    """Ask about all pins, and print what is known.

    Args:
        constraints: the text of the file.
        question: gives pip-audit's report of some pins.

    Returns:
        The exit code.
    """
    known, count = [], 0
    try:
        for pins in rounds(constraints):
            report = question([*pins, CANARY])
            known += found(report, pins)
            count += len(pins)
    except CannotAsk as why:
        print(f"error: nothing is known about the pins: {why}", file=sys.stderr)
        print(" hint: try again where there is a network; this is no all-clear", file=sys.stderr)
        return NOT_ASKED
    for line in known:
        print(line)
    print(f"{count} pins asked about, {len(known) or 'no'} known {'advisory' if len(known) == 1 else 'advisories'}")
    return FOUND if known else CLEAN


def rounds(constraints: str) -> Iterator[list[str]]:
    """The pins, whatever Python they are for; a package that is pinned twice has its second pin in a second round."""
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in constraints.splitlines()]
    left = [line for line in dict.fromkeys(lines) if line]
    while left:
        first = list({pin.partition("==")[0].lower(): pin for pin in reversed(left)}.values())
        yield sorted(first, key=str.lower)
        left = [pin for pin in left if pin not in first]


def ask(pins: Sequence[str], tool: Sequence[str]) -> Report:
    """Have pip-audit ask.

    Raises:
        CannotAsk: it did not get an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
        options = ["-r", str(file), "--no-deps", "--disable-pip", "-f", "json", "--progress-spinner", "off"]
        try:
            done = subprocess.run([*tool, *options], capture_output=True, text=True)
        except OSError as error:
            raise CannotAsk(f"{tool[0]}: {error.strerror}") from None
    try:
        report = json.loads(done.stdout)
        report["dependencies"]
    except (ValueError, LookupError, TypeError):
        raise CannotAsk((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]) from None
    return dict(report)


def found(report: Report, pins: Sequence[str]) -> list[str]:
    """A line for each advisory about the pins.

    Raises:
        CannotAsk: the canary's advisory is not among the answers, or a pin was left out.
    """
    answers = {_name(answer["name"]): answer for answer in report["dependencies"]}
    canary = answers.pop(_name(CANARY), {})
    ids = {name for advisory in canary.get("vulns", []) for name in (advisory["id"], *advisory.get("aliases", []))}
    if CANARY_ID not in ids:
        raise CannotAsk(f"{CANARY_ID} of {CANARY}, which everybody knows, was not found")
    silent = [pin for pin in pins if "vulns" not in answers.get(_name(pin), {})]
    if silent:
        reasons = [answers.get(_name(pin), {}).get("skip_reason", "no answer") for pin in silent]
        raise CannotAsk("; ".join(f"{pin}: {reason}" for pin, reason in zip(silent, reasons, strict=True)))
    return [
        f"{answer['name']} {answer['version']}: {', '.join([advisory['id'], *advisory.get('aliases', [])])};"
        f" mended in {', '.join(advisory.get('fix_versions', [])) or 'no version'}"
        for answer in answers.values()
        for advisory in answer["vulns"]
    ]


def _name(pin: str) -> str:
    """A package's name as PyPI compares it."""
    return pin.partition("==")[0].lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
