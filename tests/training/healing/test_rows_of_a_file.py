"""Healing an adapter of another tool on the rows of a file: their classes, their number, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

from cli_helpers import Dynlora
from peft import LoraConfig, get_peft_model
from tiny_run import model_folder, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dynlora_cli.training.healing import heal


def test_a_class_without_rows_moves_no_other(tmp_path: Path, dynlora: Dynlora, monkeypatch):
    """Rows of classes 1 and 2 alone heal a classifier of three as 1 and 2, not as 0 and 1."""
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(tmp_path, "bert"), num_labels=3)
    asked = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    lines = [json.dumps({"text": f"row {number}", "label": 1 + number % 2}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    seen = []
    monkeypatch.setattr(heal, "fit", lambda run: seen.append((run.data.labels, {row.label for row in run.data.train})))
    common = ["--budget", "0.5", "--heal", "2", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    answer = dynlora("prune", "--adapter", tmp_path / "theirs", *common)
    assert answer.code == 0, answer.err
    assert seen == [(["0", "1", "2"], {1, 2})]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": name, "label": name}) for name in "abc"))
    answer = dynlora("prune", "--adapter", tmp_path / "theirs", *common, "--overwrite")
    assert answer.code == 2
    assert "write the numbers of the classes into the rows" in " ".join(answer.err.split())


def test_what_is_said_of_few_rows_and_of_a_dora(tmp_path: Path, dynlora: Dynlora):
    base = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path))
    asked = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False)
    get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    common = ["prune", "--adapter", tmp_path / "theirs", "--budget", "0.5", "--heal", "2", "--out", tmp_path / "out"]
    answer = dynlora(*common, "--data", write_rows(tmp_path / "one.jsonl", 1))
    assert answer.code == 2
    assert "one.jsonl: none of its rows can be kept from healing" in " ".join(answer.err.split())
    answer = dynlora(*common, "--data", write_rows(tmp_path / "some.jsonl", 10), "--no-measure", "--json")
    assert answer.code == 0, answer.err
    assert "lora heals as" not in answer.err
    assert answer.json["rows"] == 1, "the loss after healing is measured on it"
