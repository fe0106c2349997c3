"""scripts/bench/generated/: answers that count as right, documents kept back, sums and differences, and a fresh page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
sys.path[:0] = [str(SCRIPTS / "generated"), str(SCRIPTS)]


import documents as bench  # noqa: E402 - they are scripts, not a package
import documents_runs as runs  # noqa: E402
import documents_sets as sets  # noqa: E402
import documents_tables as tables  # noqa: E402


def line(document: str, method: str, loss: float, *, seed: int = 0, **more: Any) -> dict[str, Any]:
    found = {"set": "xquad", "document": document, "method": method, "seed": seed, "questions": 4, "exact": 0}
    return {**found, "contains": 1, "f1": 0.5, "loss": loss, "tokens": 10, **more}


LINES = [
    line("a", "base", 40.0, general=3.0),
    line("b", "base", 20.0, general=3.0),
    line("a", "distilled", 20.0, cpu=90.0, bytes=1200, rows=20, steps=30, general=3.5),
    line("b", "distilled", 20.0, cpu=110.0, bytes=1000, rows=30, steps=40, general=3.1),
    line("a", "distilled", 10.0, seed=1, general=3.0, made_up=1),
    line("a", "added 2", 30.0, general=3.2),
    line("b", "added 2", 30.0, general=3.2),
]


@pytest.mark.parametrize(
    ("said", "exact", "contains"),
    [
        ("Kublai Khan.", True, True),
        ("It was the Kublai  Khan", False, True),
        ("Kublai Khans", False, False),
        ("", False, False),
    ],
)
def test_right_answers_are_compared_word_by_word(said, exact, contains):
    answers = ["the Kublai Khan", "Temür"]
    assert (sets.exact(said, answers), sets.contains(said, answers)) == (exact, contains)


def test_overlap_is_the_f1_of_words():
    assert sets.overlap("in the year 1788", ["1788", "year of 1788"]) == pytest.approx(2 * 2 / (3 + 3))
    assert sets.overlap("nothing", ["1788"]) == 0


def test_a_beginning_ends_with_a_paragraph():
    text = "one two.\n\nthree four.\n\nfive six"
    assert sets.beginning(text, 25) == "one two.\n\nthree four."
    assert sets.beginning(text, 12) == "one two."
    assert sets.beginning("one two three four", 10) == "one two"
    assert sets.beginning(text, 100) == text


def test_a_text_is_cut_in_two_at_the_end_of_a_sentence():
    assert runs.halves("One is. Two are. Three are more.") == ("One is. Two are.", "Three are more.")
    assert runs.halves("abcd") == ("ab", "cd")


@pytest.mark.skipif(not (sets.SHARED / "data" / "xquad_en").is_dir(), reason="needs the shared data")
def test_what_settings_were_tried_on_is_in_no_table():
    tried = {one.name for one in sets.documents("xquad", 10, tried=True)}
    kept = sets.documents("xquad", 20)
    assert len(tried) == 10
    assert not tried & {one.name for one in kept}
    assert len({one.title for one in kept}) == 20
    assert all(any(answer in one.text for answer in q.answers) for one in kept for q in one.questions)


PROMPTED = [*LINES, {"set": "xquad", "document": "a", "method": "prompt", "seed": 0, "loss": 10.0, "tokens": 10}]


def test_a_loss_is_over_all_tokens_and_the_difference_by_document():
    cells = tables.quality([each for each in LINES if each["method"] == "distilled"], PROMPTED)
    assert cells[0] == "2 x 2"
    assert cells[1] == "25 %"
    assert cells[4] == "25 %"  # of the lines that say it
    assert cells[5] == f"{50 / 30:.3f}"
    # a: mean(2, 1) - 4 = -2.5; b: 0
    assert cells[6] == "-1.250 ± 1.250"
    # the prompt: a goes from 4 to 1; of b nothing is known
    assert cells[7] == "83 %"
    assert cells[8] == f"{(3.5 + 3.1 + 3.0) / 3:.3f}"


def test_what_an_adapter_costs_is_a_mean_over_those_that_say_it():
    assert tables.cost([each for each in LINES if each["method"] == "distilled"]) == ["100", "1", "25", "35"]
    assert tables.cost(LINES[:2]) == ["", "", "", ""]


def test_the_page_has_each_set_and_what_holds_several_documents():
    page = tables.page(LINES, "Read this.\n")
    assert "## xquad" in page
    assert "pubmedqa" not in page.split("## xquad")[1]
    assert "added, 2 documents" in page
    assert page.index("Read this.") < page.index("## xquad")
    assert "| 84 steps | 2 x 2 |" in tables.page(LINES, settings=[{**each, "way": "84 steps"} for each in LINES[2:5]])


def test_lines_that_are_there_are_not_measured_again(tmp_path):
    results = tmp_path / "documents.jsonl"
    results.write_text("".join(json.dumps(each) + "\n" for each in LINES), encoding="utf-8")
    found = bench.Bench(tmp_path / "work", results=results)
    document = sets.Document("xquad", "a", "A", "text", ())
    assert found.has(document, "base", 0)
    found.line(document, "base", 0)
    assert results.read_text(encoding="utf-8").count("\n") == len(LINES)
    assert not found.has(document, "base", 1)


def test_the_page_is_fresh():
    folder = SCRIPTS / "generated"
    assert (folder / tables.PAGE).read_text(encoding="utf-8") == tables.made(folder)
