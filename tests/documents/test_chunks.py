"""Documents cut into chunks: nothing is lost, nothing is too long, borders are where a reader would put them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynlora_cli.documents.chunks import cut, cut_all
from dynlora_cli.documents.document import Document, read_documents
from dynlora_cli.errors import DataError, UsageError


def words(text: str) -> int:
    return len(text.split())


PARAGRAPHS = [" ".join(f"{letter}{number}" for number in range(30)) + "." for letter in "abcdefgh"]
TEXT = "\n\n".join(PARAGRAPHS)


@pytest.mark.parametrize("most", [7, 30, 45, 65, 100, 1000])
def test_no_word_is_lost_and_no_chunk_is_too_long(most: int):
    chunks = cut(TEXT, words, most)
    assert " ".join(chunks).split() == TEXT.split()
    assert max(map(words, chunks)) <= most


def test_whole_paragraphs_stay_together_and_chunks_are_about_even():
    chunks = cut(TEXT, words, 100)
    assert [chunk.split("\n\n") for chunk in chunks] == [PARAGRAPHS[0:3], PARAGRAPHS[3:6], PARAGRAPHS[6:8]]
    # seven paragraphs of which three fit: not 3, 3, 1, but three of nearly one length where words allow it
    even = cut("\n\n".join(PARAGRAPHS[:4]), words, 90)
    assert [words(chunk) for chunk in even] == [60, 60]


def test_a_long_paragraph_is_cut_at_sentences_then_at_words_then_in_them():
    sentences = [f"This is the sentence {name} of six." for name in ("one", "two", "three", "four")]
    assert cut(" ".join(sentences), words, 14) == [" ".join(sentences[:2]), " ".join(sentences[2:])]
    assert cut("one two three four five", words, 2) == ["one two", "three four", "five"]
    pieces = cut("x" * 1000, len, 100)
    assert "".join(pieces) == "x" * 1000
    assert max(map(len, pieces)) <= 100


def test_chunks_know_their_document_and_its_title(tmp_path: Path):
    (tmp_path / "a.md").write_text(f"# The title\n\n{TEXT}")
    (tmp_path / "b.txt").write_text("One sentence that is no heading.\n\nAnd another one.")
    documents = read_documents([tmp_path / "a.md", tmp_path / "b.txt"], [])
    chunks = cut_all(documents, words, 150)
    assert [(chunk.document, chunk.number, chunk.title) for chunk in chunks] == [
        (0, 1, "The title"),
        (0, 2, "The title"),
        (1, 1, ""),
    ]
    assert [chunk.tokens for chunk in chunks] == [words(chunk.text) for chunk in chunks]


def test_rows_of_a_table_and_files_of_a_folder(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "first text"}\n{"text": "second text"}\n')
    (document,) = read_documents([tmp_path / "rows.jsonl"], [])
    assert document.texts == ("first text", "second text")
    assert [chunk.text for chunk in cut_all([document], words, 100)] == ["first text", "second text"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text(f"text of {name}")
    notes: list[str] = []
    assert [each.name for each in read_documents([folder], notes)] == ["a.txt", "b.txt"]
    assert "reading a.txt, b.txt" in notes[0]


def test_a_folder_of_documents_is_read_whatever_its_files_are_called(tmp_path: Path):
    """Names such as `training` are those of splits in a folder of rows only."""
    folder = tmp_path / "texts"
    (folder / "tests").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "run").mkdir()
    for name in ("guide.md", "README.md", "training.md", "tests/a.txt", ".git/b.md", ".c.md", "run/README.md"):
        (folder / name).write_text(f"text of {name}")
    for name in ("empty.md", "photo.png", "prices.csv", "settings.json", "run/dynlora.json", "rows.jsonl"):
        (folder / name).write_text("")
    (folder / "prices.csv").write_text("name,price\nboat,3\n")
    (folder / "settings.json").write_text('{"keywords": ["a", "b"]}')
    (folder / "rows.jsonl").write_text('{"text": "text of a row"}\n')
    (tmp_path / "secret.md").write_text("of somebody else")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / "same.md").symlink_to(folder / "guide.md")
    notes: list[str] = []
    found = read_documents([folder], notes)
    names = ["README.md", "guide.md", "rows.jsonl", "a.txt", "training.md"]
    assert [each.name for each in found] == names
    assert "left out: empty.md, link.md, photo.png, prices.csv and" in notes[0]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "some.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(DataError, match="no document in the folder") as caught:
        read_documents([tmp_path / "none"], [])
    assert "left out: some.pdf" in (caught.value.hint or "")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(UsageError, match="no regular file"):
        read_documents([tmp_path / "pipe.md"], [])


def test_a_text_of_one_line_is_cut_with_few_counts():
    """A chunk has hundreds of words, and every count reads all of it."""
    counted = 0

    def tokens(text: str) -> int:
        nonlocal counted
        counted += 1
        return words(text)

    text = " ".join(f"w{number}" for number in range(10_000))
    assert [words(chunk) for chunk in cut(text, tokens, 500)] == [500] * 20
    assert counted < 10_000 + 20 * 2 * 20  # each word once, and some for each chunk


def test_what_is_no_document(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.txt").write_bytes(b"text\0\1\2")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "some.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "a.txt").write_text("some text")
    for name, error, words_of_it in (
        ("empty.txt", DataError, "no rows"),
        ("binary.txt", DataError, "NUL"),
        ("latin.txt", DataError, "not UTF-8"),
        ("some.pdf", DataError, ".pdf are not read"),
        ("rows.jsonl", DataError, "a column 'text'; found prompt"),
        ("none.txt", UsageError, "no file or folder"),
        ("nothing", UsageError, "no file or folder"),
    ):
        with pytest.raises(error, match=r"--document|rows\.jsonl") as caught:
            read_documents([tmp_path / name], [])
        assert words_of_it in caught.value.message
    with pytest.raises(UsageError, match="named twice"):
        read_documents([tmp_path / "a.txt", tmp_path / "." / "a.txt"], [])
    with pytest.raises(UsageError, match="no document is named"):
        read_documents([], [])


def test_a_name_is_never_looked_up_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no file or folder"):
        read_documents([Path("squad")], [])


def test_too_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dynlora_cli.documents.document.MOST_CHARACTERS", 100)
    (tmp_path / "a.txt").write_text("word " * 50)
    with pytest.raises(UsageError, match="250 characters, and at most 100"):
        read_documents([tmp_path / "a.txt"], [])


def test_the_hash_is_that_of_the_file(tmp_path: Path):
    import hashlib

    (tmp_path / "a.txt").write_bytes(b"some text\r\n")
    (document,) = read_documents([tmp_path / "a.txt"], [])
    assert document == Document(
        "a.txt", tmp_path / "a.txt", document.texts, hashlib.sha256(b"some text\r\n").hexdigest()
    )
