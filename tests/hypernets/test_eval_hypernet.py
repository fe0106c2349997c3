"""`dynlora eval` of a hypernetwork: each row under the adapter that its own description or context is written to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import Dynlora
from hypernet_runs import WORDS, document_recipe, hypernet_recipe
from tiny_run import make_recipe, train

from dynlora_cli import api
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.config.load import load_recipe, to_yaml
from dynlora_cli.evaluation.generation import find_prompts, generate
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.evaluation.rows import held_out_rows
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.hypernets.measured import NetworkAdapter, put_on, read_measured
from dynlora_cli.hypernets.writing import open_writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs `out` (descriptions), `doc` (contexts) and their recipes; not to be changed."""
    folder = tmp_path_factory.mktemp("hypernets")
    for name, recipe in (
        ("out", hypernet_recipe(folder, "train.learning_rate=3e-2", "rank.budget=4")),
        ("doc", document_recipe(folder, out="doc")),
    ):
        summary, _ = train(recipe)
        (folder / f"{name}.json").write_text(json.dumps(summary["loss_after"]), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["out", "doc"])
def test_it_finds_the_held_out_loss_of_the_run_and_the_base_beside_it(folder: Path, name: str, dynlora: Dynlora):
    answer = dynlora("eval", "--adapter", folder / name, "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    (found,), base = answer.json["adapters"], answer.json["base"]
    assert found["loss"] == pytest.approx(json.loads((folder / f"{name}.json").read_text()), rel=1e-5)
    assert found["loss"] < base["loss"]
    assert {"perplexity", "tokens"} <= set(base) <= set(found), "as of any run"
    assert found["difference"]["to"] == "base"
    named = dynlora("eval", folder / f"{name}.yaml", "--generate", 0, "--no-base", "--json")
    assert named.json["adapters"][0]["loss"] == found["loss"]


def test_each_row_has_the_loss_and_the_answer_of_the_adapter_that_its_description_is_written_to(
    folder: Path, dynlora: Dynlora
):
    """With the layers of a plain LoRA: what is found of all rows is the sum over the written adapters."""
    whole = dynlora("eval", "--adapter", folder / "out", "--samples", 18, "--json").json
    writer = open_writer(read_hypernet(folder / "out"))
    network, place = read_measured(folder / "out"), writer.place
    tokenizer = read_tokenizer(network, place)
    rows, base = held_out_rows(network, place, tokenizer), base_in_memory(network, place, tokenizer)
    everything, (losses, tokens, answers) = rows.examples, (0.0, 0, set[str]())
    for text in {row.description for row in everything}:
        rows.examples = [row for row in everything if row.description == text]
        with put_on(base, writer.write(text), rows) as none:
            assert none is None
            sums = row_sums(base.model, rows.batches(int(tokenizer.pad_token_id), base.model.device))
            prompts = find_prompts(rows.examples, tokenizer, 99)
            answers |= set(generate(base.model, tokenizer, prompts, batch_size=4, context=base.files.context_length))
        losses, tokens = losses + sums.loss * sums.targets, tokens + sums.targets
    assert whole["tokens"] == tokens
    assert whole["adapters"][0]["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert len(whole["samples"]) == 18, "the same prompt with another description is another question"
    assert {sample["answers"]["out"] for sample in whole["samples"]} == answers


def test_the_base_is_as_it_was_afterwards(folder: Path):
    network = read_measured(folder / "out")
    assert isinstance(network, NetworkAdapter)
    place = find_base(network)
    tokenizer = read_tokenizer(network, place)
    rows, base = held_out_rows(network, place, tokenizer), base_in_memory(network, place, tokenizer)
    modules = list(base.model.modules())
    batch = next(rows.batches(int(tokenizer.pad_token_id), base.model.device))
    with torch.no_grad(), put_on(base, network, rows) as writer:
        assert writer is not None
        writer.see(batch)
        first = base.model(**batch.inputs).logits
        other = copy.copy(batch)
        other.examples = list(reversed(batch.examples))
        writer.see(other)
        assert not torch.allclose(base.model(**batch.inputs).logits, first), "by row"
        writer.see(batch)
        assert torch.equal(base.model(**batch.inputs).logits, first)
    assert list(base.model.modules()) == modules


def test_beside_an_adapter_of_the_same_base(folder: Path, tmp_path: Path, dynlora: Dynlora):
    """The comparison that a person needs: the network, and one LoRA for all of its rows."""
    sources = [str(folder / f"{word}.jsonl") for word in WORDS]
    train(make_recipe(folder, f"dataset.train=[{', '.join(sources)}]", f"output_dir={tmp_path / 'one'}"))
    command = ("eval", folder / "out.yaml", "--adapter", folder / "out", "--adapter", tmp_path / "one", "--json")
    answer = dynlora(*command)
    assert answer.code == 0, answer.err
    assert [found["name"] for found in answer.json["adapters"]] == ["out", "one"]
    assert answer.json["best"]["name"] in ("out", "one")
    assert len({found["loss"] for found in answer.json["adapters"]}) == 2


def test_python_does_the_same(folder: Path):
    found = api.evaluate(folder / "out", generate=0, progress=None)
    assert found.losses["out"] == pytest.approx(json.loads((folder / "out.json").read_text()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("out", ("--data", "ones.jsonl"), "without descriptions, from which out writes an adapter for each"),
        ("out", ("--data", "ones.jsonl"), "`dataset.val[].descriptions`"),
        ("out", ("--data", "ones.jsonl"), "dynlora adapt --hypernet"),
        ("doc", ("--data", "ones.jsonl"), "without contexts, from which doc writes an adapter for each"),
        ("out", ("--also", "more=ones.jsonl"), "--also: out writes an adapter from the text of each row"),
    ],
)
def test_rows_without_texts_are_answered(
    folder: Path, name: str, arguments: tuple[str, ...], words: str, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    answer = dynlora("eval", "--adapter", name, *arguments)
    assert answer.code == 2
    assert words in " ".join(answer.err.split())


def test_rows_of_a_file_may_have_contexts(folder: Path, dynlora: Dynlora):
    answer = dynlora(
        "eval", "--adapter", folder / "doc", "--data", folder / "grounded.jsonl", "--generate", 0, "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["rows"] > 6
    assert answer.json["adapters"][0]["loss"] < answer.json["base"]["loss"]


def test_held_out_rows_with_descriptions_of_their_own(folder: Path, tmp_path: Path, dynlora: Dynlora):
    """Of another recipe: new wordings of the tasks."""
    sources = [{"path": str(folder / f"{word}.jsonl"), "rows": 4, "descriptions": [f"{word}!"]} for word in WORDS]
    recipe = hypernet_recipe(folder, "rank.budget=4", dataset={"val": sources, "max_length": 96})
    (tmp_path / "new.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    answer = dynlora("eval", "--adapter", folder / "out", "--data", tmp_path / "new.yaml", "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["rows"] == 12


def test_the_recipe_that_we_ship_learns_to_tell_its_tasks_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part of its steps; with descriptions of other tasks the same rows are worse."""
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = Path("recipes/hypernet.yaml")
    sizes = ("train.max_steps=60", "train.micro_batch_size=8", "eval.steps=60", "eval.samples=0")
    train(load_recipe(recipe, sizes, str(tmp_path / "net")))
    texts = [task["descriptions"] for task in yaml.safe_load(recipe.read_text("utf-8"))["tasks"]]
    others = [f"dataset.train.{number}.descriptions={texts[number - 1]}" for number in range(len(texts))]
    mixed = load_recipe(recipe, others)
    (tmp_path / "mixed.yaml").write_text(to_yaml(mixed), encoding="utf-8")
    right, wrong = (
        api.evaluate(tmp_path / "net", recipe=named, generate=0, progress=None).losses
        for named in (recipe, tmp_path / "mixed.yaml")
    )
    assert right["net"] < wrong["net"] - 0.1
    assert wrong["base"] == pytest.approx(right["base"])
