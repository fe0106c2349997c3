"""`train.run` of variant t-lora: the masks hold in the loss, in what is saved, and in a run that goes on."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tiny_pipeline import picture_recipe, pixel_pipeline, write_pictures
from tiny_run import train

from dynlora_cli import api
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.images.by_timestep import at_step
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import Interrupted, RecipeError
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.runs.folder import read_record
from dynlora_cli.tasks.images.pipeline import Pipeline
from dynlora_cli.tasks.images.sampling import sample
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.setup import read_base, read_data

TLORA = ("adapter.variant=t-lora", "train.save_steps=4")
CPU = torch.device("cpu")
STARTS = ["adapter.start=vanilla", "adapter.start=orthogonal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t_lora")
    pixel_pipeline(folder, num_train_timesteps=500)
    write_pictures(folder / "pictures")
    return folder


def held_out_of(recipe, adapter):
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    rows = make_batches(recipe, data.val, base, shuffle=False)
    with attached(base.model, adapter):
        return held_out(base.model, (b for index in range(rows.steps_per_epoch) for b in rows.step(0, index)))["loss"]


@pytest.mark.parametrize("start", STARTS)
def test_a_run_is_pruned_from_the_end_and_its_folder_computes_what_it_computed(folder, start):
    recipe = picture_recipe(folder, *TLORA, start, out=start)
    summary, _ = train(recipe)
    out = folder / start
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert summary["loss_after"] < summary["loss_before"]
    adapter = read_adapter(out)
    assert adapter.form == "t-lora"
    assert adapter.schedule.timesteps == 500
    assert len(set(adapter.ranks.values())) > 1, "layers differ in rank"
    assert held_out_of(recipe, adapter) == pytest.approx(summary["loss_after"], rel=1e-5)
    assert held_out_of(recipe, at_step(adapter, 0)) != pytest.approx(summary["loss_after"], rel=1e-4)
    assert read_record(out)["rank_by_timestep"] == adapter.schedule.as_dict()
    beside = read_adapter(out / "pytorch_lora_weights.safetensors", images=True)
    assert beside.schedule == adapter.schedule
    assert beside.parameters == adapter.parameters


class ByHand(torch.nn.Module):
    """A denoiser that has at each timestep the plain LoRA of that timestep."""

    def __init__(self, model, adapter):
        super().__init__()
        self.model, self.adapter, self.seen = model, adapter, []
        self.device, self.dtype = model.device, model.dtype

    def forward(self, sample, timestep, **given):
        t = float(timestep[0])
        self.seen.append(self.adapter.schedule.rank_at(t, 8))
        with attached(self.model, at_step(self.adapter, t)):
            return self.model(sample=sample, timestep=timestep, **given)


def test_pictures_are_drawn_with_the_rank_of_each_step(folder):
    recipe = picture_recipe(folder, *TLORA, "train.max_steps=6", "rank.budget=4", out="drawn")
    train(recipe)
    adapter = read_adapter(folder / "drawn")
    pipeline = Pipeline(folder / "pixel")
    model = read_base(
        recipe, files := BaseFiles.find(recipe.model), read_data(recipe, files), CPU, plan(recipe.train)
    ).model
    by_hand, how = ByHand(model, adapter), {"steps": 4, "guidance": 3.0, "seed": 1}
    wanted = sample(pipeline, by_hand, ["a red box"], **how).astype(int)
    with attached(model, adapter):
        found = sample(pipeline, model, ["a red box"], **how).astype(int)
    with attached(model, at_step(adapter, 0)):
        all_of_it = sample(pipeline, model, ["a red box"], **how).astype(int)
    assert len(set(by_hand.seen)) > 1
    assert abs(found - wanted).max() <= 1
    assert abs(all_of_it - wanted).max() > 1


@pytest.mark.parametrize("more", ["adapter.start=orthogonal", "adapter.schedule=random"])
def test_a_run_that_goes_on_is_the_uninterrupted_one(folder, more):
    whole, _ = train(picture_recipe(folder, *TLORA, more, out=f"whole-{more}"))
    recipe = picture_recipe(folder, *TLORA, more, out=f"again-{more}")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    summary, _ = train(recipe, resume=True)
    first, second = (load_file(folder / f"{name}-{more}" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert summary["loss_after"] == whole["loss_after"]


def test_merged_at_a_timestep_the_pipeline_is_what_it_was_at_that_timestep(folder, dynlora):
    train(picture_recipe(folder, *TLORA, "train.max_steps=4", "rank.budget=4", out="merged"))
    out, pixel = folder / "merged", folder / "pixel"
    done = dynlora("merge", "--adapter", out, "--base", pixel, "--out", folder / "at", "--at-step", "200")
    assert done.code == 0, done.err
    chance = torch.Generator().manual_seed(3)
    x, states = (torch.randn(shape, generator=chance) for shape in ((2, 3, 16, 16), (2, 7, 16)))
    unet = UNet2DConditionModel.from_pretrained(pixel / "unet")
    unet.load_lora_adapter(str(out), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    with torch.no_grad():
        with api.rank_by_timestep(unet, out):
            wanted = unet(x, 200, states)[0]
        found = UNet2DConditionModel.from_pretrained(folder / "at" / "unet")(x, 200, states)[0]
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(unet(x, 200, states)[0], wanted, atol=1e-4)


def test_a_library_of_language_models_does_not_take_it(folder, dynlora):
    train(picture_recipe(folder, "train.max_steps=1", out="plain"))
    done = dynlora("library", "add", folder / "library", "--adapter", folder / "plain")
    assert done.code == 2
    assert "is for text-to-image, and a library finds updates by texts" in " ".join(done.err.split())
    assert not (folder / "library").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("model.task=causal-lm", "model.name_or_path=builtin:tiny"), "models of texts have none"),
        (("train.compile=true",), "the components in use change in each pass"),
        (("adapter.min_rank=-1",), "adapter.min_rank"),
        (("adapter.schedule=upwards",), "falling"),
        (("adapter.power=0",), "adapter.power"),
        (("rank.elastic=true",), "has an order of its own"),
        (("adapter.start=orthogonal", "rank.init=1", "rank.budget=3"), "below the budget 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(folder, changed, says):
    with pytest.raises(RecipeError, match=says):
        picture_recipe(folder, *TLORA, *changed, out="refused")
