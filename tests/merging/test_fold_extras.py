"""Rows of tokens, biases and tables of stock PEFT, folded into their base: what the files hold computes what PEFT does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from numeric import assert_close_to_truth
from peft_adapters import TERMS
from peft_extras import CASES, WORDS, load, logits_of, make, make_of, peft_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.merge import Wanted, into_base
from dynlora_cli.errors import UsageError
from dynlora_cli.models import weights

EXACT = [name for name in CASES if name != "bias-parameter"]
# Where table and head shared one weight, and one of them changes alone.
PARTED = {
    "rows-of-both-tied", "rows-of-a-tied-head", "rows-and-head", "saved-table", "tied-factors", "lora-table-t5",
    "dora-table-tied", "dora-table-gpt2", "more-tokens-lora-tied", "more-tokens-lora-gemma",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_merged_it_computes_what_peft_computes(name: str, tmp_path: Path):
    base, folder = make(name, tmp_path)
    kind, words = CASES[name][0], CASES[name][2].get("resize", WORDS)
    truth = peft_logits(base, folder, words)
    summary = into_base(read_adapter(folder), tmp_path / "merged")
    assert 0 <= summary["check"]["kl"] < 1e-6
    assert summary["untied"] == (name in PARTED)
    assert_close_to_truth(logits_of(load(tmp_path / "merged", kind), kind, words), truth, terms=TERMS)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["rows-tied", "rows-of-both", "more-tokens", "more-tokens-rows-alone", "bias-all", "lora-bias-new", "dora-table"],
)
def test_shards_and_16_bits_stay_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pieces are made smaller than usual, so that tensors of this size are written in several."""
    base, folder = make(name, tmp_path, dtype=torch.bfloat16, max_shard_size="10KB")
    kind, words = CASES[name][0], CASES[name][2].get("resize", WORDS)
    monkeypatch.setattr(weights, "_CHUNK", 300)
    into_base(read_adapter(folder), tmp_path / "merged")
    shards = {path.name for path in base.glob("*.safetensors")}
    assert len(shards) > 3
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors")} == shards
    merged = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(path)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = peft_logits(base, folder, words)
    ours = logits_of(model.eval().double(), kind, words)
    assert_close_to_truth(ours, theirs, terms=2 * 8, dtype=torch.bfloat16)  # each matrix of two blocks is rounded


def test_rows_are_in_the_files_bit_by_bit(tmp_path: Path):
    base, folder = make("rows-tied", tmp_path)
    rows = read_adapter(folder).token_rows["model.embed_tokens"]
    into_base(read_adapter(folder), tmp_path / "merged")
    before, after = (
        load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (base, tmp_path / "merged")
    )
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == sorted(rows.indices)
    assert torch.equal(after[list(rows.indices)], rows.rows_TI)


def test_another_type_is_that_of_all(tmp_path: Path):
    base, folder = make("rows-of-both", tmp_path, dtype=torch.bfloat16)
    into_base(read_adapter(folder), tmp_path / "merged", Wanted(dtype="float32"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    rows = read_adapter(folder).token_rows["lm_head"]
    assert torch.equal(merged["lm_head.weight"][list(rows.indices)], rows.rows_TI), "not rounded to the base's type"
    assert base.is_dir()


def test_a_bias_that_the_model_cannot_hold_is_refused(tmp_path: Path):
    _, folder = make_of("qwen2", {"target_modules": ["down_proj"], "lora_bias": True}, tmp_path)
    with pytest.raises(
        UsageError, match=r"adds a bias to model\.layers\.0\.mlp\.down_proj, which has none in .* no switch"
    ):
        into_base(read_adapter(folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
