"""`train.run` on pictures: what is saved, what stock PEFT and diffusers make of it, and going on bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import picture_recipe, pixel_pipeline, write_pictures
from tiny_run import assembled, train
from transformers import BertModel, BertTokenizerFast

from dynlora_cli.errors import Interrupted
from dynlora_cli.runs import folder as run_folder


def stock_pipeline(folder):
    """The pipeline as its owner has it."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=BertModel.from_pretrained(folder / "text_encoder"),
        tokenizer=BertTokenizerFast.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def said_by(unet):
    chance = torch.Generator().manual_seed(5)
    x, states = (torch.randn(shape, generator=chance) for shape in ((2, 3, 16, 16), (2, 7, 16)))
    with torch.no_grad():
        return unet(x, torch.tensor([20, 700]), states).sample


def test_a_run_prunes_learns_and_loads_in_its_pipeline(tmp_path):
    base = pixel_pipeline(tmp_path)
    summary, _ = train(picture_recipe(tmp_path))
    out = tmp_path / "out"
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert summary["peft_check"]["checked"]
    assert summary["peft_check"]["problem"] is None
    layers = run_folder.read_record(out)["layers"]
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_k", "to_v", "0", "proj", "2"}

    pipe = stock_pipeline(base)
    plain = said_by(pipe.unet)
    pipe.load_lora_weights(str(out))
    loaded = said_by(pipe.unet)
    peft = said_by(PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), str(out)))
    assert (loaded - plain).abs().max() > 0.01
    assert torch.allclose(loaded, peft, atol=1e-6)


def test_the_held_out_loss_of_a_run_is_told_by_bands(tmp_path):
    _, events = train(picture_recipe(tmp_path, "train.max_steps=2"))
    looks = [event for event in events if event["event"] == "eval"]
    bands = [[look[f"loss_band_{number}"] for number in range(4)] for look in looks]
    assert [sum(of_look) / 4 for of_look in bands] == pytest.approx([look["loss"] for look in looks])


def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path):
    overrides = ("train.save_steps=4", "model.flip=true", "model.snr_gamma=5")
    whole, _ = train(picture_recipe(tmp_path, *overrides))
    recipe = picture_recipe(tmp_path, *overrides, out="again")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    summary, _ = train(recipe, resume=True)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert summary["loss_after"] == whole["loss_after"]


def test_one_picture_is_enough(tmp_path):
    write_pictures(tmp_path / "pictures", count=1)
    summary, _ = train(picture_recipe(tmp_path, "train.max_steps=3"))
    assert summary["steps"] == 3
    assert json.loads((tmp_path / "out" / "dynlora.json").read_text())["data"]["train_rows"] == 1


def test_a_row_that_comes_up_often_in_an_epoch_is_another_one_each_time(tmp_path):
    write_pictures(tmp_path / "pictures", count=1)
    rows = "{path: %s, weight: 8}" % (tmp_path / "pictures" / "rows.jsonl")
    run = assembled(picture_recipe(tmp_path, f"dataset.train=[{rows}]", "dataset.val_size=0", "eval.steps=null"))
    epochs = [[run.batches.step(epoch, index) for index in range(2)] for epoch in range(2)]
    drawn = [one.drawn for steps in epochs for step in steps for batch in step for one in batch.examples]
    assert len(drawn) == 16
    assert len({one.noise for one in drawn}) == 16
    assert len({one.timestep for one in drawn}) > 10


def test_pictures_that_are_drawn_on_the_way(tmp_path):
    """At each evaluation, or without held-out rows as often; drawing changes nothing of what is learned."""
    options = ("eval.samples=2", "model.sample_steps=3")
    train(picture_recipe(tmp_path, *options))
    train(picture_recipe(tmp_path, out="silent"))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "silent"))
    assert all(first[name].equal(second[name]) for name in first)
    names = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert names == [f"step-{step:06d}-{number}.png" for step in (0, 6, 12) for number in (1, 2)]
    pictures = [np.asarray(Image.open(tmp_path / "out" / "samples" / name)) for name in names]
    assert pictures[0].shape == (16, 16, 3)
    assert (pictures[0] != pictures[4]).any()
    report = (tmp_path / "out" / "report.html").read_text()
    assert all(f'src="samples/{name}"' in report for name in names)

    _, events = train(picture_recipe(tmp_path, *options, "dataset.val_size=0", "eval.steps=null", out="alone"))
    looks = [event["step"] for event in events if event["event"] == "samples"]
    assert looks == [0, 2, 3, 5, 6, 8, 9, 11, 12]
