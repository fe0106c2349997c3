"""Prior preservation: what is drawn, what is learned of it, and that a run which goes on has the same pictures."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from latent_pipelines import write_pipeline
from PIL import Image
from safetensors.torch import load_file
from test_denoising_loss import stock
from tiny_pipeline import picture_recipe, write_pictures
from tiny_run import assembled, train
from torch.nn import functional as F

from dynlora_cli.errors import DataError, Interrupted, RecipeError, UsageError
from dynlora_cli.runs.folder import read_record
from dynlora_cli.tasks.images import prior
from dynlora_cli.tasks.task import Beginning
from dynlora_cli.training.before.prepare import prepare

DOG = "a dog"
PRIOR = (f"model.prior_caption={DOG}", "model.prior_pictures=3", "model.sample_steps=3")


def levels(folder):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3"])
def test_what_is_drawn_is_what_the_bare_pipeline_draws(tmp_path, kind):
    """In batches of two, though adapters that do something are on the model."""
    write_pictures(tmp_path / "pictures", size=(16, 16))
    recipe = picture_recipe(tmp_path, *PRIOR, "model.guidance=3", "seed=7", base=write_pipeline(kind, tmp_path))
    (tmp_path / "out").mkdir()
    prepare(assembled(recipe))
    pipe = stock(tmp_path, kind)
    makers = [torch.Generator().manual_seed(7 * 1_000_003 + place) for place in range(3)]
    size = (8 if kind == "sd3" else 4, 8, 8)
    noise = torch.stack([torch.randn(size, generator=maker) for maker in makers])
    more = {"latents": noise, "height": 16, "width": 16, "output_type": "np", "num_inference_steps": 3}
    wanted = pipe([DOG] * 3, guidance_scale=3.0, generator=makers, **more).images
    found = levels(tmp_path / "out" / "prior")
    assert abs(found - wanted * 255).max() <= 1
    assert (found[0] != found[1]).any()


def first_batch(folder, *overrides):
    """A batch of four rows of Stable Diffusion, a prior beside each, with its loss; the stock pipeline."""
    write_pictures(folder / "pictures", size=(16, 16))
    base = write_pipeline("sd", folder)
    recipe = picture_recipe(folder, *PRIOR, "train.micro_batch_size=4", "model.flip=true", *overrides, base=base)
    run = assembled(recipe, fill=False)
    (folder / "out").mkdir()
    prepare(run)
    batch = run.batches.step(0, 0)[0]
    return run, batch, run.objective.loss(run.model, batch) / batch.supervised, stock(folder, "sd")


def losses_by_hand(pipe, batch, captions):
    """Of every line the mean squared error as diffusers' scripts compute it, and its timestep."""
    plain = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    lines = [*batch.examples, *(one.beside for one in batch.examples)]
    pixels = [np.asarray(Image.open(one.picture.content).convert("RGB")) for one in lines]
    turned = [one[:, ::-1] if line.drawn.mirrored else one for one, line in zip(pixels, lines, strict=True)]
    x = torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    noise, t = batch.extra["noise_BCHW"], batch.extra["timestep_B"].long()
    states, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    said = pipe.unet(plain.add_noise(latents, noise, t), t, states).sample
    return F.mse_loss(said, noise, reduction="none").mean((1, 2, 3)), compute_snr(plain, t)


@torch.no_grad()
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_the_rows_and_weight_times_that_of_the_prior(tmp_path, gamma):
    """As diffusers' scripts put the two halves of a batch together; min-SNR is for the first alone."""
    more = [f"model.snr_gamma={gamma}"] if gamma else []
    _, batch, loss, pipe = first_batch(tmp_path, "model.caption_dropout=0", "model.prior_weight=0.7", *more)
    captions = [one.caption for one in batch.examples] + [DOG] * 4
    loss_L, snr_L = losses_by_hand(pipe, batch, captions)
    own, beside = loss_L.chunk(2)
    if gamma:
        own = own * snr_L[:4].clamp(max=gamma) / snr_L[:4]
    assert batch.supervised == 4
    assert len(set(batch.extra["timestep_B"].tolist())) > 4, "each line has a timestep of its own"
    assert loss.item() == pytest.approx((own.mean() + 0.7 * beside.mean()).item(), rel=1e-5)


@torch.no_grad()
def test_a_prior_keeps_its_caption_and_is_not_mirrored(tmp_path):
    _, batch, loss, pipe = first_batch(tmp_path, "model.caption_dropout=1")
    own, beside = losses_by_hand(pipe, batch, [""] * 4 + [DOG] * 4)[0].chunk(2)
    assert loss.item() == pytest.approx((own.mean() + beside.mean()).item(), rel=1e-5)
    assert any(one.drawn.mirrored for one in batch.examples)


def test_rows_are_learned_and_measured_as_without_a_prior(tmp_path):
    """The same timesteps and noise of the rows; the held-out loss is of the user's rows alone."""
    run = assembled(picture_recipe(tmp_path, *PRIOR))
    (tmp_path / "out").mkdir()
    before, held_out = run.batches.step(0, 1)[0], run.val_batches.step(0, 0)[0]
    with torch.no_grad():
        first = held_out.judge.numbers(run.model, before)["loss"]
        prepare(run)
        after = run.batches.step(0, 1)[0]
        assert torch.equal(held_out.judge.numbers(run.model, after)["loss"], first)
    assert len(after.extra["timestep_B"]) == 2 * len(before.extra["timestep_B"])
    for name, rows in before.extra.items():
        if not name.startswith("none."):
            assert torch.equal(after.extra[name][: len(rows)], rows), name
    assert all(one.beside is None for one in run.val_batches.step(0, 0)[0].examples)


@pytest.mark.parametrize("variant", ["lora", "t-lora"])
def test_a_run_that_goes_on_draws_nothing_and_is_the_uninterrupted_one(tmp_path, monkeypatch, variant):
    overrides = (*PRIOR, "train.save_steps=4", f"adapter.variant={variant}")
    whole, events = train(picture_recipe(tmp_path, *overrides))
    recipe = picture_recipe(tmp_path, *overrides, out="again")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    monkeypatch.setattr(prior, "drawn", None)
    again, _ = train(recipe, resume=True)
    first, second = adapter_of(tmp_path / "out"), adapter_of(tmp_path / "again")
    assert all(first[name].equal(second[name]) for name in first)
    assert again["loss_after"] == whole["loss_after"]
    assert (levels(tmp_path / "out" / "prior") == levels(tmp_path / "again" / "prior")).all()
    assert any("prior pictures drawn: 3, in" in event.get("text", "") for event in events)

    branch = picture_recipe(tmp_path, *overrides, out="branch")
    train(branch, resume_from=tmp_path / "again" / "checkpoints" / "step-4")
    third = adapter_of(tmp_path / "branch")
    assert all(first[name].equal(third[name]) for name in first)


def test_several_processes_draw_the_same_pictures(tmp_path):
    recipe = picture_recipe(tmp_path, *PRIOR, "model.prior_pictures=5")
    run = assembled(recipe)
    (tmp_path / "out").mkdir()
    prepare(run)
    alone = levels(tmp_path / "out" / "prior")
    (tmp_path / "two").mkdir()
    begins = Beginning(
        model=run.model, tokenizer=run.base.tokenizer, examples=run.batches.examples, folder=tmp_path / "two", seed=0,
        rows=2, part=(0, 2), goes_on=False,
    )  # fmt: skip
    with run.trained.switched_off():
        both = zip(run.task.prepare(begins), run.task.prepare(replace(begins, part=(1, 2))), strict=True)
        assert [one[1:] for one, _ in both] == [(0, 5), (4, 5), (5, 5), (5, 5)]
    assert (levels(tmp_path / "two" / "prior") == alone).all()


def test_a_caption_that_would_be_cut_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model\.prior_caption: 26 tokens, and the pipeline reads 16"):
        train(picture_recipe(tmp_path, *PRIOR, f"model.prior_caption={'dog' * 8}"))


def test_it_is_on_record_and_in_report_and_card(tmp_path):
    without = picture_recipe(tmp_path, "train.max_steps=3", out="without")
    train(without)
    train(picture_recipe(tmp_path, *PRIOR, "train.max_steps=3"))
    out = tmp_path / "out"
    assert read_record(out)["data"]["prior"] == {"caption": DOG, "pictures": 3, "weight": 1.0}
    report, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert 'src="prior/000002.png"' in report
    assert "3 pictures of &quot;a dog&quot;" in report
    assert '3 pictures of "a dog"' in card
    assert "prior/" not in (tmp_path / "without" / "report.html").read_text()
    assert "Prior preservation" not in (tmp_path / "without" / "README.md").read_text()
    assert not (tmp_path / "without" / "prior").exists()
    first, second = adapter_of(out), adapter_of(tmp_path / "without")
    assert any(not first[name].equal(second[name]) for name in first), "it is learned"


@pytest.mark.parametrize("change", ["lost", "other", "list"])
def test_a_picture_that_is_not_as_it_was_drawn_is_named(tmp_path, change):
    recipe = picture_recipe(tmp_path, *PRIOR, "train.save_steps=4")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    home = tmp_path / "out" / "prior"
    file = home / ("prior.json" if change == "list" else "000001.png")
    if change == "other":
        file.write_bytes((home / "000000.png").read_bytes())
    else:
        file.unlink()
    with pytest.raises((UsageError, DataError), match=file.name):
        train(recipe, resume=True)


def test_a_stop_while_it_draws_leaves_the_run_that_was_there(tmp_path, monkeypatch):
    train(picture_recipe(tmp_path, "train.max_steps=2"))
    first = adapter_of(tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        train(picture_recipe(tmp_path, *PRIOR))
    draw = prior.drawn

    def stopped(*args, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return draw(*args, **named)

    monkeypatch.setattr(prior, "drawn", stopped)
    with pytest.raises(Interrupted, match="prior pictures drawn: 2 of 3"):
        train(picture_recipe(tmp_path, *PRIOR), overwrite=True)
    second = adapter_of(tmp_path / "out")
    assert all(first[name].equal(second[name]) for name in first)
    assert not (tmp_path / "out" / "prior").exists()


def test_a_dry_run_says_what_will_be_drawn(tmp_path, dynlora):
    picture_recipe(tmp_path)
    path, more = tmp_path / "out.yaml", [word for override in PRIOR for word in ("--set", override)]
    done = dynlora("train", path, "--dry-run", "--json", *more, "--set", "model.sample_steps=40")
    assert done.code == 0, done.err
    notes = " ".join(done.json["plan"]["notes"])
    assert "3 pictures of 'a dog', 40 steps each" in notes
    assert (
        "about as long as 12 steps of training" in notes
    )  # 3 x 40 x 2 passes; 2.5 for each of 4 rows and their priors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("model.prior_caption=null", "model.prior_pictures=5"), "model.prior_pictures.*write the class"),
        (("model.prior_caption=null", "model.prior_pictures=100", "model.prior_weight=2"), "model.prior_weight"),
        (("model.prior_caption=''",), "model.prior_caption.*empty"),
        (("model.prior_pictures=0",), "model.prior_pictures"),
        (("model.prior_weight=0",), "model.prior_weight"),
        (("model.prior_weight=.nan",), "model.prior_weight"),
        (("pruning.policy=retrieval",), "retrieval looks at single rows"),
        (("class_prompt=a dog",), "model.prior_caption"),
    ],
)
def test_wrong_values_are_named(tmp_path, changed, says):
    with pytest.raises(RecipeError, match=says):
        picture_recipe(tmp_path, *PRIOR, *changed)
