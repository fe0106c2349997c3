"""`dynlora adapt` from an adapter on: who asks, answers and teaches, and what is refused before rows are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapt_helpers import SHORT, TEXT, lines, with_long_context
from cli_helpers import Answer
from eval_helpers import by_peft
from pico import pico_model
from tiny_run import model_folder
from transformers import AutoTokenizer

from dynlora_cli import api
from dynlora_cli.documents.begun import Begun


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    return with_long_context(pico_model(tmp_path_factory.mktemp("base")))


@pytest.fixture
def adapt(dynlora: Callable[..., Answer], base: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Runs `dynlora adapt` into a folder of the test, with rows that are given and answers by the model."""
    document, given = tmp_path / "velden.md", tmp_path / "given.jsonl"
    document.write_text(TEXT)
    given.write_text("".join(json.dumps({"prompt": f"Who was keeper {number}?"}) + "\n" for number in range(5)))

    def run(name: str, *arguments: object, model: Path = base, rows: bool = True) -> Answer:
        where = ("--model", model, "--document", document, "--out", tmp_path / name)
        return dynlora("adapt", *where, *(("--data", given) if rows else ()), *SHORT, "--json", *arguments)

    return run


def test_the_adapter_that_is_gone_on_from_asks_answers_and_teaches(
    adapt: Callable[..., Answer], base: Path, tmp_path: Path
):
    first = adapt("a", "--set", "train.learning_rate=0.02")
    assert first.code == 0, first.err
    (tmp_path / "a").rename(tmp_path / "old")
    done = adapt("a", "--set", f"adapter.from={tmp_path / 'old'}")
    assert done.code == 0, done.err
    adapted = done.json["adapted"]
    assert adapted["teacher"] == adapted["answers"] == f"{base} with old"
    rows = lines(tmp_path / "a" / "rows.jsonl")
    with api.load(tmp_path / "old") as loaded:
        asked = [f"{row['context']}\n\n{row['prompt']}" for row in rows]
        for row, prompt in zip(rows, asked, strict=True):
            assert str(loaded.generate(prompt, max_new_tokens=8)).strip().startswith(row["completion"])
        base_says = [str(loaded.generate(prompt, use="base", max_new_tokens=8)).strip() for prompt in asked]
    assert not any(said.startswith(row["completion"]) for said, row in zip(base_says, rows, strict=True))
    assert adapted["loss_with_document"] == pytest.approx(taught_loss(base, tmp_path), rel=1e-5)


def taught_loss(base: Path, tmp_path: Path) -> float:
    """What the held-out answers cost the old adapter in stock PEFT, with their chunk in the prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), by_peft(base, tmp_path / "old")
    total = targets = 0.0
    for row in lines(tmp_path / "a" / "held_out.jsonl"):
        asked = [{"role": "user", "content": f"{row['context']}\n\n{row['prompt']}"}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = [*asked, {"role": "assistant", "content": row["completion"]}]
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits.double(), torch.tensor(ids[len(prompt) :]), reduction="sum"
        ).item()
        targets += len(ids) - len(prompt)
    return total / targets


def test_an_adapter_of_another_base_is_refused_before_rows_are_written(adapt: Callable[..., Answer], tmp_path: Path):
    other = model_folder(tmp_path / "other")
    assert adapt("a").code == 0
    done = adapt("b", "--set", f"adapter.from={tmp_path / 'a'}", model=other)
    assert done.code == 2
    assert "another base" in done.json["error"]
    assert not (tmp_path / "b").exists()
    assert not Begun(tmp_path / "b").folder.exists()


def test_rows_that_would_be_cut_are_refused_before_they_are_written(adapt: Callable[..., Answer], tmp_path: Path):
    short = ("--set", "dataset.max_length=40")
    done = adapt("a", *short)
    assert done.code == 2
    assert "a question of 15 tokens and its answer of 8 may have" in done.json["error"]
    assert not Begun(tmp_path / "a").folder.exists()
    needed = done.json["hint"].partition("dataset.max_length=")[2].partition(",")[0]
    assert adapt("a", "--set", f"dataset.max_length={needed}").code == 0
    # nobody knows how long sentences are until they are found; what is written of them is kept
    plain = with_long_context(model_folder(tmp_path / "plain"))
    done = adapt("b", "--set", "dataset.max_length=8", model=plain, rows=False)
    assert (done.code, done.json["hint"]) == (2, "raise dataset.max_length (now 8)")
    assert adapt("b", "--resume", model=plain, rows=False).code == 0


def test_what_it_was_made_from_is_told_of_a_pruned_one_too(
    adapt: Callable[..., Answer], dynlora: Callable[..., Answer], tmp_path: Path
):
    assert adapt("a").code == 0
    cut = dynlora("prune", "--adapter", tmp_path / "a", "--out", tmp_path / "b", "--budget", 0.5, "--no-measure")
    assert cut.code == 0, cut.err
    digest = hashlib.sha256((tmp_path / "velden.md").read_bytes()).hexdigest()
    for name in ("a", "b"):
        (told,) = dynlora("inspect", "--adapter", tmp_path / name, "--json").json["adapters"]
        assert told["provenance"]["documents"] == [{"name": "velden.md", "sha256": digest}]
    assert "documents name velden.md, sha256" in " ".join(dynlora("inspect", "--adapter", tmp_path / "b").err.split())
