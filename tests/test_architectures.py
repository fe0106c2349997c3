"""Each architecture from a tiny random model of its config: train with a pruning event, save, load in PEFT, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from data_helpers import byte_tokenizer
from tiny_run import make_recipe, train, write_rows

from dynlora_cli.adapter_reader import read_adapter
from dynlora_cli.attach import attached
from dynlora_cli.merge import into_base
from dynlora_cli.report_card import AUTO_CLASS

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LANGUAGE, CLASSES, SEQ2SEQ = "causal-lm", "sequence-classification", "seq2seq-lm"
# Config class, what is special in it, the task, and how many layers get components.
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama": ("Llama", GROUPED, LANGUAGE, 14),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 64}, LANGUAGE, 14),
    "qwen2": ("Qwen2", {**GROUPED, "tie_word_embeddings": True}, LANGUAGE, 14),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}, LANGUAGE, 14),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, LANGUAGE, 14),
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}, LANGUAGE, 14),
    "phi": ("Phi", SMALL, LANGUAGE, 12),
    "phi3": ("Phi3", GROUPED, LANGUAGE, 8),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, LANGUAGE, 8),
    "gpt_neox": ("GPTNeoX", SMALL, LANGUAGE, 8),
    "opt": ("OPT", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}, LANGUAGE, 12),
    "bert": ("Bert", SMALL, CLASSES, 12),
    "roberta": ("Roberta", SMALL, CLASSES, 12),
    "deberta-v2": (
        "DebertaV2",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        CLASSES,
        16,
    ),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, LANGUAGE, 8),
    "qwen2_moe": (
        "Qwen2Moe",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 48},
        LANGUAGE,
        14,
    ),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, **EXPERTS, "head_dim": 8}, LANGUAGE, 8),
    "olmoe": ("Olmoe", {**GROUPED, **EXPERTS}, LANGUAGE, 8),
    "t5": (
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
        SEQ2SEQ,
        32,
    ),
    "bart": (
        "Bart",
        {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
        }
        | {"d_model": 32, "decoder_start_token_id": 1},
        SEQ2SEQ,
        32,
    ),
    "modernbert": ("ModernBert", {**SMALL, "global_attn_every_n_layers": 2}, CLASSES, 9),
}


def write_model(path: Path, config_name: str, settings: dict[str, Any], task: str) -> None:
    """A model of this config with its tokenizer; an encoder as it comes from pretraining, without a classifier."""
    tokenizer = byte_tokenizer(cls_token="<s>", sep_token="</s>")
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    config = getattr(transformers, f"{config_name}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=130, initializer_range=0.1, **(ids | settings)
    )
    auto = {
        LANGUAGE: transformers.AutoModelForCausalLM,
        CLASSES: transformers.AutoModelForMaskedLM,
        SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
    }
    torch.manual_seed(0)
    auto[task].from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[0, 45, 60, 33, 71, 80, 12], [0, 90, 22, 53, 64, 101, 7]])
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


@pytest.mark.parametrize("kind", CASES)
def test_trained_pruned_saved_loaded_and_merged(folder, kind):
    config_name, settings, task, layers = CASES[kind]
    write_model(folder / kind, config_name, settings, task)
    overrides = [f"model.task={task}", "train.max_steps=3", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=1"]
    if task == CLASSES:
        rows = write_rows(folder / f"{kind}-rows.jsonl", labelled=True)
        overrides.append(f"dataset.train=[{rows}]")
    recipe = make_recipe(folder, *overrides, "eval.steps=3", kind=kind, out=f"out-{kind}")
    summary, events = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert len(summary["ranks"]) == layers
    assert summary["loss_after"] != summary["loss_before"]

    notes = events[0]["notes"]
    of_experts = [note for note in notes if "experts (4 in each of 2 blocks) are not adapted" in note]
    assert len(of_experts) == ("num_experts_per_tok" in settings)
    auto = getattr(transformers, AUTO_CLASS[task])
    adapter = read_adapter(Path(recipe.output_dir))
    more = {"num_labels": 2} if task == CLASSES else {}
    untouched = logits(auto.from_pretrained(folder / kind, **more))
    expected = logits(peft.PeftModel.from_pretrained(auto.from_pretrained(folder / kind, **more), adapter.folder))
    assert (expected - untouched).abs().max() > 1e-3
    with attached(ours := auto.from_pretrained(folder / kind, **more), adapter):
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    merged = into_base(adapter, folder / f"merged-{kind}")
    assert merged["check"]["kl"] < 1e-6
    torch.testing.assert_close(logits(auto.from_pretrained(folder / f"merged-{kind}")), expected, rtol=1e-4, atol=1e-5)
