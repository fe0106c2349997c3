"""Where keys come from: requests out of rows, passages out of documents."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest

from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import DataError
from dynlora_cli.library.held_out import HeldOut, choose_held_out
from dynlora_cli.library.sources import CHARACTERS, WORDS, find_passages, passages


def test_passages_keep_paragraphs_together_where_they_fit():
    paragraphs = [" ".join(f"{letter}{n}" for n in range(50)) for letter in "abc"]
    found = list(passages("\n\n".join(paragraphs)))
    assert found == [f"{paragraphs[0]} {paragraphs[1]}", paragraphs[2]]
    long = " ".join(map(str, range(300)))
    pieces = list(passages(long))
    assert [len(piece.split()) for piece in pieces] == [WORDS, WORDS, 300 - 2 * WORDS]
    assert " ".join(pieces) == long
    unbroken = "語" * (2 * CHARACTERS + 5)
    assert list(map(len, passages(unbroken))) == [CHARACTERS, CHARACTERS, 5]
    assert list(passages(" \n\n ")) == []


def test_documents_are_texts_or_rows_with_text(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("one\n\ntwo")
    found = find_passages(tmp_path / "docs")
    assert [(key.text, key.source) for key in found.keys] == [("one two", "a.md, passage 1")]
    assert [origin.kind for origin in found.sources] == ["documents"]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": n, "text": f"passage {n}"}) + "\n" for n in range(3)))
    assert [key.text for key in find_passages(corpus).keys] == ["passage 0", "passage 1", "passage 2"]
    corpus.write_text('{"id": 1, "body": "x"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: .*found id, body"):
        find_passages(corpus)


def test_a_held_out_request_that_is_a_key_would_find_itself():
    rows = [HeldOut(text, OneText(array("i", [1]), array("i", [1]), n)) for n, text in enumerate(["a", "b", "c", ""])]
    assert [row.text for row in choose_held_out(rows, ["b"])] == ["a", "c"]
    assert len(choose_held_out(rows, [], most=2)) == 2
