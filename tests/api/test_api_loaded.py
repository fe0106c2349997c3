"""A base with an adapter in memory: what may be asked of it, what is refused, and what is left after `close`."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_recipe

from dynlora_cli import api
from dynlora_cli.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return api.train(pico_recipe(tmp_path_factory.mktemp("loaded")))


@pytest.fixture(scope="module")
def loaded(run: Any) -> Any:
    with api.load(run) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        (None, {}, "prompt: got None"),
        (3, {}, "prompt: got 3"),
        (b"x", {}, "prompt: got a bytes"),
        ([3], {}, "prompt: got a int in a list"),
        ([["a"]], {}, "prompt: got a list in a list"),
        ("", {}, "the prompt is empty"),
        ("a", {"use": 3}, "use: got a int"),
        ("a", {"use": ""}, "there is no adapter ''|is no mix"),
        ("a", {"system": 3}, "system: got a int"),
        ("a", {"stop_strings": 3}, "stop_strings: got 3"),
        ("a", {"do_sample": "x"}, "do_sample is 'x'"),
        ("a", {"max_new_tokens": np.float64(2.5)}, "max_new_tokens is 2.5"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(loaded: Any, prompt: Any, options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        loaded.generate(prompt, **options)


def test_conversations_numbers_of_numpy_and_nothing_at_all(loaded: Any):
    turn = [{"role": "user", "content": "def sort_words_3():"}]
    options: dict[str, Any] = {"max_new_tokens": np.int64(4), "stop_strings": None}
    answer = loaded.generate("def sort_words_3():", **options)
    assert loaded.generate(turn, **options) == answer
    assert loaded.generate([turn, turn], **options) == [answer, answer]
    assert loaded.generate([]) == []
    assert isinstance(loaded.generate("a", max_new_tokens=2, temperature=np.float32(0.7), seed=1), str)


def test_what_is_closed_is_refused_and_its_memory_let_go(run: Any):
    with api.load(run) as loaded:
        model = weakref.ref(loaded.model)
    loaded.close()
    for ask in (lambda: loaded.generate("a"), lambda: loaded.model, lambda: loaded.tokenizer, lambda: loaded.notes):
        with pytest.raises(UsageError, match="is closed"):
            ask()
    with pytest.raises(UsageError, match="is closed"), loaded:
        pass
    assert repr(loaded).endswith(", closed>")
    gc.collect()
    assert model() is None


def test_a_classifier_is_asked_through_its_model(tmp_path: Path):
    words = [("good", "fine"), ("bad", "poor")]
    rows = [{"text": f"{word} {number}", "label": label} for number in range(16) for label, word in words]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = pico_recipe(tmp_path, dataset={"train": [str(file)], "val_size": 0.2, "max_length": 16})
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["model"] = {"name_or_path": recipe["model"], "task": "sequence-classification"}
    recipe["train"] |= {"max_steps": 40, "learning_rate": 0.02}
    run = api.train(recipe)
    with api.load(run) as loaded, torch.no_grad():
        tokens = loaded.tokenizer(["fine 3", "poor 4"], return_tensors="pt", padding=True)
        classes = loaded.model(**tokens).logits.argmax(-1).tolist()
        assert [loaded.model.config.id2label[number] for number in classes] == ["good", "bad"]
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        with pytest.raises(UsageError, match="it names classes, and writes no text"):
            loaded.generate("fine")
    assert run.summary["accuracy_after"] == 1.0
    assert "<svg" in run._repr_html_()
