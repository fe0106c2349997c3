"""gpt-oss as it is published: experts in MXFP4, which are read into plain numbers before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Dynlora
from data_helpers import ROLE_TOKENS, byte_tokenizer
from pico import pico_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from dynlora_cli.config.sections import Model
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import load_base
from dynlora_cli.models.quiet import quiet

EXPERTS, HIDDEN, INSIDE = 2, 64, 32


def mxfp4(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers of four bits in blocks of 32, and the exponents of the blocks."""
    *outer, inner = shape
    blocks = torch.randint(0, 256, (*outer, inner // 32, 16), dtype=torch.uint8)
    return blocks, torch.full((*outer, inner // 32), 122, dtype=torch.uint8)  # 2 ** (122 - 127)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss whose experts lie in its file as in the published one."""
    path = tmp_path_factory.mktemp("stored") / "gpt-oss"
    tokenizer = byte_tokenizer(ROLE_TOKENS)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INSIDE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=1, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        del tensors[name]
        wide = name.endswith("gate_up_proj")
        shape = (EXPERTS, 2 * INSIDE, HIDDEN) if wide else (EXPERTS, HIDDEN, INSIDE)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    stored = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(stored))
    return path


def test_it_trains_and_merges(gpt_oss: Path, tmp_path: Path, dynlora: Dynlora):
    recipe = pico_recipe(tmp_path, model=str(gpt_oss))
    trained = dynlora("train", recipe, "--json")
    assert trained.code == 0, trained.err
    merge = ("merge", "--adapter", tmp_path / "out", "--out", tmp_path / "merged", "--json")
    refused = dynlora(*merge)
    assert refused.code == 2
    assert "--base-weights dequantized" in refused.err
    merged = dynlora(*merge, "--base-weights", "dequantized")
    assert merged.code == 0, merged.err
    assert merged.json["check"]["kl"] < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_its_experts_are_the_numbers_that_are_stored(gpt_oss: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.update(k) or load(*a, **k))
    options = Model(name_or_path=str(gpt_oss))
    files = BaseFiles.find(options)
    with quiet:
        base = load_base(options, files, files.tokenizer, device=torch.device("cpu"), labels=None, seed=0)
    assert asked["quantization_config"].dequantize  # where kernels are installed, transformers would not by itself
    stored = load_file(gpt_oss / "model.safetensors")["model.layers.0.mlp.experts.down_proj_blocks"]
    halves = torch.stack([stored & 15, stored >> 4], -1).flatten(-3).long()  # two numbers a byte, the low one first
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([values, -values])[halves] * 2.0**-5
    found = base.model.get_parameter("model.layers.0.mlp.experts.down_proj")
    torch.testing.assert_close(found.float(), numbers.transpose(1, 2), rtol=0, atol=0)


def test_it_is_not_quantized_again(gpt_oss: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("train", pico_recipe(tmp_path, model=str(gpt_oss)), "--set", "model.load_in_4bit=true")
    assert answer.code == 2
    assert "stored quantized by mxfp4 already" in answer.err
