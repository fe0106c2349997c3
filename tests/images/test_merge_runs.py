"""`dynlora merge` of a text-to-image run into the pipeline that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_pipeline import picture_recipe, pixel_pipeline
from tiny_run import train

if TYPE_CHECKING:
    from cli_helpers import Dynlora

CLOSE = 1e-4
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its pipeline is `pixel` beside it."""
    folder = tmp_path_factory.mktemp("run")
    train(picture_recipe(folder))
    return folder / "out"


def drawn(unet: torch.nn.Module) -> torch.Tensor:
    chance = torch.Generator().manual_seed(5)
    x, states = (torch.randn(shape, generator=chance) for shape in ((2, 3, 16, 16), (2, 7, 16)))
    with torch.no_grad():
        return unet(x, torch.tensor([20, 700]), states)[0]


def test_a_run_finds_its_pipeline(run: Path, tmp_path: Path, dynlora: Dynlora):
    """Against PEFT with the same run; the text encoder is copied."""
    base = pixel_pipeline(run.parent)
    done = dynlora("merge", "--adapter", run, "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.json["base_model"] == str(base.resolve())
    plain = UNet2DConditionModel.from_pretrained(base / "unet")
    merged = drawn(UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet"))
    assert (merged - drawn(plain)).abs().max() > 0.01
    assert (merged - drawn(PeftModel.from_pretrained(plain, str(run)))).abs().max() < CLOSE
    same = "text_encoder/model.safetensors"
    assert (tmp_path / "merged" / same).read_bytes() == (base / same).read_bytes()


def test_a_run_and_a_file_go_in_together(run: Path, tmp_path: Path, dynlora: Dynlora):
    """The file says nothing of its base."""
    file = tmp_path / "pytorch_lora_weights.safetensors"
    name = "unet.conv_in"
    save_file(
        {f"{name}.lora_A.weight": torch.randn(2, 3, 3, 3), f"{name}.lora_B.weight": torch.randn(8, 2, 1, 1)}, file
    )
    words = ("--adapter", run, "--adapter", file, "--weights", "2,1", "--into", "base", "--out", tmp_path / "out")
    done = dynlora("merge", *words, "--json")
    assert done.code == 0, done.err
    alone = dynlora("merge", "--adapter", run, "--weights", "2", "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    both, one = (load_file(tmp_path / each / "unet" / WEIGHTS) for each in ("out", "alone"))
    assert [key for key in both if not torch.allclose(both[key], one[key], atol=1e-6)] == ["conv_in.weight"]


def test_another_pipeline_than_that_of_the_run_is_refused(run: Path, tmp_path: Path, dynlora: Dynlora):
    """Its shapes are the same, and its numbers differ."""
    other = pixel_pipeline(tmp_path)
    weights = load_file(other / "unet" / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "unet" / WEIGHTS, {"format": "pt"})
    done = dynlora("merge", "--adapter", run, "--base", other, "--out", tmp_path / "out")
    assert done.code == 2
    assert "is not the model that" in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_a_run_on_the_built_in_pipeline_finds_it(tmp_path: Path, dynlora: Dynlora):
    """Its folder lies elsewhere on every machine."""
    train(picture_recipe(tmp_path, "model.name_or_path=builtin:tiny-image", "train.max_steps=2", "pruning.events=1"))
    done = dynlora("merge", "--adapter", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["output_dir"] == str(tmp_path / "out" / "merged")
    base = Path(done.json["base_model"]) / "unet"
    wrapped = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base).float(), str(tmp_path / "out"))
    merged = load_file(tmp_path / "out" / "merged" / "unet" / WEIGHTS)
    expected = wrapped.merge_and_unload().state_dict()
    as_stored = {"rtol": 2.0**-10, "atol": 1e-7}  # in fp16
    assert all(torch.allclose(merged[name].float(), tensor, **as_stored) for name, tensor in expected.items())
    assert any(
        not torch.allclose(merged[name], tensor, **as_stored) for name, tensor in load_file(base / WEIGHTS).items()
    )


def test_a_pipeline_that_is_gone_is_asked_for(run: Path, tmp_path: Path, dynlora: Dynlora):
    base = pixel_pipeline(run.parent)
    base.rename(base.parent / "moved")
    try:
        done = dynlora("merge", "--adapter", run, "--out", tmp_path / "out")
    finally:
        (base.parent / "moved").rename(base)
    assert done.code == 3
    assert "say where it is with --base FOLDER" in " ".join(done.err.split())
