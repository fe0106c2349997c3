"""Every row of a mixed batch is what it is alone: architectures, padding, adapters of stock PEFT, few bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_helpers import TERMS, WORDS, an_adapter, merged_in_double, padded, texts, tiny_model, unpadded
from numeric import assert_close_to_truth, in_double
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_architectures import CASES
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.adapters.read import read_adapter

MIXES: list[dict[str, float]] = [
    {"a": 1.0},
    {},
    {"b": 1.0},
    {"b": 1.0},
    {"a": 0.7, "c": -0.3},
    {"a": 1, "b": 1, "c": 1},
]
LENGTHS = (9, 5, 1, 7, 9, 3)
FAST = ("llama", "gpt2", "opt", "t5")
KINDS = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow)
    for kind, case in CASES.items()
    if case[2] != "sequence-classification"
]


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_architecture(kind, tmp_path):
    model = tiny_model(tmp_path, kind, CASES[kind][2])
    adapters = {name: an_adapter(model, seed) for seed, name in enumerate("abc")}
    requests = texts(*LENGTHS)
    inputs = padded(requests, model)
    with torch.no_grad(), Bank(model, adapters) as bank:
        assert not bank.alone
        with bank.active(MIXES):
            logits_BTV = model(**inputs).logits
            first = model(**{key: value[:, :1] for key, value in inputs.items()}).logits
    assert first.shape[1] == 1
    for row, mix in enumerate(MIXES):
        own, real = unpadded(inputs, row)
        with torch.no_grad():
            truth = merged_in_double(model, adapters, mix)(**own).logits[0]
        assert_close_to_truth(logits_BTV[row][real], truth, terms=TERMS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("opt", marks=pytest.mark.slow), "t5"])
def test_the_text_is_that_of_each_alone(kind, tmp_path):
    model = tiny_model(tmp_path, kind, CASES[kind][2])
    adapters = {name: an_adapter(model, seed) for seed, name in enumerate("abc")}
    requests = texts(*LENGTHS)
    inputs = {key: value for key, value in padded(requests, model).items() if key in ("input_ids", "attention_mask")}

    def written(rows: slice) -> torch.Tensor:
        batch = {key: value[rows] for key, value in inputs.items()}
        return model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)

    with Bank(model, adapters) as bank:
        with bank.active(MIXES):
            together = written(slice(None))
        for row, mix in enumerate(MIXES):
            with bank.active([mix]):
                assert written(slice(row, row + 1))[0].equal(together[row])
    assert len({tuple(row.tolist()) for row in together[:, -12:]}) > 1


# One base, adapters as stock PEFT makes them: other ranks and scales by module, other targets.
FOREIGN: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 1, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"q_proj": 2},
    },
}
CONV1D: dict[str, dict[str, Any]] = {
    "conv1d": {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "one": {"r": 1, "lora_alpha": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True},
}


def by_stock_peft(model: Any, folder: Path, options: dict[str, Any], seed: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


@pytest.mark.parametrize(("kind", "made"), [("llama", FOREIGN), ("gpt2", CONV1D)], ids=["llama", "gpt2"])
def test_adapters_of_stock_peft_are_what_peft_computes(kind, made, tmp_path):
    folders = {
        name: by_stock_peft(tiny_model(tmp_path, kind), tmp_path / name, options, seed)
        for seed, (name, options) in enumerate(made.items())
    }
    model = tiny_model(tmp_path, kind)
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    names = [*adapters, None, next(iter(adapters))]
    inputs = padded(texts(*LENGTHS[: len(names)]), model)
    with torch.no_grad(), Bank(model, adapters) as bank, bank.active([{name: 1.0} if name else {} for name in names]):
        logits = model(**inputs).logits
    for row, name in enumerate(names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fresh = tiny_model(tmp_path, kind)
            oracle: Any = in_double(PeftModel.from_pretrained(fresh, folders[name]).eval() if name else fresh)
        own, real = unpadded(inputs, row)
        with torch.no_grad():
            truth = oracle(**own).logits[0]
        assert_close_to_truth(logits[row][real], truth, terms=TERMS)


@pytest.mark.slow
def test_on_a_base_in_four_bits(tmp_path):
    """Each row is what it is alone, by the adapter attached as everywhere else."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, initializer_range=0.1)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    model.requires_grad_(False)
    adapters = {name: an_adapter(model, seed) for seed, name in enumerate("abc")}
    requests = texts(9, 5, 7)
    inputs = padded(requests, model)
    mixes = [{"a": 1.0}, {}, {"b": 1.0}]
    with torch.no_grad(), Bank(model, adapters) as bank:
        assert not bank.alone
        with bank.active(mixes):
            together = model(**inputs).logits
    for row, mix in enumerate(mixes):
        with torch.no_grad():
            batch = {"input_ids": requests[row][None]}
            if mix:
                with attached(model, adapters[next(iter(mix))]):
                    alone = model(**batch).logits[0]
            else:
                alone = model(**batch).logits[0]
        own = together[row][-len(requests[row]) :]
        scale = alone.abs().max()
        off = (own - alone).abs().max() / scale
        others = (together[row - 1][-1] - alone[-1]).abs().max() / scale
        assert off < 0.05 * others, (off, others)
