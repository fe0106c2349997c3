"""`dynlora export --to diffusers` and `--to kohya`: each loaded by diffusers, as the pipeline's own loader does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from pipelines import as_kohya, largest_difference, save_lora, with_lora, with_sum
from safetensors.torch import load_file, save_file

from dynlora_cli.adapters.images import by_diffusers
from dynlora_cli.adapters.images.kohya_names import LAYERS_PER_BLOCK, Style, layer_of, name_of
from dynlora_cli.adapters.read import read_adapter

if TYPE_CHECKING:
    from cli_helpers import Dynlora

CLOSE = 1e-4
OWN = {"ranks": {"to_q": 2, "conv1": 3}, "alphas": {"to_k": 1, "fc1": 7}}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_there_and_back(kind: str, tmp_path: Path, dynlora: Dynlora):
    """diffusers to kohya to diffusers: the pipeline gives the same each time."""
    file = save_lora(kind, tmp_path / "lora", alpha=6, **OWN)
    expected = with_lora(kind, file)
    done = dynlora("export", "--adapter", file, "--to", "kohya", "--out", tmp_path / "kohya", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    theirs = tmp_path / "kohya" / "lora.safetensors"
    assert summary["file"] == theirs.name
    assert summary["peft_check"]["diffusers"]
    assert any("input_blocks_4_1_" in name for name in load_file(theirs)) is (kind == "sdxl")
    assert any(name.startswith("lora_te1_") for name in load_file(theirs)) is (kind == "sdxl")
    assert largest_difference(with_lora(kind, theirs), expected) < CLOSE
    done = dynlora("export", "--adapter", theirs, "--to", "diffusers", "--out", tmp_path / "back")
    assert done.code == 0, done.err
    assert largest_difference(with_lora(kind, tmp_path / "back" / file.name), expected) < CLOSE


def test_the_names_of_the_unet_may_be_chosen(tmp_path: Path, dynlora: Dynlora):
    file = save_lora("sdxl", tmp_path / "lora")
    done = dynlora(
        "export",
        "--adapter",
        file,
        "--to",
        "kohya",
        "--set",
        "names=diffusers",
        "--dtype",
        "bf16",
        "--out",
        tmp_path / "o",
    )
    assert done.code == 0, done.err
    tensors = load_file(tmp_path / "o" / "lora.safetensors")
    assert any("lora_unet_down_blocks_1_attentions_0_" in name for name in tensors)
    assert {t.dtype for name, t in tensors.items() if not name.endswith("alpha")} == {torch.bfloat16}


def test_a_transformer_has_no_kohya_names(tmp_path: Path, dynlora: Dynlora):
    file = save_lora("dit", tmp_path / "lora")
    done = dynlora("export", "--adapter", file, "--to", "kohya", "--out", tmp_path / "o")
    assert done.code == 2
    assert "which kohya's files have no name for" in " ".join(done.err.split())
    assert not (tmp_path / "o").exists()


def test_exporters_of_language_models_refuse_it(tmp_path: Path, dynlora: Dynlora):
    file = save_lora("sd", tmp_path / "lora")
    for to in ("peft", "gguf", "vllm", "packed", "merged"):
        done = dynlora("export", "--adapter", file, "--to", to, "--out", tmp_path / "o")
        assert done.code == 2
        assert "use --to diffusers or --to kohya" in done.err


def test_what_diffusers_would_read_otherwise_is_found(tmp_path: Path):
    """Kohya's alphas that differ between layers: diffusers 0.42 looks them up by names that no layer has."""
    source = save_lora("sd", tmp_path / "lora", ranks={"to_q": 2})
    theirs = as_kohya(source, tmp_path / "a.safetensors", {"unet": "lora_unet_", "text_encoder": "lora_te_"})
    adapter = read_adapter(theirs, images=True)
    found = by_diffusers.loaded(theirs, adapter)
    assert found is not None
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert adapter.layers[name].scale == 1.0
    assert found[name].scale == 2.0, "diffusers finds these alphas now: one alpha for all layers is needed no more"


# The layers of SD XL's UNet, whose attentions are in blocks 1 and 2, by the rules of its two sets of names.
XL = {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj": "middle_block_1_transformer_blocks_3_ff_net_0_proj",
    "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "conv_out": "out_2",
}


@pytest.mark.parametrize(("ours", "theirs"), XL.items())
def test_stabilitys_names(ours: str, theirs: str):
    assert name_of(f"unet.{ours}", Style(sgm=True)) == f"lora_unet_{theirs}"
    assert layer_of(f"lora_unet_{theirs}") == f"unet.{ours}"
    assert layer_of(name_of(f"unet.{ours}", Style())) == f"unet.{ours}"


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_3_1_proj_in",  # there is a sampling layer
        f"lora_unet_input_blocks_{LAYERS_PER_BLOCK}_0_op",
        "lora_unet_output_blocks_2_0_conv",
        "lora_unet_middle_block_0_proj",
        "lora_unet_down_blocks__0",
        "lora_unet_",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj_",
        "lora_te3_text_model",
    ],
)
def test_names_that_no_layer_has(name: str):
    assert layer_of(name) is None


def test_a_run_goes_to_kohya_and_comes_back_from_prune(tmp_path: Path, dynlora: Dynlora):
    """A text-to-image run, whose own files name layers by the denoiser alone; pruned, it has both files again."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
    from tiny_pipeline import picture_recipe

    from dynlora_cli.commands import train

    recipe = picture_recipe(tmp_path)
    train.run(recipe)
    run = Path(recipe.output_dir)
    done = dynlora("export", "--adapter", run, "--to", "kohya", "--out", tmp_path / "kohya")
    assert done.code == 0, done.err
    (file,) = (tmp_path / "kohya").glob("*.safetensors")
    ours, theirs = read_adapter(run), read_adapter(file, images=True)
    assert {f"unet.{name}" for name in ours.layers} == theirs.layers.keys()
    for name, factors in ours.layers.items():
        assert torch.allclose(theirs.layers[f"unet.{name}"].delta_OI(), factors.delta_OI(), atol=1e-6)
    done = dynlora(
        "prune",
        "--adapter",
        run,
        "--policy",
        "magnitude",
        "--budget",
        "0.5",
        "--no-measure",
        "--out",
        tmp_path / "half",
    )
    assert done.code == 0, done.err
    beside = read_adapter(tmp_path / "half" / "pytorch_lora_weights.safetensors", images=True)
    assert beside.parameters == read_adapter(tmp_path / "half").parameters < ours.parameters


def _with_layers(file: Path, out: Path, kept: tuple[str, ...]) -> Path:
    """The file with those layers of the text encoder alone, and all of the UNet."""
    out.mkdir()
    tensors = load_file(file)
    tensors = {key: t for key, t in tensors.items() if key.startswith("unet.") or any(name in key for name in kept)}
    save_file(tensors, out / file.name)
    return out / file.name


def test_a_text_encoder_without_attention_layers_is_loaded(tmp_path: Path, dynlora: Dynlora):
    """diffusers finds out by the names of attention layers how a file names its factors."""
    file = _with_layers(save_lora("sd", tmp_path / "lora"), tmp_path / "few", ("fc1", "fc2"))
    done = dynlora("export", "--adapter", file, "--to", "diffusers", "--out", tmp_path / "o", "--json")
    assert done.code == 0, done.err
    assert done.json["peft_check"]["checked"]
    ours = tmp_path / "o" / file.name
    assert largest_difference(with_lora("sd", ours), with_sum("sd", read_adapter(file, images=True).layers)) < CLOSE
    assert read_adapter(ours, images=True).ranks == read_adapter(file, images=True).ranks


def test_what_diffusers_does_not_read_of_kohyas_form_is_said(tmp_path: Path, dynlora: Dynlora):
    """It leaves out attention layers of a text encoder that has no out_proj, without a word."""
    file = _with_layers(save_lora("sd", tmp_path / "lora"), tmp_path / "few", ("k_proj", "fc1"))
    done = dynlora("export", "--adapter", file, "--to", "kohya", "--out", tmp_path / "o")
    assert done.code == 0, done.err
    assert "diffusers does not read all of few.safetensors" in " ".join(done.err.split())
    ours = tmp_path / "o" / "few.safetensors"
    assert largest_difference(with_lora("sd", ours), with_lora("sd", file)) > CLOSE
    assert read_adapter(ours, images=True).ranks == read_adapter(file, images=True).ranks
