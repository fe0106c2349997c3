"""Tokens that a model has no row for, and adapters that bring a table of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynlora_cli
from dynlora_cli.commands.dry_run import plan
from dynlora_cli.commands.evaluate import run as evaluate
from dynlora_cli.commands.train import run as train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.errors import DataError
from dynlora_cli.evaluation.options import Options

TINY = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"
TEXTS = ["the cat <|new|> sat", "a <|more|> fox"]


def larger_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>", "<|more|>"]})
    return tokenizer


def write_base(folder: Path, tokenizer: Any) -> int:
    """A model whose table was not enlarged; gives the size of that."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.config.vocab_size)


def write_recipe(tmp_path: Path) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["fine", *TEXTS]))
    text = f"model: {tmp_path / 'base'}\ndataset: {tmp_path / 'rows.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
    (tmp_path / "r.yaml").write_text(text + "train: {max_steps: 2, learning_rate: 1.0e-3}\nrank: {budget: 2}\n")
    return load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("way", [plan, train])
def test_tokens_beyond_the_table_are_refused_with_row_and_sizes(tmp_path: Path, way: Any) -> None:
    tokenizer = larger_tokenizer()
    table = write_base(tmp_path / "base", tokenizer)
    number = tokenizer.convert_tokens_to_ids("<|new|>")
    assert number >= table
    expected = rf"rows\.jsonl:2: the text has the token '<\|new\|>', number {number} of the tokenizer's {table + 2}, "
    with pytest.raises(DataError, match=expected + f"and the model's table has {table} rows"):
        way(write_recipe(tmp_path))


def test_padding_beyond_the_table_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    write_base(tmp_path / "base", tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer pads with the token '<\|pad\|>'"):
        plan(write_recipe(tmp_path))


def test_an_adapter_with_its_own_table_is_measured_and_the_base_left_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = larger_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    total, targets = 0.0, 0
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = wrapped(torch.tensor([ids])).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
        targets += len(ids) - 1
    options = Options(base=str(TINY), generate=0)
    report = evaluate([tmp_path / "adapter"], tmp_path / "rows.jsonl", options, lambda _: None)
    assert [found["name"] for found in report["adapters"]] == ["adapter"]
    assert report["adapters"][0]["loss"] == pytest.approx(total / targets, rel=1e-4)
    assert any("the base model is left out" in note for note in report["notes"])
