"""`dataset.retrieve`: which passages stand in which prompts, and what becomes of rows that get too long."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import CHATML, byte_tokenizer, dataset, task_named
from numeric import same_loss
from tiny_run import make_recipe, train

from dynlora_cli.commands.evaluate import run as evaluate
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.sections import Retrieve
from dynlora_cli.data.corpus import cut, read_corpus
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation.options import Options
from dynlora_cli.retrieval import encoders

from recipe_helpers import problems

ANIMALS = ["cat", "dog", "fox", "owl", "bee", "elk", "ant", "hen", "cow", "pig", "rat", "bat"]
PLACES = ["mat", "log", "den", "oak", "hive", "wood", "hill", "coop", "barn", "sty", "hole", "cave"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus(folder, words=0):
    """A passage for each animal, which ends in `words` words that say nothing."""
    more = " so it is" * words
    rows = [
        {"id": animal, "title": animal.title(), "text": f"the {animal} lives in the {place}{more}"}
        for animal, place in zip(ANIMALS, PLACES, strict=True)
    ]
    return write(folder / "corpus.jsonl", rows)


def rows(folder, **more):
    """Two questions for each animal; `more` are further columns, made of the animal."""
    pairs = [(animal, place) for animal, place in zip(ANIMALS, PLACES, strict=True)]
    asked = [
        {"prompt": f"{ask} the {animal}? ", "completion": place, "passage_id": animal}
        | {name: make(animal) for name, make in more.items()}
        for ask in ("where is", "what is the home of")
        for animal, place in pairs
    ]
    return write(folder / "rows.jsonl", asked)


def load(folder, *, template=None, words=0, settings=None, own=None, **retrieve):
    path = own or rows(folder)
    retrieve = Retrieve(corpus=str(corpus(folder, words)), **retrieve)
    tokenizer = byte_tokenizer(template)
    options = {"retrieve": retrieve, "max_length": 512} | (settings or {})
    measured = options.pop("to_measure", False)
    task = task_named(options.pop("task", "causal-lm"))
    data = load_data(dataset(path, **options), tokenizer, task=task, seed=0, to_measure=measured)
    return data, tokenizer


def texts(examples, tokenizer):
    return [tokenizer.decode(list(example.input_ids), skip_special_tokens=True) for example in examples]


def shown(text):
    """The animals of the passages in a prompt, in their order."""
    return re.findall(r"\[\d\] \w+: the (\w+) lives", text)


def asked(text):
    return re.search(r"the (\w+)\? ", text)[1]


def test_training_rows_show_the_right_passage_among_distractors(tmp_path):
    data, tokenizer = load(tmp_path, oracle_share=1.0, top_k=3)
    for text in texts(data.train, tokenizer):
        assert asked(text) in shown(text)
        assert len(set(shown(text))) == 3
    places = {shown(text).index(asked(text)) for text in texts(data.train, tokenizer)}
    assert places == {0, 1, 2}, "the right one is not known by its place"


def test_the_right_passage_is_left_out_in_a_share_of_rows(tmp_path):
    data, tokenizer = load(tmp_path, oracle_share=0.5, distractors=4)
    found = [asked(text) in shown(text) for text in texts(data.train, tokenizer)]
    assert 6 <= sum(found) <= 18
    assert sum(found) == len(found) - data.retrieval["right_left_out"]
    assert all(len(shown(text)) == 5 for text in texts(data.train, tokenizer))
    none, tokenizer = load(tmp_path, oracle_share=0.0)
    assert not any(asked(text) in shown(text) for text in texts(none.train, tokenizer))


def test_held_out_rows_are_told_nothing(tmp_path):
    own = rows(tmp_path, passage_id=lambda animal: "pig")  # which the retriever finds for pigs alone
    settings = {"val_size": 0.25}
    data, tokenizer = load(tmp_path, own=own, settings=settings, top_k=2, oracle_share=0.0)
    assert len(data.val) == 6
    for text in texts(data.val, tokenizer):
        assert shown(text)[0] == asked(text)
        assert len(shown(text)) == 2
    file, tokenizer = load(tmp_path, own=own, settings={"to_measure": True}, top_k=1, oracle_share=0.0)
    assert [shown(text) for text in texts(file.train, tokenizer)] == [[animal] for animal in [*ANIMALS, *ANIMALS]]
    assert data.retrieval["first_is_right"] == pytest.approx(2 / 24)


def test_the_split_and_the_choice_do_not_depend_on_what_is_found(tmp_path):
    settings = {"val_size": 0.25}
    first, tokenizer = load(tmp_path, settings=settings)
    again, _ = load(tmp_path, settings=settings)
    assert (first.sha256, first.notes) == (again.sha256, again.notes)
    bare = load_data(dataset(rows(tmp_path), **settings), tokenizer, task=task_named(), seed=0)
    for part in ("train", "val"):
        assert [e.row for e in getattr(first, part)] == [e.row for e in getattr(bare, part)]
    assert any("columns that are not read: passage_id" in note for note in bare.notes)
    assert not any("not read" in note for note in first.notes)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("limit", [120, 60, 36])
def test_passages_are_cut_before_question_and_answer(tmp_path, template, limit):
    settings = {"val_size": 0.25, "max_length": limit}
    data, tokenizer = load(tmp_path, template=template, words=40, settings=settings)
    assert len(data.train + data.val) == 24
    for part in ("train", "val"):
        assert data.counts[part]["cut_answers"] == data.counts[part]["truncated"] == data.counts[part]["dropped"] == 0
    for example in data.train + data.val:
        text = tokenizer.decode(list(example.input_ids))
        place = PLACES[ANIMALS.index(re.search(r"the (\w+)\? ", text)[1])]
        assert place in tokenizer.decode([label for label in example.labels if label != -100])
        assert len(example.input_ids) <= limit
    told = [note for note in data.notes if "to fit dataset.max_length" in note or "no room" in note]
    assert told
    assert ("[1]" in texts(data.train, tokenizer)[0]) == (limit == 120 or any("cut to fit" in n for n in told))


def test_an_encoder_of_two_texts_keeps_its_question_too(tmp_path):
    data, tokenizer = load(tmp_path, words=40, settings={"task": "seq2seq-lm", "max_length": 90})
    assert data.counts["train"]["truncated"] == 0
    for text in texts(data.train, tokenizer):
        assert shown(text)
        assert asked(text)


def test_an_encoder_finds_passages_by_its_vectors(tmp_path, monkeypatch):
    def letters(texts):
        counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(encoders, "model_encoder", lambda name: SimpleNamespace(encode=letters))
    settings = {"to_measure": True}
    data, tokenizer = load(tmp_path, retriever="dense", top_k=2, settings=settings)
    asked_texts = [row["prompt"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())]
    passages = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    cosines = letters(asked_texts) @ letters([f"{p['title']} {p['text']}" for p in passages]).T
    expected = [[passages[number]["id"] for number in np.argsort(-row, kind="stable")[:2]] for row in cosines]
    assert [shown(text) for text in texts(data.train, tokenizer)] == expected


def test_an_encoder_that_is_not_there_is_named_by_its_key(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.retrieve\.encoder: there is no folder ./nowhere"):
        load(tmp_path, retriever="dense", encoder="./nowhere")


def test_passages_stand_in_the_last_turn_of_the_user(tmp_path):
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "where is the owl? "},
        {"role": "assistant", "content": "oak"},
    ]
    own = write(tmp_path / "chat.jsonl", [{"messages": turns, "passage_id": "owl"}] * 3)
    data, tokenizer = load(tmp_path, template=CHATML, own=own, oracle_share=1.0, top_k=1)
    text = texts(data.train, tokenizer)[0]
    assert "user\nhello" in text
    assert "user\n[1] Owl: the owl lives in the oak\n\nwhere is the owl?" in text
    learned = tokenizer.decode([label for label in data.train[0].labels if label != -100], skip_special_tokens=True)
    assert learned == "hioak"


def test_the_layout_of_the_recipe_is_used(tmp_path):
    own = write(tmp_path / "one.jsonl", [{"prompt": "{passages} of the cat? ", "completion": "x"}] * 2)
    retrieve = Retrieve(corpus=str(corpus(tmp_path)), top_k=1, layout="Q: {prompt}\nRead: {passages}\nA: ")
    data = load_data(dataset(own, retrieve=retrieve), byte_tokenizer(), task=task_named(), seed=0)
    text = texts(data.train, byte_tokenizer())[0]
    assert text.startswith("Q: {passages} of the cat? \nRead: [1] ")
    assert text.endswith("\nA: x")
    assert any("2 training rows without a passage_id" in note for note in data.notes)


def test_confidence_is_the_rows_own_or_that_of_the_retriever(tmp_path):
    own = rows(tmp_path, confidence=lambda animal: 0.25)
    data, _ = load(tmp_path, own=own)
    assert set(data.confidence.values()) == {0.25}
    computed, _ = load(tmp_path)
    assert set(computed.confidence.values()) == {25 / 26}, "24 rows, all found: too few for more than their share"
    nameless = write(tmp_path / "few.jsonl", [{"prompt": "the cat? ", "completion": "mat"}] * 3)
    assert load(tmp_path, own=nameless)[0].confidence == {}


def test_what_cannot_be_looked_for_is_refused(tmp_path):
    own = rows(tmp_path, passage_id=lambda animal: "unicorn")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: names the passage 'unicorn'"):
        load(tmp_path, own=own)
    plain = write(tmp_path / "plain.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    with pytest.raises(DataError, match="no row has one"):
        load(tmp_path, own=plain)
    measured, _ = load(tmp_path, own=plain, settings={"to_measure": True})
    assert any("3 rows without a prompt, so without passages" in note for note in measured.notes)
    write(tmp_path / "twice.jsonl", [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}])
    with pytest.raises(DataError, match=r"twice.jsonl:2: the passage '1' is there twice, first in .*:1"):
        read_corpus(str(tmp_path / "twice.jsonl"), [])
    with pytest.raises(UsageError, match="there is no "):
        read_corpus(str(tmp_path / "nowhere"), [])


def test_a_folder_of_texts_is_cut_in_passages(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    long = " ".join(f"word{number} goes on." for number in range(100))
    (folder / "a.txt").write_text(f"one\n\ntwo words\n\n{long}")
    write(folder / "b.jsonl", [{"text": "of a row", "title": "B"}])
    found = read_corpus(str(folder), []).passages
    assert [passage.id for passage in found] == ["a.txt#1", "a.txt#2", "a.txt#3", "b.jsonl#1"]
    assert (found[-1].title, found[-1].text) == ("B", "of a row")
    pieces = cut(f"one\n\ntwo words\n\n{long}")
    assert " ".join(pieces).split() == f"one two words {long}".split()
    assert max(len(piece.split()) for piece in pieces) <= 120
    assert all(piece.endswith(".") for piece in pieces)


def test_of_several_answers_the_first_is_learned(tmp_path):
    own = write(tmp_path / "many.jsonl", [{"prompt": "the cat? ", "completion": ["mat", "a mat"]}] * 2)
    data = load_data(dataset(own), byte_tokenizer(), task=task_named(), seed=0)
    assert texts(data.train, byte_tokenizer())[0] == "the cat? mat"
    assert any("2 rows with several right answers, of which the first is learned" in note for note in data.notes)


def test_recipes_that_make_no_sense_are_answered_before_anything_is_loaded():
    def found(text, task="causal-lm"):
        return " ".join(
            problems(f"model: {{name_or_path: builtin:tiny, task: {task}}}\ndataset: {{train: [a], {text}}}")
        )

    assert "passages are put into prompts" in found("retrieve: {corpus: c}", "sequence-classification")
    assert "bm25 has no encoder" in found("retrieve: {corpus: c, encoder: there}")
    assert "rows are read before the base" in found("retrieve: {corpus: c, retriever: dense, encoder: base}")
    assert "{prompt} is there 0 times" in found("retrieve: {corpus: c, layout: '{passages}'}")
    assert "corpus" in found("retrieve: {top_k: 2}")


def test_a_run_is_measured_as_it_was_trained(tmp_path):
    make_recipe(tmp_path)
    rows(tmp_path).rename(tmp_path / "llama.jsonl")
    settings = [f"dataset.retrieve={{corpus: {corpus(tmp_path)}, top_k: 2}}", "pruning.policy=retrieval"]
    recipe = load_recipe(tmp_path / "llama.yaml", [*settings, "pruning.weigh=doubt"])
    summary, events = train(recipe)
    assert [event["event"] for event in events].count("prune") == 3
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text())
    assert record["data"]["retrieval"]["right_among_top_k"] == 1.0
    found = evaluate([tmp_path / "out"], None, Options(generate=0), lambda _: None)
    assert found["adapters"][0]["loss"] == same_loss(summary["loss_after"])
    assert any("found by bm25" in note for note in found["notes"])
    assert not any("have changed" in note for note in found["notes"])


def test_a_file_is_measured_with_passages_and_rows_of_other_kinds_without(tmp_path):
    make_recipe(tmp_path)
    rows(tmp_path).rename(tmp_path / "llama.jsonl")
    settings = [f"dataset.retrieve={{corpus: {corpus(tmp_path)}, top_k: 2}}", "train.max_steps=2"]
    train(load_recipe(tmp_path / "llama.yaml", settings))
    file = rows(tmp_path)
    found = evaluate([tmp_path / "out"], file, Options(generate=0, also={"other": file}), lambda _: None)
    (adapter,) = found["adapters"]
    assert found["rows"] == adapter["also"]["other"]["rows"]
    assert adapter["loss"] != same_loss(adapter["also"]["other"]["after"]), "the same rows, in other prompts"
    assert any("found by bm25" in note for note in found["notes"])
    assert not any(note.startswith("other: ") and "bm25" in note for note in found["notes"])
