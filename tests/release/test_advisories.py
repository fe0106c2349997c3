"""scripts/advisories: what is known is told, and silence is never taken for an all-clear."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import advisories  # noqa: E402 - it is a script, not a package

PINS = "# a comment\na==1.0\nb_c==2.0; python_version < '3.11'\nb_c==3.0; python_version >= '3.11'\n"
BAD = {"id": "GHSA-x", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}
CANARY = {"id": "PYSEC-2018-28", "aliases": [advisories.CANARY_ID], "fix_versions": ["2.20.0"]}


def answers(**about: Any) -> Any:
    """A service that knows the canary, and what it is told about others."""
    known = {"requests": {"vulns": [CANARY]}} | about

    def question(pins: Sequence[str]) -> dict[str, Any]:
        pairs = [pin.split("==") for pin in pins]
        told = [
            {"name": name.replace("_", "-"), "version": version} | known.get(name, {"vulns": []})
            for name, version in pairs
        ]
        return {
            "dependencies": [answer for answer in told if answer.get("vulns") is not None or "skip_reason" in answer]
        }

    return question


def test_every_pin_is_asked_about_once():
    assert list(advisories.rounds(PINS)) == [["a==1.0", "b_c==2.0"], ["b_c==3.0"]]
    asked = [pin for pins in advisories.rounds(advisories.PINS.read_text(encoding="utf-8")) for pin in pins]
    text = advisories.PINS.read_text(encoding="utf-8")
    pinned = [line for line in text.splitlines() if "==" in line and not line.startswith("#")]
    assert len(asked) == len(set(asked)) == len(pinned)
    assert "requests" not in {pin.partition("==")[0] for pin in asked}, "the canary needs a name of its own"


def test_no_advisory_is_known(capsys: pytest.CaptureFixture[str]):
    assert advisories.check(PINS, answers()) == advisories.CLEAN
    assert capsys.readouterr().out == "3 pins asked about, no known advisories\n"


def test_an_advisory_is_told(capsys: pytest.CaptureFixture[str]):
    assert advisories.check(PINS, answers(a={"vulns": [BAD]})) == advisories.FOUND
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "a 1.0: GHSA-x, CVE-2026-1; mended in 1.1",
        "3 pins asked about, 1 known advisory",
    ]


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"requests": {"vulns": []}}, "CVE-2018-18074 of requests==2.19.0, which everybody knows, was not found"),
        ({"requests": {"vulns": None}}, "was not found"),
        ({"a": {"vulns": None}}, "a==1.0: no answer"),
        ({"a": {"skip_reason": "not on the index"}}, "a==1.0: not on the index"),
    ],
)
def test_silence_is_no_all_clear(about: dict, said: str, capsys: pytest.CaptureFixture[str]):
    assert advisories.check(PINS, answers(**about)) == advisories.NOT_ASKED
    told = capsys.readouterr()
    assert said in told.err
    assert not told.out


TOOLS = {
    "a traceback": "import sys; sys.exit('requests.exceptions.ConnectionError: no route')",
    "an empty answer": "print('{}')",
    "no words": "pass",
}


@pytest.mark.parametrize("program", TOOLS.values(), ids=TOOLS)
def test_a_tool_that_does_not_answer(program: str, capsys: pytest.CaptureFixture[str]):
    tool = [sys.executable, "-c", program]
    assert advisories.check(PINS, lambda pins: advisories.ask(pins, tool)) == advisories.NOT_ASKED
    told = capsys.readouterr()
    assert "nothing is known about the pins" in told.err
    assert not told.out


def test_a_tool_that_is_not_there_or_answers(tmp_path: Path):
    with pytest.raises(advisories.CannotAsk, match="No such file"):
        advisories.ask(["a==1.0"], [str(tmp_path / "absent")])
    report = {"dependencies": [{"name": "a", "version": "1.0", "vulns": []}]}
    program = f"import sys; print({json.dumps(json.dumps(report))}); sys.exit(1)"
    assert advisories.ask(["a==1.0"], [sys.executable, "-c", program]) == report
