"""Rows to examples: reading, formats, labels, splits, counts, and the messages for broken input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import CHATML, FIXTURES, byte_tokenizer, dataset, source, space_tokenizer, task_named

from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, MachineError, UsageError

PAIRS = FIXTURES / "completion.jsonl"


def load(section: Any, tokenizer: Any = None, task: str = "causal-lm", **settings: Any) -> Data:
    return load_data(section, tokenizer or byte_tokenizer(), task=task_named(task), **({"seed": 0} | settings))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- formats -----------------------------------------------------------------------------------------------------------


def test_completion_trains_on_the_answer_and_the_end_though_pad_is_the_end() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = load(dataset(PAIRS), tokenizer)
    assert show_example(data.train[1], tokenizer) == [
        ("<s>Capital of Japan?\n", False),
        ("Tokyo, 東京.</s>", True),
    ]
    assert data.train[1].labels[-1] == tokenizer.eos_token_id
    assert "format completion, chosen by its columns" in data.notes[0]


def test_special_tokens_in_the_text_are_not_doubled(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = load(dataset(lines(tmp_path / "a.jsonl", {"prompt": "<s>a ", "completion": "b</s>"})), tokenizer)
    assert tokenizer.decode(data.train[0].input_ids) == "<s>a b</s>"


def test_a_completion_gets_no_space_that_is_not_its_own(tmp_path: Path) -> None:
    tokenizer = space_tokenizer()
    row = {"prompt": "the cat:\n", "completion": "sat on"}
    data = load(dataset(lines(tmp_path / "a.jsonl", row)), tokenizer)
    assert show_example(data.train[0], tokenizer) == [("the cat:\n", False), ("sat on</s>", True)]


def test_no_token_crosses_from_prompt_to_completion(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = load(dataset(lines(tmp_path / "a.jsonl", {"prompt": "the c", "completion": "at sat"})), tokenizer)
    assert show_example(data.train[0], tokenizer) == [("<s>the c", False), ("at sat</s>", True)]
    assert any("nothing between the two" in note for note in data.notes)


def test_a_separator_keeps_bare_prompts_and_answers_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "the c", "completion": "at"}, {"prompt": "the d\n", "completion": "og"}]
    bare, templated = byte_tokenizer(), byte_tokenizer(CHATML)
    data = load(dataset(lines(tmp_path / "a.jsonl", *rows), separator="\n"), bare)
    assert [show_example(example, bare)[0] for example in data.train] == [("<s>the c\n", False), ("<s>the d\n", False)]
    assert not any("nothing between the two" in note for note in data.notes)
    turns = load(dataset(lines(tmp_path / "a.jsonl", *rows), separator="|"), templated)
    assert any("dataset.separator is not used" in note for note in turns.notes)
    assert not any("|" in templated.decode(e.input_ids).replace("<|", "").replace("|>", "") for e in turns.train)


def test_alpaca_uses_the_chat_template_or_the_classic_prompt() -> None:
    templated, bare = byte_tokenizer(CHATML), byte_tokenizer()
    question = show_example(load(dataset(FIXTURES / "alpaca.json"), templated).train[1], templated)
    assert question == [
        ("<|im_start|>user\nContinue the sentence.\n\nthe cat sat<|im_end|>\n<|im_start|>assistant\n", False),
        ("on the mat.<|im_end|>", True),
        ("\n", False),
    ]
    prompt, answer = show_example(load(dataset(FIXTURES / "alpaca.json", max_length=512), bare).train[1], bare)
    assert "### Instruction:\nContinue the sentence.\n\n### Input:\nthe cat sat\n\n### Response:\n" in prompt[0]
    assert answer == ("on the mat.</s>", True)


def test_text_rows_train_on_everything(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = load(dataset(lines(tmp_path / "a.jsonl", {"text": "the cat", "label": 1})), tokenizer)
    assert show_example(data.train[0], tokenizer) == [("<s>the cat</s>", True)]
    assert data.counts["train"]["supervised"] == len(data.train[0].input_ids) - 1
    assert any(note.endswith("columns that are not read: label") for note in data.notes)


def test_text_files_are_cut_into_pieces_whose_every_token_is_a_target_once() -> None:
    tokenizer = byte_tokenizer()
    data = load(dataset(FIXTURES / "story.txt", max_length=16), tokenizer)
    assert all(len(example.input_ids) <= 16 for example in data.train)
    targets = [token for example in data.train for token in example.labels[1:] if token != -100]
    text = (FIXTURES / "story.txt").read_text(encoding="utf-8-sig")
    assert tokenizer.decode(targets) == text + "</s>"
    ends = [tokenizer.eos_token_id in example.input_ids for example in data.train]
    assert ends == [False] * (len(ends) - 1) + [True]


def test_train_on_all_and_train_on_what_is_not_there(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert show_example(load(dataset(PAIRS, train_on="all"), tokenizer).train[0], tokenizer)[0][1]
    for path in (FIXTURES / "story.txt", lines(tmp_path / "a.jsonl", {"text": "a"})):
        with pytest.raises(DataError, match="plain text has no completion"):
            load(dataset(path, train_on="completion"))


def test_classification_names_classes_and_keeps_special_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    task = "sequence-classification"
    data = load(dataset(FIXTURES / "classes.csv"), tokenizer, task, num_labels=2)
    assert data.labels == ["animal", "machine"]
    assert [example.label for example in data.train] == [0, 0, 0, 1, 1]
    assert tokenizer.decode(data.train[2].input_ids) == '<s>a "brown" dog'
    numbers = lines(tmp_path / "a.jsonl", *({"text": f"t{n}", "label": n} for n in (10, 9, 2)))
    assert load(dataset(numbers), tokenizer, task).labels == ["2", "9", "10"]


def test_text_pairs_carry_token_types_and_are_cut_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = ({"text": "the cat", "text_pair": "a fox " * n, "label": n % 2} for n in (1, 40))
    data = load(dataset(lines(tmp_path / "a.jsonl", *rows), max_length=24), tokenizer, "sequence-classification")
    assert tokenizer.decode(data.train[0].input_ids) == "<s>the cat</s>a fox "
    assert set(data.train[0].token_types or ()) == {0, 1}
    assert len(data.train[1].input_ids) == 24
    assert data.counts["train"]["truncated"] == 1


@pytest.mark.parametrize(
    ("train", "val", "num_labels", "expected"),
    [
        ("ab", "c", None, "the class 'c' is not among those of the training rows: a, b"),
        ("aa", "", None, "needs two classes, found a"),
        ("ab", "", 3, "num_labels is 3, the training rows have 2 classes: a, b"),
    ],
)
def test_classes_that_do_not_fit(tmp_path: Path, train: str, val: str, num_labels: int | None, expected: str) -> None:
    files = [
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{n}", "label": label} for n, label in enumerate(labels)))
        for name, labels in (("a", train), ("b", val or train))
    ]
    section = dataset(files[0], val=[source(files[1])])
    with pytest.raises(DataError, match=expected):
        load(section, None, "sequence-classification", num_labels=num_labels)


# -- kinds of files ----------------------------------------------------------------------------------------------------


def as_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")


def as_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({"version": 1, "data": rows}, indent=1), encoding="utf-8")


def as_csv(path: Path, rows: list[dict[str, str]]) -> None:
    body = "".join('"{prompt}","{completion}"\n'.format(**row) for row in rows)
    path.write_text("prompt,completion\n" + body, encoding="utf-8-sig")


def as_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_jsonl),
        ("lines.json", as_jsonl),
        ("a.json", as_json),
        ("a.csv", as_csv),
        ("a.parquet", as_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_examples(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines() if line]
    write(tmp_path / name, rows)
    assert load(dataset(tmp_path / name)).sha256 == load(dataset(PAIRS)).sha256


def test_a_folder_reads_the_files_of_its_split_and_tells(tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": " x"})
    (tmp_path / "README.md").write_text("about")
    data = load(dataset(tmp_path, val=[source(tmp_path, split="test")]))
    assert (len(data.train), len(data.val)) == (1, 1)
    assert data.notes[0].endswith("reading train.jsonl; left out: README.md, test.jsonl")
    with pytest.raises(DataError, match="no file of the split 'validation'"):
        load(dataset(source(tmp_path, split="validation")))


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "a\n", "answer": "b"})
    data = load(dataset(source(path, columns={"prompt": "question", "completion": "answer"})))
    assert data.counts["train"]["rows"] == 1
    with pytest.raises(DataError, match="no column 'reply', which `columns` names") as caught:
        load(dataset(source(path, columns={"prompt": "question", "completion": "reply"})))
    assert caught.value.hint == "columns there: question, answer"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: expected an object with columns, found list"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl:2: column 'text' is null"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: column 'text' is missing"),
        ("a.jsonl", '{"prompt": "a", "completion": true}\n', "'completion' is of type bool, expected text"),
        ("a.jsonl", '{"question": "a"}\n', "no format fits the columns question"),
        ("a.jsonl", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "", "no rows"),
        ("a.json", "[\n{},\n{,}]", r"a\.json:3: not valid JSON"),
        ("a.json", '{"a": 1}', r"expected a list of rows, found one object \(keys: a\)"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "text,label\na\n", r"a\.csv:2: 1 fields, the header has 2"),
        ("a.csv", "text,label\na,b,c\n", r"a\.csv:2: 3 fields, the header has 2"),
        ("a.parquet", "PAR1", "not a valid Parquet file"),
        ("a.txt", " \n", "no rows"),
        ("a.xlsx", "x", r"unknown kind '\.xlsx'"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        load(dataset(tmp_path / name))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 text"):
        load(dataset(tmp_path / "a.txt"))


def test_missing_files_and_unreachable_hub_sets(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match=r"did you mean '.*train\.jsonl'"):
        load(dataset(tmp_path / "trian.jsonl"))
    with pytest.raises(UsageError, match="does not exist"):
        load(dataset(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(UsageError, match="there is no 'builtin:other'"):
        load(dataset("builtin:other"))
    with pytest.raises(MachineError, match="no-such-owner/no-such-set"):
        load(dataset("no-such-owner/no-such-set"))


def test_hub_sets_give_class_names_for_class_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    stored = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or stored)
    section = dataset(source("owner/set", name="small", split="train[:2]"))
    data = load(section, None, "sequence-classification")
    assert asked == [("owner/set", "small", "train[:2]")]
    assert data.labels == ["bad", "good"]
    assert [example.label for example in data.train] == [0, 1]


def test_formats_that_do_not_serve() -> None:
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        load(dataset(source(PAIRS, format="alpaka")))
    with pytest.raises(DataError, match="format 'classification' does not serve"):
        load(dataset(source(PAIRS, format="classification")))
    with pytest.raises(DataError, match="format 'chat' does not serve a text file"):
        load(dataset(source(FIXTURES / "story.txt", format="chat")))
    with pytest.raises(DataError, match="column 'instruction' is missing") as caught:
        load(dataset(source(PAIRS, format="alpaca")))
    assert caught.value.hint is not None
    assert "columns found: prompt, completion" in caught.value.hint


# -- length, counts, splits --------------------------------------------------------------------------------------------


def test_truncation_is_counted_and_rows_without_an_answer_are_dropped(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "a\n", "completion": "b"},
        {"prompt": "a\n", "completion": "b" * 50},
        {"prompt": "a" * 50, "completion": " b"},
    )
    data = load(dataset(path, max_length=20))
    counts = data.counts["train"]
    assert (counts["rows"], counts["truncated"], counts["cut_answers"], counts["dropped"]) == (2, 1, 1, 1)
    assert len(data.train[1].input_ids) == 20
    assert counts["supervised"] == sum(example.supervised() for example in data.train)
    assert [example.row for example in load(dataset(path, max_length=20, overlong="drop")).train] == [0]
    with pytest.raises(DataError, match=r"a\.jsonl:2: longer than max_length 20"):
        load(dataset(path, max_length=20, overlong="error"))
    assert max(len(example.input_ids) for example in load(dataset(path), max_length=16).train) == 16


def test_nothing_to_learn_from_is_an_error_before_training(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a" * 50, "completion": "b"})
    with pytest.raises(
        DataError, match="no token left to learn from: 1 row with an answer that begins after max_length 20"
    ):
        load(dataset(path, max_length=20))


def test_split_keeps_prompts_together_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n // 3}\n", "completion": f"answer {n}"} for n in range(120)]
    there = load(dataset(lines(tmp_path / "a.jsonl", *rows), val_size=0.1))
    back = load(dataset(lines(tmp_path / "b.jsonl", *reversed(rows)), val_size=0.1))
    assert len(there.val) == 12
    assert len(there.train) == 108
    assert {example.row // 3 for example in there.val}.isdisjoint(example.row // 3 for example in there.train)
    assert {example.row for example in there.val} == {119 - example.row for example in back.val}
    other = load(dataset(tmp_path / "a.jsonl", val_size=0.1), seed=1)
    assert {example.row for example in other.val} != {example.row for example in there.val}


def test_split_of_conversations_goes_by_their_opening(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}]
    more = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "a fox"}]
    other = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "a dog"}]
    path = lines(tmp_path / "a.jsonl", *({"messages": item} for item in (turns, turns + more, other)))
    data = load(dataset(path, val_size=0.5), byte_tokenizer(CHATML))
    assert sorted(example.row for example in data.val) in ([0, 1], [2])


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"prompt": "a\n", "completion": f"{n}"} for n in range(9)))
    data = load(dataset(path, val_size=0.2))
    assert not data.val
    assert any("no rows held out" in note for note in data.notes)


def test_prompts_shared_with_a_given_validation_file_are_told(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "v.jsonl", {"prompt": "Two plus two?\n", "completion": "4"}, {"prompt": "?", "completion": "."}
    )
    data = load(dataset(PAIRS, val=[source(path)]))
    assert any(note.startswith("1 of 2 validation rows have a prompt") for note in data.notes)


def test_the_hash_knows_rows_and_options() -> None:
    first = load(dataset(PAIRS)).sha256
    assert first == load(dataset(PAIRS)).sha256
    assert first != load(dataset(PAIRS, train_on="all")).sha256
    assert first != load(dataset(PAIRS, max_length=64)).sha256


def test_shown_pieces_join_to_the_decoded_text_even_where_a_character_is_split() -> None:
    tokenizer = byte_tokenizer()
    example = load(dataset(PAIRS), tokenizer).train[1]
    whole = tokenizer.decode(example.input_ids)
    for at in range(1, len(example.input_ids)):
        example.labels = [-100] * at + list(example.input_ids[at:])
        assert "".join(text for text, _ in show_example(example, tokenizer)) == whole


@pytest.mark.slow
@pytest.mark.shared
def test_real_data(shared: Path) -> None:
    data = load(dataset(shared / "data" / "e2e_nlg" / "valid_clean.jsonl", val_size=0.05, max_length=512))
    assert data.counts["train"]["rows"] + data.counts["val"]["rows"] == 4299
    assert data.counts["train"]["dropped"] == data.counts["train"]["cut_answers"] == 0
    section = dataset(shared / "data" / "sms_spam", val=[source(shared / "data" / "sms_spam", split="test")])
    spam = load(section, None, "sequence-classification")
    assert spam.labels == ["ham", "spam"]
    assert (len(spam.train), len(spam.val)) == (5017, 557)
