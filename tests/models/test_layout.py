"""Where parameters lie in files that are named and cut otherwise than the model in memory: read, merged, loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft_adapters import ids
from safetensors.torch import load_file, save_file
from sweep_models import AUTO, write_tiny
from test_architectures import logits
from tiny_run import make_recipe, model_folder, train, write_rows
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, conversion_mapping
from transformers.core_model_loading import Chunk, Interleave, Split, Transpose, WeightConverter, WeightRenaming

from dynlora_cli.adapters.base import find_base
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.merge import into_base
from dynlora_cli.merging.fold import plan_merge, write_merged
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.weights import Weights

SHORT = ("train.max_steps=3", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=1", "eval.steps=3")
# Renamed (gemma3 keeps its prefix of version 4), experts each apart, interleaved, read past their modules.
TYPES = ["gemma3", "gemma3_text", "mixtral", "hy_v3", "inkling2_text", "falcon_h1"]
SEEING = ["llava", "idefics3"]


def parameters_read(folder: Path, auto: type = AutoModelForCausalLM) -> int:
    """How many parameters a layout reads from a folder; all are compared with what transformers loads."""
    model = auto.from_pretrained(folder, dtype=torch.float32)
    weights = Weights(folder)
    layout = Layout(weights, model)
    assert not layout.unknown
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = layout.find(name)
        assert found, name
        torch.testing.assert_close(layout.read(found, weights.read), parameter.detach(), rtol=0, atol=0)
    return len(layout.shapes)


@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_is_found_in_published_files_and_in_files_as_in_memory(kind, tmp_path):
    write_tiny(tmp_path / kind, kind, "causal-lm")
    count = parameters_read(tmp_path / kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert parameters_read(tmp_path / "memory") == count


CUT = {
    "one tensor of three": WeightConverter(
        "self_attn.qkv.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        [Split(dim=0)],
    ),
    "row by row in turns": WeightConverter(
        "mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Interleave(dim=0), Chunk(dim=0)]
    ),
    "the other way round": WeightConverter("attn.out.weight", "self_attn.o_proj.weight", [Transpose(0, 1)]),
    "another name": WeightRenaming(r"transformer\.blocks\.", "model.layers."),
}


@pytest.fixture
def cut_otherwise(monkeypatch):
    """Files of Llamas, as transformers writes and reads them, have none of the tensors of the model in memory."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # the table is made at the first call
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, "llama", [CUT["another name"], *(CUT[name] for name in CUT if name != "another name")])


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["k_proj", "o_proj"]}]
)
def test_the_right_rows_of_the_right_tensors_are_added_to(options, tmp_path, cut_otherwise):
    base = model_folder(tmp_path)
    names = {name for name in Weights(base).entries if ".0." in name and "norm" not in name}
    assert {name.rpartition("blocks.0.")[2] for name in names} == {
        "self_attn.qkv.weight", "mlp.w13.weight", "attn.out.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    parameters_read(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", str(base))
    place = find_base(adapter, str(base))
    (tmp_path / "merged").mkdir()
    write_merged(plan_merge(adapter, place), adapter, place, tmp_path / "merged")
    assert Weights(tmp_path / "merged").entries.keys() == Weights(base).entries.keys()
    with torch.no_grad():
        expected = model.eval()(ids()).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids()).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_a_conversion_that_is_no_exchange_of_rows_is_refused_by_its_name(tmp_path, cut_otherwise, dynlora, monkeypatch):
    base = model_folder(tmp_path)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(
        Split, "convert", lambda self, given, **more: {"self_attn.q_proj.weight": next(iter(given.values()))[0] * 2}
    )
    answer = dynlora("merge", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "merged")
    assert answer.code == 2
    assert "q_proj.weight in a form that cannot be added to: transformers makes it by Split" in answer.err
    assert "merge_and_unload()" in answer.err


def test_names_of_the_time_of_tensorflow(tmp_path):
    """LayerNorm.gamma and .beta, as in the first checkpoints of BERT; its encoder alone, without a prefix."""
    base = model_folder(tmp_path, "bert")
    old = load_file(base / "model.safetensors")
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in old.items():
        for new, before in legacy.items():
            name = name.replace(new, before)
        renamed[name.removeprefix("bert.")] = tensor.clone()
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", labelled=True)
    recipe = make_recipe(tmp_path, "model.task=sequence-classification", f"dataset.train=[{rows}]", *SHORT, kind="bert")
    train(recipe)
    into_base(read_adapter(Path(recipe.output_dir)), tmp_path / "merged")
    added = Weights(tmp_path / "merged").entries.keys() - renamed.keys()
    assert added == {"classifier.weight", "classifier.bias"}
    auto = transformers.AutoModelForSequenceClassification
    _, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_tied_parameter_is_read_from_the_source_and_not_from_a_twin_that_parted(tmp_path):
    """Files of a T5 whose encoder has a table of its own, as a merge writes it."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    for parted in names:
        folder = tmp_path / parted
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {parted: tensors["shared.weight"] + 1}, folder / "model.safetensors", {"format": "pt"})
        layout = Layout(Weights(folder), model)
        assert layout.find(parted) == parted
        assert {layout.find(name) for name in names if name != parted} == {"shared.weight"}


@pytest.mark.filterwarnings(
    "ignore:.*ensure_weight_tying.*:UserWarning", "ignore:.*save_embedding_layers.*:UserWarning"
)
def test_a_head_that_parts_from_its_table_gets_a_name_that_loads(tmp_path):
    """Gemma 3 shares them, and its files call everything otherwise."""
    write_tiny(tmp_path / "base", "gemma3", "causal-lm")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    summary = into_base(read_adapter(tmp_path / "adapter"), tmp_path / "merged", base_name=str(tmp_path / "base"))
    assert summary["untied"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not config["text_config"]["tie_word_embeddings"]
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEING)
def test_a_model_that_sees_is_trained_on_text_and_keeps_its_eyes(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(AUTO, "sees", AutoModelForImageTextToText)
    write_tiny(tmp_path / kind, kind, "sees")
    recipe = make_recipe(tmp_path, *SHORT, kind=kind)
    summary, events = train(recipe)
    assert all(".language_model." in name or ".text_model." in name for name in summary["ranks"])
    assert [note for note in events[0]["notes"] if "what sees or hears beside it stays as it is" in note]
    out = Path(recipe.output_dir)
    assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
    into_base(read_adapter(out), tmp_path / "merged")
    before, after = Weights(tmp_path / kind), Weights(tmp_path / "merged")
    assert before.entries.keys() == after.entries.keys()
    changed = {name for name in before.entries if not torch.equal(before.read(name), after.read(name))}
    assert changed
    assert not any(word in name for name in changed for word in ("vision", "projector", "connector"))
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / kind)
    expected = logits(peft.PeftModel.from_pretrained(base, out))
    found = logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
