"""Adapters with rows of tokens and biases, in every command: taken as they are, or refused in words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Dynlora
from numeric import assert_close_to_truth
from peft import LoraConfig, get_peft_model
from peft_adapters import TERMS
from peft_extras import CASES, change, load, logits_of, make, peft_logits
from pico import pico_model
from transformers import LlamaConfig, LlamaForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.bank import why_alone
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.side_by_side import refuse_strangers
from dynlora_cli.commands import export
from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.file import read_model

# What each has beside its components, in the words of a refusal.
EXTRAS = {
    "rows-tied": "2 trained rows of model.embed_tokens",
    "bias-all": "14 trained biases, such as",
    "lora-bias": "biases of its layers (lora_bias)",
    "saved-both": "whole tensors (lm_head.weight, model.embed_tokens.weight)",
}
REFUSING = {"vllm": "vLLM", "gguf": "llama.cpp", "lorax": "LoRAX", "tgi": "TGI", "sglang": "SGLang"}


@pytest.mark.parametrize("case", EXTRAS)
def test_who_cannot_read_it_is_named_and_the_merge_is_offered(case: str, tmp_path: Path):
    base, folder = make(case, tmp_path)
    for target, consumer in REFUSING.items():
        with pytest.raises(UsageError) as refusal:
            export.run(folder, target, tmp_path / target, base_name=str(base))
        assert f"holds {EXTRAS[case]}" in refusal.value.message
        assert f"which {consumer} does not read" in refusal.value.message
        assert "--to merged" in str(refusal.value.hint)
        assert not (tmp_path / target).exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["peft", "uniform"])
@pytest.mark.parametrize("case", ["rows-of-both", "bias-some", "lora-bias-all", "more-tokens-rows-alone", "dora-table"])
def test_peft_folders_keep_it(case: str, target: str, tmp_path: Path):
    base, folder = make(case, tmp_path)
    if (case, target) == ("dora-table", "uniform"):
        with pytest.raises(UsageError, match="is a DoRA"):
            export.run(folder, target, tmp_path / "out", base_name=str(base))
        return
    summary = export.run(folder, target, tmp_path / "out", base_name=str(base))
    assert summary["check"]["kl"] < 1e-6
    assert summary["peft_check"] == {"checked": True, "peft": summary["peft_check"]["peft"], "problem": None}
    words = CASES[case][2].get("resize", 64)
    theirs = peft_logits(base, folder, words)
    assert_close_to_truth(peft_logits(base, tmp_path / "out", words), theirs, terms=TERMS, dtype=torch.float32)


@pytest.mark.parametrize("case", ["rows-tied", "bias-all", "lora-bias", "tokens-alone"])
def test_what_shares_no_batch_says_why(case: str, tmp_path: Path):
    base, folder = make(case, tmp_path)
    adapter, model = read_adapter(folder), load(base)
    why = why_alone(model, adapter)
    assert why
    assert why == adapter.own_numbers()
    with pytest.raises(UsageError, match="cannot be weighed by token"):
        refuse_strangers(model, "one", adapter, kinds=True)


def test_pruned_it_keeps_them_and_they_do_not_count(tmp_path: Path, dynlora: Dynlora):
    base, folder = make("lora-bias-all", tmp_path)
    before = read_adapter(folder)
    answer = dynlora(
        "prune", "--adapter", folder, "--budget", "0.5", "--policy", "magnitude", "--out", tmp_path / "small", "--json"
    )
    assert answer.code == 0, answer.err
    after = read_adapter(tmp_path / "small")
    assert after.parameters <= 0.5 * before.parameters
    assert after.layers.keys() == before.layers.keys(), "each keeps the component that its bias needs"
    assert sorted(after.biases) == sorted(before.biases)
    assert all(torch.equal(after.whole[name], before.whole[name]) for name in before.biases)
    for name, rows in before.token_rows.items():
        assert torch.equal(after.token_rows[name].rows_TI, rows.rows_TI)
    for name, factors in before.layers.items():
        torch.testing.assert_close(after.layers[name].bias_O, factors.bias_O)
    model = load(base)
    with attached(model, after):
        assert_close_to_truth(logits_of(model, "llama-bias"), peft_logits(base, tmp_path / "small"), terms=TERMS)


def test_rows_alone_are_not_pruned_and_shown(tmp_path: Path, dynlora: Dynlora):
    _, folder = make("tokens-alone", tmp_path)
    answer = dynlora("prune", "--adapter", folder, "--budget", "0.5", "--out", tmp_path / "small")
    assert answer.code == 2
    assert "has no components to prune" in answer.err
    shown = dynlora("inspect", "--adapter", folder)
    assert shown.code == 0, shown.err
    assert "trained rows of tokens" in shown.out + shown.err
    told = dynlora("inspect", "--adapter", folder, "--json").json["adapters"][0]
    assert told["token_rows"] == {"model.embed_tokens": [3, 60]}
    assert told["parameters"] == told["components"] == 0


def test_inspect_shows_them(tmp_path: Path, dynlora: Dynlora):
    _, folder = make("lora-bias-all", tmp_path)
    answer = dynlora("inspect", "--adapter", folder)
    assert answer.code == 0, answer.err
    shown = " ".join((answer.out + answer.err).split())
    assert "rows of model.embed_tokens 2 tokens: 3, 4" in shown
    assert "biases 14 in place of the base's, such as" in shown
    assert "lora_bias added in 4 layers" in shown


@pytest.mark.parametrize("options", [{"trainable_token_indices": [5, 9]}, {"bias": "all"}, {"lora_bias": True}])
@pytest.mark.parametrize("switches", [{}, {"attention_bias": True}])
def test_a_gguf_model_has_them(options: dict[str, Any], switches: dict[str, Any], tmp_path: Path):
    """The check compares base + adapter with the file's own numbers; a bias is large enough to be missed."""
    base = pico_model(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | switches))
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    model.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the bias of lora_B for a matrix that was cut off
        config_of = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", **options)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config_of)
        change(model)
        model.save_pretrained(tmp_path / "adapter")
    summary = export.run(tmp_path / "adapter", "merged-gguf", tmp_path / "out", outtype="f32")
    assert summary["check"]["max_logit_difference"] < 1e-4 * summary["check"]["max_logit"]
    read = read_model(
        tmp_path / "out" / "model.gguf",
        config | switches | ({"attention_bias": True} if "lora_bias" in options else {}),
    )
    adapter = read_adapter(tmp_path / "adapter")
    for name, factors in adapter.layers.items():
        if factors.bias_O is not None:
            torch.testing.assert_close(read(f"{name}.bias"), factors.bias_O)  # the base's is 0, or not there
    for rows in adapter.token_rows.values():
        torch.testing.assert_close(read("model.embed_tokens.weight")[list(rows.indices)], rows.rows_TI)
