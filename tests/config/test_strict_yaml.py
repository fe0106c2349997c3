"""YAML 1.2 scalars, repeated keys, syntax errors and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.strict_yaml import dump, parse
from dynlora_cli.errors import RecipeError, UsageError

from recipe_helpers import MINIMAL, load, problems

SCALARS = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("5e-5", 5e-5),
    ("1e5", 1e5),
    ("2.0e-4", 2e-4),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5", -1.5),
    ("-.inf", float("-inf")),
    ("12", 12),
    ("+3", 3),
    ("-7", -7),
    ("0x1F", 31),
    ("0o17", 15),
    ("010", 10),
    ("true", True),
    ("false", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("no", "no"),
    ("12:30", "12:30"),
    ("1_000", "1_000"),
    ("2M", "2M"),
    ("e5", "e5"),
    ("'1'", "1"),
    ('"1e5"', "1e5"),
    ("!!str 5", "5"),
    ("2024-01-01", "2024-01-01"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    root, faults = parse(f"key: {text}", "recipe.yaml")
    assert root is not None
    found = root.plain()["key"]
    assert (found, type(found), faults) == (value, type(value), [])


def test_texts_survive_a_dump() -> None:
    texts = [
        "on",
        "1e5",
        "0o17",
        "a: b",
        "",
        "~",
        "null",
        "12:30",
        "1_000",
        ".5",
        "é😀",
        "- x",
        "x\ny",
        " a",
        "#c",
        "TRUE",
    ]
    root, _ = parse(dump({"key": texts}), "recipe.yaml")
    assert root is not None
    assert root.plain() == {"key": texts}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model:\n\tname_or_path: x", 2, "tab"),
        ("model: @x", 1, "quotes"),
        ("model: a: b", 1, "indentation"),
        ("model: x\n   seed: 2\n", 2, "indentation"),
        ("train:\n    epochs: 1\n  max_steps: 2\n", 3, "indentation"),
        ("seed: 1\nmodel\n", 2, "no `key: value`"),
        ("seed: 1\nmodel: [a, b\n", 2, "not closed"),
        ("seed: 1\nmodel: 'x\n", 2, "quote is not closed"),
        ("model: *x", 1, "anchor"),
        ("model: &x a\nseed: &x 1\n", 2, "defined twice"),
        ("seed: 1\n---\nseed: 2\n", 2, "second document"),
        ("seed: [1,,2]", 1, "comma"),
        ('model: "C:\\q"', 1, "backslash"),
        ("seed: 1\nmodel: \x07", 2, "U+0007"),
        ("dataset: &a [*a]", 1, "contains itself"),
    ],
)
def test_a_syntax_error_names_the_line_in_plain_words(text: str, line: int, words: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"recipe.yaml:{line}: ")
    assert words in problem


def test_anchors_work_and_merge_keys_do_not() -> None:
    recipe = load("model: builtin:tiny\ndataset: {train: [&a a.jsonl], val: [*a]}\n", "dataset.val.0.path=b.jsonl")
    assert [recipe.dataset.train[0].path, recipe.dataset.val[0].path] == ["a.jsonl", "b.jsonl"]
    assert "merge keys" in problems(MINIMAL + "train:\n  <<: {epochs: 2}\n")[0]


@pytest.mark.slow
def test_anchors_cannot_blow_a_file_up() -> None:
    bomb = "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    bomb += "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
    )
    assert "more than 10,000 values" in problems(bomb)[0]
    assert "too deep" in problems("model: " + "[" * 5000)[0]


def test_a_repeated_key_names_both_lines() -> None:
    assert problems(MINIMAL + "train:\n  epochs: 1\n  epochs: 2\nseed: 1\nseed: 1\n") == [
        "recipe.yaml:5: train.epochs: repeated key; it is already on line 4",
        "recipe.yaml:7: seed: repeated key; it is already on line 6",
    ]


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("# only a remark\n", "empty"), ("- a\n", "a list of 1"), ("text", "'text'")]
)
def test_a_file_must_hold_a_mapping(text: str, words: str) -> None:
    (problem,) = problems(text)
    assert words in problem


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"seed: 1\nmodel: \xff\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: the file is not UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match=r"no recipe at .*recpie\.yaml; did you mean 'recipe\.yaml'\?"):
        load_recipe(tmp_path / "recpie.yaml")
    with pytest.raises(UsageError, match="is a folder") as caught:
        load_recipe(tmp_path)
    assert "recipe.yaml" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(tmp_path / "recipe.yaml" / "x")


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "recipe.yaml").model.name_or_path == "builtin:tiny"
