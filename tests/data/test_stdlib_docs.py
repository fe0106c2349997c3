"""The built-in data set, on a frozen little library and on this Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import byte_tokenizer, dataset, task_named

from dynlora_cli.data import builtin as stdlib_docs
from dynlora_cli.data.builtin import first_sentence
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import MachineError

SOURCE = '''
raise RuntimeError("parsed, never imported")

class Fox(Animal):
    """A quick animal, e.g. a brown one. It jumps."""
    def __init__(self, legs: int = 4, *, name: str = "x") -> None:
        """Not public."""
    def jump(self, over: Dog, /, *args, **kw) -> bool:
        """
        Jump over ``over``
        and land.

        More text.
        """
    @classmethod
    async def find(cls): "Find the nearest fox."
    def _hide(self): "Private things are left out."

def bark(): "bark() -> signature lines are left out."
def silent(): pass
'''


def library(folder: Path) -> Path:
    """A frozen stand-in for the standard library."""
    for name in ("zoo.py", "pack/__init__.py", "test/zoo.py", "site-packages/zoo.py", "_private.py", "pack/_inner.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SOURCE.replace("Fox", "Fox" if name == "zoo.py" else "Bear"), encoding="utf-8")
    (folder / "broken.py").write_text("def (:", encoding="utf-8")
    return folder


def test_rows_of_a_frozen_library(tmp_path: Path) -> None:
    rows = [(row["prompt"], row["completion"]) for row in stdlib_docs.make(library(tmp_path))]
    assert rows == [
        ("zoo.Fox(legs=4, *, name='x')\nWhat it does:", " A quick animal, e.g. a brown one."),
        ("zoo.Fox.jump(over, /, *args, **kw)\nWhat it does:", " Jump over over and land."),
        ("zoo.Fox.find()\nWhat it does:", " Find the nearest fox."),
        ("pack.Bear(legs=4, *, name='x')\nWhat it does:", " A quick animal, e.g. a brown one."),
    ]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the `x`. And more.", "Return the x."),
        ("Open the file\nfor reading", "Open the file for reading."),
        ("See https://x.org for this one.", ""),
        ("Short.", ""),
        ("word " * 60, ""),
        ("", ""),
    ],
)
def test_first_sentence(docstring: str, expected: str) -> None:
    assert first_sentence(docstring) == expected


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.mark.slow
def test_this_python_gives_thousands_of_rows_and_a_stable_split(cache: Any) -> None:
    train, val = stdlib_docs.rows("train"), stdlib_docs.rows("val")
    assert len(train) > 2000
    assert 0.02 < len(val) / len(train) < 0.10
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in val)
    assert {row["completion"] for row in train}.isdisjoint(row["completion"] for row in val)
    assert len({row["prompt"] for row in train + val}) == len(train) + len(val)
    cache.setattr(stdlib_docs, "make", None)  # from now on the cache serves
    assert stdlib_docs.rows("train") == train


def test_a_damaged_cache_is_made_anew(cache: Any, tmp_path: Path) -> None:
    cache.setattr(stdlib_docs, "make", lambda _: [{"prompt": f"{n}", "completion": f"{n}"} for n in range(600)])
    stdlib_docs.cache_file().parent.mkdir(parents=True, exist_ok=True)
    stdlib_docs.cache_file().write_text("{broken")
    assert len(stdlib_docs.rows("train") + stdlib_docs.rows("val")) == 600
    (tmp_path / "file").write_text("")
    cache.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a cache that cannot be written is no fault
    assert len(stdlib_docs.rows("train") + stdlib_docs.rows("val")) == 600


def test_a_python_without_sources_is_told(cache: Any, tmp_path: Path) -> None:
    cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.setattr(stdlib_docs, "make", lambda _: [])
    with pytest.raises(MachineError, match="holds only 0 usable docstrings"):
        stdlib_docs.rows("train")


def test_training_on_it_holds_out_its_own_rows(cache: Any, tmp_path: Path) -> None:
    made = [{"prompt": f"a.b{n}()\nWhat it does:", "completion": f" Number {n}."} for n in range(600)]
    cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.setattr(stdlib_docs, "make", lambda _: made)
    data = load_data(dataset("builtin:stdlib-docs"), byte_tokenizer(), task=task_named(), seed=0)
    assert len(data.val) == len(stdlib_docs.rows("val")) > 0
    assert len(data.train) + len(data.val) == 600
