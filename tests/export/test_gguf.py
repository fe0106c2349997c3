"""GGUF files say what the model says, read back by the format's own reader; what they cannot say is refused.

What the real llama.cpp makes of them is in test_llama_cpp.py.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from data_helpers import byte_tokenizer
from numeric import assert_close_to_truth, in_double
from tiny_gguf import (
    CONFIGS,
    LLAMA3,
    SMALL,
    add,
    config_of,
    export_base,
    make,
    random_layers,
)
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.export.gguf.architectures import ARCHITECTURES, architecture
from dynlora_cli.export.gguf.file import read_adapter, read_model, write_adapter, write_model
from dynlora_cli.export.gguf.form import from_gguf, to_gguf
from dynlora_cli.export.gguf.rope import llama3_factors

IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(2))
CONFIG = {"eos_token_id": 1}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("model", CONFIGS)
def test_a_model_comes_back_with_its_logits(model, kind, folders, tmp_path):
    original = load(folders[model])
    facts = export_base(folders[model], tmp_path / "m.gguf", kind)
    read = read_model(tmp_path / "m.gguf", config_of(folders[model]))
    again = AutoModelForCausalLM.from_config(CONFIGS[model], dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(read(name))
        expected, found = original(IDS).logits, again(IDS).logits
    bound = {"f32": 0.0, "f16": 2e-3, "q8_0": 4e-2}[kind] * (again.config.num_hidden_layers / 2) ** 2
    if model.startswith("gemma"):
        bound += 1e-5  # 1 is added to the norms' weights and taken off again
    if "moe" in model:
        bound *= 3  # where rounding sends a token to another expert
    assert float((found - expected).norm() / expected.norm()) <= bound
    assert facts["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


@pytest.mark.parametrize("model", CONFIGS)
def test_an_adapter_comes_back_with_its_logits(model, folders, tmp_path):
    base, again = load(folders[model]), load(folders[model])
    layers = random_layers(base)
    facts = write_adapter(tmp_path / "a.gguf", config_of(folders[model]), layers)
    found = read_adapter(tmp_path / "a.gguf", config_of(folders[model]))
    assert found.keys() == layers.keys()
    add(base, layers)
    add(again, found)
    with torch.no_grad():
        assert_close_to_truth(again(IDS).logits, in_double(base)(IDS).logits, terms=2 * (64 + 128))
    assert (facts["rank"], facts["tensors"]) == (5, 2 * len(layers))


def test_every_tensor_of_an_adapter_has_the_rank_that_alpha_is(folders, tmp_path):
    layers = random_layers(load(folders["llama"]))
    assert {a_CI.shape[0] for a_CI, _ in layers.values()} == {1, 2, 3, 4, 5}
    write_adapter(tmp_path / "a.gguf", config_of(folders["llama"]), layers)
    found = keys(tmp_path / "a.gguf")
    assert [found[key] for key in ("general.type", "adapter.type", "adapter.lora.alpha")] == ["adapter", "lora", 5.0]
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        assert tensor.data.shape[0 if tensor.name.endswith("lora_a") else 1] == 5


def test_tensors_are_read_once_each_and_in_one_pass(folders, tmp_path):
    state, reads = load(folders["qwen3"]).state_dict(), Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return state[name]

    folder = folders["qwen3"]
    write_model(tmp_path / "m.gguf", config_of(folder), folder, state, read, kind="f16")
    assert reads == Counter(dict.fromkeys(state, 1))


def test_matrices_are_small_and_what_needs_to_be_exact_is(folders, tmp_path):
    export_base(folders["llama"], tmp_path / "m.gguf", "q8_0")  # 4 heads of 24: o_proj has rows of 96, 3 blocks
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.0.attn_output.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    assert "output.weight" not in kinds, "the embedding is the head"
    folder = tmp_path / "odd"
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"intermediate_size": 72})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    export_base(folder, tmp_path / "odd.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


# -- configs ---------------------------------------------------------------------------------------------------------


def test_old_and_new_spelling_of_rotary_embeddings_are_the_same():
    old = architecture({"model_type": "llama", **SMALL, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})  # fmt: skip
    new = architecture({"model_type": "llama", **SMALL, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})  # fmt: skip
    assert old.keys == new.keys
    assert (old.keys["llama.rope.freq_base"], old.keys["llama.rope.scaling.factor"]) == (5e5, 4.0)


def test_llama_3_factors_are_transformers_own():
    rope = LLAMA3 | {"original_max_position_embeddings": 32}
    config = LlamaConfig(**SMALL, head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500.0 ** (-torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = torch.tensor(llama3_factors(rope, 500.0, 64))
    assert (float(factors.min()), float(factors.max())) == (1.0, 8.0)
    assert len({round(float(factor), 3) for factor in factors}) > 3, "something in between"
    torch.testing.assert_close(plain / factors, scaled)


def test_a_sliding_window_is_as_far_as_llama_cpp_may_go():
    arch = architecture(CONFIGS["mistral"].to_dict())
    assert (arch.name, arch.keys["llama.context_length"]) == ("llama", 128)
    assert "sliding window" in arch.notes[0]


REFUSED_CONFIGS = {
    "model_type 'bert'": {"model_type": "bert"},
    "rope_type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias is True": {"model_type": "qwen3", "attention_bias": True},
    "query_pre_attn_scalar is 256; llama.cpp computes with 16": {"model_type": "gemma2", "head_dim": 16},
    "embedding for its output head": {"model_type": "gemma2", "tie_word_embeddings": False},
    "final_logit_softcapping is None": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": None,
    },
    "use_bidirectional_attention": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    "residual_multiplier is 0": {"model_type": "granite", "residual_multiplier": 0.0},
    "leaves the rotary embedding out": {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 1},
    "norm_topk_prob is False": {"model_type": "qwen3_moe", "norm_topk_prob": False},
    "mlp_only_layers": {"model_type": "qwen2_moe", "mlp_only_layers": [1]},
    "'llama3' has no GGUF form for this model": {
        "model_type": "olmo2",
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
    },
    "scale_attn_by_inverse_layer_idx": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("message", REFUSED_CONFIGS)
def test_what_gguf_cannot_say_of_a_model_is_refused(message):
    with pytest.raises(UsageError, match=message) as caught:
        architecture({"model_type": "llama", **SMALL, **REFUSED_CONFIGS[message]})
    assert "--to merged" in str(caught.value.hint)


def test_experts_are_two_tensors_of_a_file_for_one_of_the_model():
    """Both are read back as one, and each tensor of the model is asked for once (see above)."""
    arch = architecture(CONFIGS["qwen2-moe"].to_dict())
    parts = arch.named("model.layers.1.mlp.experts.gate_up_proj")
    assert [(part.gguf, part.gguf_shape) for part in parts] == [
        ("blk.1.ffn_gate_exps.weight", (6, 32, 64)),
        ("blk.1.ffn_up_exps.weight", (6, 32, 64)),
    ]
    tensor = torch.arange(6 * 64 * 64.0).reshape(6, 64, 64)
    assert torch.equal(torch.cat([from_gguf(part, to_gguf(part, tensor)) for part in parts], dim=-2), tensor)


def test_which_blocks_have_a_window_is_written_where_llama_cpp_would_guess_otherwise():
    key = "gemma3.attention.sliding_window_pattern"
    assert key not in architecture(CONFIGS["gemma3"].to_dict()).keys
    assert architecture(CONFIGS["gemma3-pattern"].to_dict()).keys[key] == [False, True]


def test_phi_3s_context_ends_where_its_window_does():
    arch = architecture(CONFIGS["phi3-long"].to_dict())
    assert (arch.keys["phi3.context_length"], arch.keys["phi3.rope.dimension_count"]) == (400, 12)
    assert ["sliding window" in note or "long factors" in note for note in arch.notes] == [True, True]


def test_an_unknown_architecture_is_told_what_is_known():
    with pytest.raises(UsageError, match="gpt2, granite, llama, mistral, olmo2, phi3, qwen2") as caught:
        architecture({"model_type": "mamba"})
    assert caught.value.exit_code == 2


# -- weights ---------------------------------------------------------------------------------------------------------


def write(folder: Path, path: Path, changes: dict[str, torch.Tensor | None], **config: Any) -> dict[str, Any]:
    state = load(folder).state_dict() | changes
    names = [name for name, tensor in state.items() if tensor is not None]
    return write_model(path, config_of(folder) | config, folder, names, state.__getitem__, kind="f16")


def test_weights_that_do_not_fit_the_config_are_refused_and_leave_nothing(folders, tmp_path):
    folder, path = folders["qwen3"], tmp_path / "m.gguf"
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    for changes, message in [
        ({norm: None}, f"needs {norm}"),
        ({"model.norm.bias": torch.ones(64)}, "no place for model.norm.bias"),
        ({up: torch.ones(64, 64)}, r"up_proj.weight has shape \[64, 64\], but config.json means \[96, 64\]"),
        ({up: torch.full((96, 64), 7e4)}, "values that f16 cannot hold"),
    ]:
        with pytest.raises(UsageError, match=message):
            write(folder, path, changes)
    assert not list(tmp_path.iterdir())


def test_a_tied_head_is_not_written_and_may_not_differ(folders, tmp_path):
    folder, path = folders["qwen2"], tmp_path / "m.gguf"
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(write(folder, path, {})["path"]).tensors}
    with pytest.raises(UsageError, match="ties lm_head"):
        write(folder, path, {"lm_head.weight": torch.ones(352, 64)})


def test_buffers_and_short_names_of_old_checkpoints_are_understood(folders, tmp_path):
    state = {name.removeprefix("transformer."): value for name, value in load(folders["gpt2"]).state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    path, folder = tmp_path / "m.gguf", folders["gpt2"]
    write_model(path, config_of(folder), folder, state, state.__getitem__, kind="f32")
    name = "h.0.attn.c_attn.weight"
    assert torch.equal(read_model(path, config_of(folder))(name), state[name])


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head", "model.norm", "model.layers.0.self_attn.rotary"])
def test_modules_that_llama_cpp_does_not_adapt_are_refused(module, folders, tmp_path):
    layers = {module: (torch.ones(2, 64), torch.ones(352, 2))}
    with pytest.raises(UsageError, match=module) as caught:
        write_adapter(tmp_path / "a.gguf", config_of(folders["qwen2"]), layers)
    assert "--to merged-gguf" in str(caught.value.hint)


def test_factors_of_another_shape_and_an_empty_adapter_are_refused(folders, tmp_path):
    config = config_of(folders["llama"])
    layers = {"model.layers.0.mlp.up_proj": (torch.ones(2, 96), torch.ones(64, 2))}
    with pytest.raises(UsageError, match=r"do not fit a matrix \[96, 64\]"):
        write_adapter(tmp_path / "a.gguf", config, layers)
    with pytest.raises(UsageError, match="no layer"):
        write_adapter(tmp_path / "a.gguf", config, {})
    export_base(folders["llama"], tmp_path / "m.gguf")
    write_adapter(tmp_path / "a.gguf", config, random_layers(load(folders["llama"])))
    with pytest.raises(UsageError, match=r"a.gguf: blk.1.\w+.weight.lora_a belongs to no matrix"):
        read_adapter(tmp_path / "a.gguf", config | {"num_hidden_layers": 1})
    with pytest.raises(UsageError, match="no LoRA adapter"):
        read_adapter(tmp_path / "m.gguf", config)


def test_without_the_package_the_message_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MachineError) as caught:
        export_base(folders["llama"], tmp_path / "m.gguf")
    assert 'pip install "dynlora[gguf]"' in str(caught.value.hint)


def test_an_unknown_kind_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="q4_k"):
        export_base(folders["llama"], tmp_path / "m.gguf", "q4_k")


def test_the_page_lists_the_models_that_have_a_form():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "export.md").read_text(encoding="utf-8")
    table = page.partition("## Which models have a GGUF form?")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "`model_type`" not in line]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(ARCHITECTURES)
