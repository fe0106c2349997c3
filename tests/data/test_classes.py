"""Whose classes a classifier answers with, and in which order: the model's own, where the rows mean those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import byte_tokenizer, dataset, task_named
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.evaluate import run as evaluate
from dynlora_cli.commands.merge import into_base
from dynlora_cli.commands.train import run as train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation.options import Options

OWN = ["positive", "neutral", "negative"]
TASK = "sequence-classification"


def load(path: Path, labels: list[Any], own: list[str] | None = None, num_labels: int | None = None) -> Data:
    rows = [{"text": f"the cat {number}", "label": label} for number, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(
        dataset(path), byte_tokenizer(), task=task_named(TASK), seed=0, num_labels=num_labels, own_classes=own
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "own", "num_labels", "names", "numbers"),
    [
        (["negative", "positive", "neutral"], OWN, None, OWN, [2, 0, 1]),
        (["Negative", "POSITIVE", "neutral"], OWN, 3, OWN, [2, 0, 1]),
        (["negative", "positive"], OWN, None, OWN, [2, 0]),
        ([2, 0, 1], OWN, None, OWN, [2, 0, 1]),
        ([2, 0], OWN, 3, OWN, [2, 0]),
        ([1, 0], OWN, None, ["0", "1"], [1, 0]),
        (["b", "a"], OWN, None, ["a", "b"], [1, 0]),
        ([1, 2, 3], OWN, None, ["1", "2", "3"], [0, 1, 2]),
        ([1, 0], ["LABEL_0", "LABEL_1"], None, ["0", "1"], [1, 0]),
        ([1, -1], None, None, ["-1", "1"], [1, 0]),
        (["0", "1"], ["1", "0"], None, ["1", "0"], [1, 0]),
        ([1, 0], ["LABEL_0"], None, ["0", "1"], [1, 0]),
        ([1.0, 0.0], None, None, ["0", "1"], [1, 0]),
        (["1.0", "0.0"], None, None, ["0", "1"], [1, 0]),
        ([True, False], None, None, ["False", "True"], [1, 0]),
    ],
)
def test_the_models_order_is_kept_where_its_head_is(
    tmp_path: Path, labels: list[Any], own: list[str] | None, num_labels: int | None, names: list[str], numbers: Any
) -> None:
    data = load(tmp_path / "a.jsonl", labels, own, num_labels)
    assert data.labels == names
    assert [example.label for example in data.train] == numbers
    new = any("a new head is trained" in note for note in data.notes)
    kept = own is not None and len(own) > 1 and len(names) == len(own) and labels != [1, 2, 3]
    assert new == (own is not None and not kept)


@pytest.mark.parametrize("label", [0.73, "0.73", "1.5", ".5"])
def test_a_number_on_a_scale_is_no_class_in_any_kind_of_file(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'label' is 0?\S+, a number on a scale and no class"):
        load(tmp_path / "a.jsonl", [1, label])
    (tmp_path / "a.csv").write_text(f"text,label\na,1\nb,{label}\n")
    with pytest.raises(DataError, match=r"a\.csv:3: .* a number on a scale"):
        load_data(dataset(tmp_path / "a.csv"), byte_tokenizer(), task=task_named(TASK), seed=0)


# -- from training to the merged model ---------------------------------------------------------------------------------


def write_base(folder: Path) -> Any:
    """A random classifier of three named classes."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    named = {"id2label": dict(enumerate(OWN)), "label2id": {name: number for number, name in enumerate(OWN)}}
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=128, num_labels=3, **named)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_recipe(tmp_path: Path, labels: list[Any]) -> Any:
    rows = [{"text": f"the cat {n} sat {n % 3}", "label": labels[n % len(labels)]} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"model: {{name_or_path: {tmp_path / 'base'}, task: {TASK}}}\noutput_dir: {tmp_path / 'out'}\n"
    text += f"dataset: {tmp_path / 'rows.jsonl'}\nrank: {{budget: 2}}\n"
    (tmp_path / "r.yaml").write_text(text + "train: {max_steps: 2, learning_rate: 1.0e-3}\n")
    return load_recipe(tmp_path / "r.yaml")


def base_loss(tmp_path: Path) -> Any:
    """The loss of the base in a report of eval; None where it was not measured."""
    report = evaluate([tmp_path / "out"], None, Options(generate=0), lambda _: None)
    return (report["base"] or {}).get("loss"), report


@pytest.mark.parametrize("labels", [OWN, [0, 1, 2]])
def test_a_head_that_was_trained_before_answers_from_the_first_step(tmp_path: Path, labels: list[Any]) -> None:
    write_base(tmp_path / "base")
    train(write_recipe(tmp_path, labels))
    into_base(read_adapter(tmp_path / "out"), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == dict(enumerate(OWN))
    assert base_loss(tmp_path)[0] is not None


def test_another_number_of_classes_gets_a_new_head(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    train(write_recipe(tmp_path, ["yes", "no"]))
    into_base(read_adapter(tmp_path / "out"), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}
    assert merged.classifier.weight.shape == (2, 16)
    loss, report = base_loss(tmp_path)
    assert loss is None
    assert any("no classifier head of its own" in note for note in report["notes"])


def test_other_classes_of_the_same_number_do_not_inherit_a_head(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base")
    train(write_recipe(tmp_path, ["a", "b", "c"]))
    into_base(read_adapter(tmp_path / "out"), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert merged.classifier.weight.std() < 0.1 < model.classifier.weight.std()


def test_num_labels_that_no_head_has(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path, ["a", "b"])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"num_labels": 3})})
    with pytest.raises(UsageError, match="num_labels is 3, the training rows have 2 classes: a, b"):
        train(recipe)
