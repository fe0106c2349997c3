"""What a model wrote, read as requests; sentences in two; a person's rows and their chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynlora_cli.documents.chunks import Chunk
from dynlora_cli.documents.given import GivenRow, by_chunk, read_given
from dynlora_cli.documents.requests import WAYS, Way, beginnings, invented, prompt, read_request, same, sentences, tries
from dynlora_cli.errors import DataError

TEXT = "# Velden\n\nThe lighthouse of Velden was built in 1871. It is 38 metres high. No!\n\nInes Tolver kept the light for 31 years."
WHAT, WHO, LIST = Way("facts", "What"), Way("facts", "Who"), Way("structure", "List")


def test_characters_are_words_where_none_are_spaced():
    text = "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u306f\u3044\u3002"
    assert sentences(text) == ["\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002"]
    assert [begin + end for begin, end in beginnings(text)] == sentences(text) * 2
    assert all(begin and end for begin, end in beginnings(text))


@pytest.mark.parametrize(
    ("way", "answer", "expected"),
    [
        (WHO, " kept the light?\nRequest: next", "Who kept the light?"),
        (Way("facts", ""), " When was the lighthouse built? In 1871.", "When was the lighthouse built?"),
        (LIST, " the keepers of the light of Velden.", "List the keepers of the light of Velden."),
        (LIST, " the keepers of the light of", ""),  # cut in the middle
        (WHO, " kept the light", ""),  # no question
        (WHO, " founded Paris?", ""),  # of something else: a name that is not in the text
        (WHAT, " happened in 1912?", ""),  # a number that is not
        (WHAT, " is it?", ""),  # about nothing
        (WHAT, " does the text say of the lighthouse?", ""),  # whoever asks later has no text
        (WHAT, " is the height of Velden's lighthouse?", "What is the height of Velden's lighthouse?"),
        (WHAT, " light " * 80 + "?", ""),  # too long
    ],
)
def test_a_request_is_read(way: Way, answer: str, expected: str):
    assert read_request(answer, way, "Velden", TEXT) == expected


def test_every_part_is_asked_about_in_every_way():
    assert sentences(TEXT) == [
        "The lighthouse of Velden was built in 1871.",
        "Ines Tolver kept the light for 31 years.",
    ]
    tried = tries(TEXT)
    assert len(tried) == len(set(tried)) == len(WAYS) * 2
    assert tried[0][0] != tried[1][0]
    assert prompt("Velden", tried[0][1], tried[0][0]).endswith(
        "Text: Velden: The lighthouse of Velden was built in 1871.\nRequest: What"
    )
    assert len(tries("Two words")) == len(WAYS)


def test_two_requests_are_the_same_whatever_their_signs():
    assert same("Who kept the  light?") == same("who kept: the light")


def test_a_sentence_in_two():
    pairs = list(beginnings(TEXT))
    assert pairs[:2] == [
        ("The lighthouse of", " Velden was built in 1871."),
        ("The lighthouse of Velden was", " built in 1871."),
    ]
    assert {a + b for a, b in pairs} == set(sentences(TEXT))


def test_rows_of_a_person(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": " Who? ", "answer": "Ines"},
        {"question": "When?", "answer": None},
        {"question": "Who?", "answer": "Ines"},
        {"question": "Several?", "answer": "one"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_given(path, {"prompt": "question", "completion": "answer"}, [])
    assert found == [GivenRow("Who?", "Ines"), GivenRow("When?"), GivenRow("Several?", "one")]
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*column 'prompt' is missing"):
        read_given(path, {}, [])
    path.write_text('{"prompt": " "}\n')
    with pytest.raises(DataError, match="the prompt is empty"):
        read_given(path, {}, [])


def test_a_row_goes_to_the_chunk_that_it_shares_rare_words_with():
    chunks = [
        Chunk(0, number, text, 0)
        for number, text in enumerate(["the ship and the sea", "the tower and the sea", "the fish of the sea"], 1)
    ]
    rows = [GivenRow("what of the tower in the sea"), GivenRow("of the sea", "fish"), GivenRow("nothing known")]
    assert by_chunk(rows, chunks) == {1: [rows[0]], 2: [rows[1]], 0: [rows[2]]}


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("It has 38 metres, and was built in 1743.", []),
        ("It was built in 1745.", ["1745"]),
        ("It costs 1,500 crowns.", []),
        ("It costs 1500 crowns.", []),
        ("It costs 1,600 crowns.", ["1600"]),
        ("It costs 1,5", []),
        ("It is 38.5 metres high.", ["5"]),
        ("1. The lighthouse\n2. The harbour", []),
        ("It was built in 17", []),  # no token was left for the rest
        ("It was built in 18", ["18"]),
        ("In 1743, three years before 1746, as you say.", []),
        ("", []),
    ],
)
def test_a_number_that_is_nowhere_in_the_text_is_made_up(answer: str, numbers: list[str]):
    text = "The lighthouse of 1743 is 38 metres high. It costs 1,500 crowns."
    assert invented(answer, text, "What was there in 1746?") == numbers
