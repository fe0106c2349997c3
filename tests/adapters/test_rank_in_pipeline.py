"""A T-LoRA in diffusers' own pipelines, against weights to which its first components were added by hand."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynlora_cli import api
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.timesteps.schedule import Schedule

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
WIDTH = 16


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


def pipeline():
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(**parts, unet=unet(), scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_adapter(folder, schedule, rank=4, *, convolution=False):
    """Random factors on the attentions, ranks not all the same, with a schedule in the metadata."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in unet().named_modules():
        wanted = isinstance(module, torch.nn.Linear) and ".attn" in name
        if not wanted and not (convolution and name.endswith("resnets.0.conv1")):
            continue
        r = rank - schedule.terms if "to_k" in name else rank
        a, b = (r, *module.weight.shape[1:]), (len(module.weight), r, *[1] * (module.weight.ndim - 2))
        tensors[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(a, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(b, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt", **schedule.as_metadata()})
    return tensors


def with_weights(tensors, schedule, timestep):
    """The UNet with its first components added to the weights."""
    model = unet()
    modules = dict(model.named_modules())
    for name, a in tensors.items():
        if "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            r = schedule.rank_at(timestep, len(a))
            module = modules[name.removeprefix("unet.").removesuffix(".lora_A.weight")]
            delta = b[:, :r].flatten(1) @ a[:r].flatten(1)
            module.weight.data += delta.view(module.weight.shape)
    return model


def inputs(rows=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.randn(rows, 5, WIDTH, generator=generator)


@pytest.mark.parametrize("terms", [1, 2])
@torch.no_grad()
def test_each_pass_of_a_sampler_has_the_rank_of_its_timestep(tmp_path, terms):
    plan = Schedule(terms=terms)
    tensors = write_adapter(tmp_path / "a", plan, 4 * terms)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a")
    seen = []
    pipe.unet.register_forward_hook(
        lambda _, args, named, out: seen.append((*args[:2], named["encoder_hidden_states"], out[0])), with_kwargs=True
    )
    text = inputs()[1]
    how = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    how |= {"prompt_embeds": text, "negative_prompt_embeds": 0 * text}
    with api.rank_by_timestep(pipe, tmp_path / "a"):
        masked = pipe(**how, generator=torch.manual_seed(0)).images
    assert [int(t) for _, t, *_ in seen] == [751, 501, 251, 1]
    assert len({plan.rank_at(float(t), 4 * terms) for _, t, *_ in seen}) > 2
    for sample, t, caption, found in seen:
        assert len(sample) == 4, "with and without the caption"
        wanted = with_weights(tensors, plan, float(t))(sample, t, caption)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = pipe(**how, generator=torch.manual_seed(0)).images
    assert not torch.allclose(masked, plain, atol=1e-3)
    wanted = with_weights(tensors, plan, 0)(*seen[4][:2], seen[4][2])[0]
    torch.testing.assert_close(seen[4][3], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_at_different_timesteps_and_convolutions(tmp_path):
    plan = Schedule(power=2.0, min_rank=2)
    tensors = write_adapter(tmp_path / "a", plan, 6, convolution=True)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a")
    sample, caption = inputs()
    with api.rank_by_timestep(pipe.unet, tmp_path / "a" / "pytorch_lora_weights.safetensors"):
        found = pipe.unet(sample, timestep=torch.tensor([30, 900]), encoder_hidden_states=caption)[0]
    for row, t in enumerate((30, 900)):
        wanted = with_weights(tensors, plan, t)(sample[row : row + 1], t, caption[row : row + 1])[0]
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_lines_in_the_docs_do_the_same(tmp_path):
    plan = Schedule(power=1.5, terms=2)
    write_adapter(tmp_path / "a", plan, 8)
    page = (Path(__file__).parents[2] / "docs" / "howto" / "images.md").read_text()
    lines = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "safe_open" in block)
    pipe, (sample, caption) = pipeline(), inputs()
    pipe.load_lora_weights(tmp_path / "a")
    wanted = []
    with api.rank_by_timestep(pipe, tmp_path / "a"):
        wanted = [pipe.unet(sample, t, caption)[0] for t in (0, 333, 999)]
    exec(lines.replace("out/dog", str(tmp_path / "a")), {"pipe": pipe})
    for t, one in zip((0, 333, 999), wanted, strict=True):
        torch.testing.assert_close(pipe.unet(sample, t, caption)[0], one)


def test_nothing_is_left_behind_even_after_an_error(tmp_path):
    write_adapter(tmp_path / "a", Schedule())
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a")
    before = copy.deepcopy(pipe.unet)
    with pytest.raises(ValueError, match="mine"), api.rank_by_timestep(pipe, tmp_path / "a"):
        raise ValueError("mine")
    assert not pipe.unet._forward_pre_hooks
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), before.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter two was active")
def test_what_is_not_there_is_said(tmp_path):
    write_adapter(tmp_path / "a", Schedule())
    pipe = pipeline()
    with pytest.raises(UsageError, match="has not loaded the adapter: it holds none"), api.rank_by_timestep(pipe, tmp_path / "a"):  # fmt: skip
        pass
    pipe.load_lora_weights(tmp_path / "a", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "a", adapter_name="two")
    with pytest.raises(UsageError, match="several adapters: one, two"), api.rank_by_timestep(pipe, tmp_path / "a"):
        pass
    with api.rank_by_timestep(pipe, tmp_path / "a", "two"):
        pass
    with pytest.raises(UsageError, match="it holds one, two"), api.rank_by_timestep(pipe, tmp_path / "a", "three"):
        pass
    pipe.delete_adapters("two")
    pipe.fuse_lora()
    with pytest.raises(UsageError, match="is fused into the weights"), api.rank_by_timestep(pipe, tmp_path / "a"):
        pass
    file = tmp_path / "plain.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(UsageError, match="holds no rank by timestep"), api.rank_by_timestep(pipe, file):
        pass
    with pytest.raises(UsageError, match="is no adapter of a pipeline"), api.rank_by_timestep(pipe, tmp_path / "none"):
        pass
