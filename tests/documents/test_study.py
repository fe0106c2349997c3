"""Rows as they are written: which, kept how, and what goes on after a stop. The model here is a table of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dynlora_cli.documents.added import together
from dynlora_cli.documents.chunks import Chunk
from dynlora_cli.documents.given import GivenRow
from dynlora_cli.documents.study import DocumentRow, Study, provenance, with_held_out

CHUNKS = [Chunk(0, number, f"Chunk {number} tells of seven things that are blue and long.", 9) for number in (1, 2, 3)]


class Model:
    """Asks and answers by counting; may be stopped after so many calls.

    Args:
        fails: tries of which nothing comes.
        stop: calls after which it is interrupted.
    """

    def __init__(self, fails: int = 0, stop: int | None = None) -> None:
        self.fails, self.stop = fails, stop
        self.calls: list[tuple[str, str]] = []

    def _call(self, what: str, chunk: Chunk) -> None:
        if self.stop is not None and len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((what, chunk.text))

    def ask(self, chunk: Chunk, begin: int, many: int) -> list[tuple[str, str]]:
        self._call("ask", chunk)
        # Every other request is one that every chunk has.
        tries = range(max(begin, self.fails), begin + many)
        return [("facts", f"common {at}" if at % 2 else f"what of {chunk.number} {at}") for at in tries]

    def answer(self, chunk: Chunk, prompts: list[str]) -> list[str]:
        self._call("answer", chunk)
        return ["" if prompt.endswith("4") else f"as {chunk.number}: {prompt}" for prompt in prompts]


def study(folder: Path, **options: object) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(CHUNKS, folder, **{"questions": 6, "chat": True, **options})  # type: ignore[arg-type]


def test_requests_differ_and_answers_are_by_their_chunk(tmp_path: Path):
    told: list[str] = []
    rows = study(tmp_path).write(Model(), told.append)
    assert len({row.prompt for row in rows}) == len(rows)
    assert all(row.completion == f"as {row.chunk + 1}: {row.prompt}" for row in rows)
    assert all(row.context == CHUNKS[row.chunk].text for row in rows)
    # six of each chunk, and of these none whose answer is empty
    assert [sum(row.chunk == at for row in rows) for at in range(3)] == [5, 5, 5]
    assert len(told) == 3
    assert "3/3 chunks" in told[-1]


def test_an_answer_with_a_number_that_the_text_does_not_have_is_left_out(tmp_path: Path):
    class Inventor(Model):
        def answer(self, chunk: Chunk, prompts: list[str]) -> list[str]:
            return [f"{prompt}, in 1999" if "common" in prompt else prompt for prompt in prompts]

    work = study(tmp_path)
    rows = work.write(Inventor(), lambda _: None)
    assert all("common" not in row.prompt for row in rows)
    assert work.left_out == 18 - len(rows) > 0
    assert any(note.startswith(f"{work.left_out} questions are left out") for note in work.notes)
    again = study(tmp_path)
    assert again.write(Inventor(), lambda _: None) == rows
    assert again.notes[0] == work.notes[0]
    # a person's own question stays
    given = study(tmp_path / "given", given={0: [GivenRow("What is common?", "")]})
    assert [row.completion for row in given.write(Inventor(), lambda _: None)] == ["What is common?, in 1999"]


@pytest.mark.parametrize("stop", range(6))
def test_a_stop_at_any_moment_loses_nothing_that_is_done(tmp_path: Path, stop: int):
    whole = study(tmp_path / "whole").write(Model(), lambda _: None)
    first, second = Model(stop=stop), Model()
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "parts").write(first, lambda _: None)
    assert study(tmp_path / "parts").write(second, lambda _: None) == whole
    assert len(first.calls) + len(second.calls) == 6  # nothing twice


def test_a_model_that_does_not_ask_gets_sentences(tmp_path: Path):
    work = study(tmp_path, questions=2)
    rows = work.write(Model(fails=1000), lambda _: None)
    assert rows[0].prompt == "Complete the sentence: Chunk 1 tells of ..."
    assert rows[0].completion == "seven things that are blue and long."
    assert "a larger model" in work.notes[0].lower()
    # whoever goes on with what is on the disk says the same of it
    again = study(tmp_path, questions=2)
    assert again.write(Model(stop=0), lambda _: None) == rows
    assert (again.filled, again.notes) == (3, work.notes)


def test_a_model_that_cannot_be_asked_goes_on_with_sentences(tmp_path: Path):
    model = Model()
    rows = study(tmp_path, chat=False, questions=1).write(model, lambda _: None)
    assert model.calls == []
    assert [row.prompt + row.completion for row in rows] == [chunk.text for chunk in CHUNKS]


def test_given_rows_are_answered_where_they_have_no_answer(tmp_path: Path):
    given = {0: [GivenRow("who", "Ines"), GivenRow("when")], 2: [GivenRow("where")]}
    work = study(tmp_path, given=given)
    model = Model()
    rows = work.write(model, lambda _: None)
    assert [(row.chunk, row.completion) for row in rows] == [(0, "Ines"), (0, "as 1: when"), (2, "as 3: where")]
    assert [what for what, _ in model.calls] == ["answer", "answer"]


def test_an_eighth_is_held_out_and_none_of_its_prompts_is_trained_on():
    rows = [DocumentRow(at % 3, "c", f"prompt {at // 2}", f"answer {at}") for at in range(64)]
    split = with_held_out(rows)
    held = {row.prompt for row in split if row.held_out}
    assert len(held) == 4
    assert not held & {row.prompt for row in split if not row.held_out}
    assert with_held_out(rows[::-1]) == split[::-1]  # whatever their order
    assert [row.held_out for row in with_held_out(rows[:3])].count(True) in (1, 2)
    assert not with_held_out(rows[:1])[0].held_out


def test_a_chunk_of_one_row_is_trained_with_its_neighbour():
    def rows(*counts: int) -> list[DocumentRow]:
        found = [DocumentRow(at, "c", f"{at} {one}", "a") for at, count in enumerate(counts) for one in range(count)]
        return [*found, *(replace(row, held_out=True) for row in found if row.chunk != 2)]

    assert together(rows(3, 2, 0, 4)) == [[0], [1], [3]]
    assert together(rows(1, 2, 0, 1)) == [[0, 1, 3]]
    assert together(rows(1, 1, 1, 1)) == [[0, 1], [2, 3]]
    assert together(rows(2, 1)) == [[0, 1]]


def test_provenance_counts_chunks():
    class Each:
        name, sha256, characters = "a.txt", "0" * 64, 11

    assert provenance(CHUNKS, [Each(), Each()]) == [
        {"name": "a.txt", "sha256": "0" * 64, "characters": 11, "chunks": count} for count in (3, 0)
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_a_sentence_that_several_chunks_share_is_learned_once(tmp_path: Path, chat: bool):
    shared = "The harbour master raises a black flag beside the market."
    texts = (f"{shared} {shared}", f"{shared} No ferry leaves when the wind is stronger than seven.")
    chunks = [Chunk(0, number, text, 9) for number, text in enumerate(texts, 1)]
    work = Study(chunks, tmp_path, questions=9, chat=chat)
    rows = work.write(Model(fails=1000), lambda _: None)
    assert len({row.prompt for row in rows}) == len(rows) == 4  # each of two sentences is cut twice
    assert [row.chunk for row in rows] == [0, 0, 1, 1]
