"""doc-to-lora in training: adapters that are written from the contexts of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypernet_runs import document_recipe as recipe
from tiny_run import assembled, lines, train

from dynlora_cli.config.load import check_recipe
from dynlora_cli.errors import Interrupted, RecipeError
from dynlora_cli.hypernets import documents
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.training.hypernets import begin_hypernet

FILES = ("hypernet.json", "hypernet.safetensors")


def files_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def needles(folder: Path, name: str, said: str) -> Path:
    """The same question of each context, so that the context alone says what to answer: one of three words.

    Args:
        folder, name: of the file.
        said: the answers to the three words.
    """
    path = folder / name
    rows = [
        {"context": f"{'mat ' * (number % 4)}the {word}", "prompt": "who? ", "completion": answer}
        for number in range(8)
        for word, answer in zip("abc", said, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_leaves_the_network(tmp_path: Path):
    summary, events = train(recipe(tmp_path))
    read = read_hypernet(tmp_path / "out")
    assert (read.form.method, read.form.encoder, read.form.options["chunk"]) == ("doc-to-lora", None, 6)
    assert {layer.name.rpartition(".")[2] for layer in read.form.layers} == {"down_proj"}
    assert read.form.width == 32
    assert summary["parameters"] == read.net.parameter_count
    assert summary["loss_after"] < summary["loss_before"]
    start = next(event for event in events if event["event"] == "start")
    assert any("contexts of up to" in note and "is kept" in note for note in start["notes"]), start["notes"]


def test_it_learns_what_the_context_alone_says(tmp_path: Path):
    rows, losses = needles(tmp_path, "rows.jsonl", "abc"), []
    for name, said in (("right", "abc"), ("wrong", "bca")):
        data = (f"dataset.train=[{rows}]", f"dataset.val=[{needles(tmp_path, name + '.jsonl', said)}]")
        steps = ("train.answer_share=1", "train.max_steps=60", "eval.steps=60")
        summary, _ = train(recipe(tmp_path, *data, "dataset.val_size=0", *steps, out=name))
        losses.append(summary["loss_after"])
    assert losses[0] < losses[1] - 1, "two targets a row, of which one is the word"


def test_the_same_seed_gives_the_same_bytes_and_a_resumed_run_as_well(tmp_path: Path):
    train(recipe(tmp_path, out="whole"))
    train(recipe(tmp_path, "seed=1", out="other"))
    with pytest.raises(Interrupted):
        train(recipe(tmp_path, out="cut"), interrupt_at=6)
    train(recipe(tmp_path, out="cut"), resume=True)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "cut" / "metrics.jsonl")
    assert files_of(tmp_path / "whole")[1] != files_of(tmp_path / "other")[1]


def test_what_does_not_fit_into_memory_is_read_again_and_nothing_changes(tmp_path: Path, monkeypatch):
    train(recipe(tmp_path, out="kept"))
    monkeypatch.setattr(documents, "LIMIT", 10_000)
    _, events = train(recipe(tmp_path, out="again"))
    assert files_of(tmp_path / "kept") == files_of(tmp_path / "again")
    start = next(event for event in events if event["event"] == "start")
    assert any("10.0 kB of it are kept" in note for note in start["notes"]), start["notes"]


def test_the_size_of_what_is_written_counts_if_asked_for(tmp_path: Path):
    train(recipe(tmp_path, out="plain"))
    train(recipe(tmp_path, "adapter.l1=0.1", out="small"))
    assert files_of(tmp_path / "plain")[1] != files_of(tmp_path / "small")[1]


def test_a_teacher_is_the_base_alone_whatever_was_written_before(tmp_path: Path):
    run = assembled(recipe(tmp_path))
    trained, batch = begin_hypernet(run.recipe, run.base, run.data, torch.device("cpu")), run.batches.step(0, 0)[0]
    with torch.no_grad():
        base = run.model(**batch.inputs).logits
        for parameter in trained.net.parameters():
            parameter.uniform_(-0.5, 0.5)
        trained.see(batch)
        assert not torch.allclose(run.model(**batch.inputs).logits, base)
        with trained.switched_off():
            assert torch.equal(run.model(**batch.inputs).logits, base)


def test_an_objective_that_leaves_contexts_out_is_refused(tmp_path: Path):
    data = {"model": "builtin:tiny", "dataset": str(tmp_path / "rows.jsonl"), "adapter": {"variant": "doc-to-lora"}}
    with pytest.raises(RecipeError, match="write `objective: context-distillation`"):
        check_recipe(data)
    check_recipe({**data, "train": {"objective": "context-distillation"}})
