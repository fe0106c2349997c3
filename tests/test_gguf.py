"""GGUF files say what the model says, read back by the format's own reader; what they cannot say is refused.

What the real llama.cpp makes of them is in test_llama_cpp.py.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from data_helpers import byte_tokenizer, space_tokenizer
from tiny_gguf import (
    CONFIGS,
    LLAMA3,
    PRE_TOKENIZERS,
    SMALL,
    add,
    config_of,
    export_base,
    make,
    pre_tokenizer,
    random_layers,
    trained_tokenizer,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.exporters._gguf import read_adapter, read_model, write_adapter, write_model
from dynlora_cli.exporters._gguf_arch import architecture, llama3_factors
from dynlora_cli.exporters._gguf_scores import scores, space_prefix
from dynlora_cli.exporters._gguf_vocab import BYTE, CONTROL, UNUSED, USER_DEFINED, added_ids, vocabulary

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
    assert float((found - expected).norm() / expected.norm()) <= {"f32": 0.0, "f16": 2e-3, "q8_0": 3e-2}[kind]
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
        torch.testing.assert_close(again(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-5)
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
    "scale_attn_by_inverse_layer_idx": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("message", REFUSED_CONFIGS)
def test_what_gguf_cannot_say_of_a_model_is_refused(message):
    with pytest.raises(UsageError, match=message) as caught:
        architecture({"model_type": "llama", **SMALL, **REFUSED_CONFIGS[message]})
    assert "--to merged" in str(caught.value.hint)


def test_an_unknown_architecture_is_told_what_is_known():
    with pytest.raises(UsageError, match="gpt2, llama, mistral, qwen2, qwen3") as caught:
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
    torch.testing.assert_close(read_model(path, config_of(folder))("h.0.attn.c_attn.weight"), state["h.0.attn.c_attn.weight"])  # fmt: skip


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


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_keys_of_a_byte_level_tokenizer(folders, tmp_path):
    export_base(folders["llama"], tmp_path / "m.gguf")
    found, tokenizer = keys(tmp_path / "m.gguf"), byte_tokenizer()
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = found["tokenizer.ggml.token_type"]
    assert (types[0], types[100], types[351], len(types)) == (CONTROL, 1, UNUSED, 352)
    names = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "padding_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == [True, False, 0, 1, 1]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_is_recognized_by_what_it_does(name):
    found = vocabulary(trained_tokenizer(name), 400, CONFIG)
    assert found.keys["tokenizer.ggml.pre"] == name
    assert bool(found.notes) == (name == "qwen2"), "it composes characters"


def test_a_pre_tokenizer_that_is_not_known_is_refused_not_guessed():
    tokenizer = trained_tokenizer("llama-bpe")
    for other in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizer("qwen2"), pre_tokenizers.ByteLevel(use_regex=False)]),
        pre_tokenizer("gpt-2"),  # which llama.cpp does not join with taking whole words first
    ):
        tokenizer.backend_tokenizer.pre_tokenizer = other
        with pytest.raises(UsageError, match="pre_tokenizer is none that llama"):
            vocabulary(tokenizer, 400, CONFIG)


def test_other_kinds_of_tokenizers_are_refused():
    for model in (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), models.Unigram([("a", -1.0)], 0)):
        with pytest.raises(UsageError, match=f"type {type(model).__name__}"):
            vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), 400, CONFIG)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(UsageError, match="embedding 200 rows"):
        vocabulary(byte_tokenizer(), 200, CONFIG)


def test_a_tokenizer_without_an_end_takes_it_from_the_config_or_is_refused():
    tokenizer = byte_tokenizer(eos_token=None, pad_token=None)
    assert vocabulary(tokenizer, 352, {"eos_token_id": [7, 1]}).keys["tokenizer.ggml.eos_token_id"] == 7
    with pytest.raises(UsageError, match="eos"):
        vocabulary(tokenizer, 352, {})


def test_what_is_added_is_seen_by_encoding():
    tokenizer = byte_tokenizer()
    assert added_ids(tokenizer) == (True, False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert added_ids(tokenizer) == (False, False)
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    assert added_ids(tokenizer) == (True, True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eot|>", special_tokens=[("<|eot|>", 4)]
    )
    with pytest.raises(UsageError, match="neither bos before nor eos behind"):
        added_ids(tokenizer)


def test_added_tokens_that_are_not_special_are_user_defined():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert vocabulary(tokenizer, 352, CONFIG).types[len(tokenizer) - 1] == USER_DEFINED


def test_tokens_that_llama_cpp_would_look_for_in_another_way_are_noted():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", rstrip=True, normalized=False)])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    notes = vocabulary(tokenizer, 352, CONFIG).notes
    assert ["'<call>' swallows spaces" in note for note in notes] == [True, False], "the other is about NFC"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentence_piece_backend([("t", "h")]), unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<call>", normalized=True)])
    assert "'<call>' in normalized text" in " ".join(vocabulary(tokenizer, 270, CONFIG).notes)


# -- SentencePiece-like ----------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentence_pieces(merges: list[tuple[str, str]], *more: str) -> dict[str, Any]:
    letters = sorted({letter for pair in merges for piece in pair for letter in piece} | {"▁"})
    made = dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate(["<unk>", *BYTES, *letters, *made, *more])}
    return {"vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}


def sentence_piece_backend(merges: list[tuple[str, str]]) -> Tokenizer:
    backend = Tokenizer(models.BPE(**sentence_pieces(merges)))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def test_scores_follow_the_order_of_merges():
    model = sentence_pieces([("t", "h"), ("h", "e"), ("t", "he"), ("th", "e")])
    found = dict(zip(model["vocab"], scores(model, list(model["vocab"]), {"<unk>"}), strict=True))
    assert [found[token] for token in ("th", "he", "the")] == [0.0, -1.0, -2.0]
    assert found["t"] < -2.0


@pytest.mark.parametrize(
    ("merges", "more", "message"),
    [
        ([("t", "h"), ("h", "e"), ("th", "e")], [], "would merge 't' and 'he'"),
        ([("t", "h"), ("t", "he"), ("h", "e"), ("th", "e")], [], "'the' do not stand together"),
        ([("t", "h")], ["ht"], "would merge 'h' and 't'"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(merges, more, message):
    model = sentence_pieces(merges, *more)
    with pytest.raises(UsageError, match=message):
        scores(model, list(model["vocab"]), {"<unk>"})


def test_pieces_without_a_token_for_every_byte_are_refused():
    with pytest.raises(UsageError, match="a token for every byte; <0x00> is missing"):
        vocabulary(space_tokenizer(), 400, CONFIG)


def test_types_of_sentence_pieces():
    backend = sentence_piece_backend([("t", "h")])
    found = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 270, CONFIG)
    assert (found.types[0], found.types[1], found.types[256], found.types[257]) == (2, BYTE, BYTE, 1)
    assert (found.keys["tokenizer.ggml.model"], found.keys["tokenizer.ggml.add_space_prefix"]) == ("llama", True)


def test_who_puts_a_space_before_a_text():
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    both = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    for normalizer, pre, prefix, noted in [
        (both, None, True, False),
        (replace, None, False, False),
        (None, metaspace | {"prepend_scheme": "never"}, False, False),
        (None, metaspace | {"prepend_scheme": "first"}, True, True),
        (None, metaspace | {"prepend_scheme": "always"}, True, True),
    ]:
        notes: list[str] = []
        assert space_prefix({"normalizer": normalizer, "pre_tokenizer": pre}, notes) == prefix
        assert bool(notes) == noted
    with pytest.raises(UsageError, match="spaces"):
        space_prefix({"normalizer": None, "pre_tokenizer": metaspace | {"split": True, "prepend_scheme": "first"}}, [])
