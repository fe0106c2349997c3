"""Tiny pipelines of diffusers with random weights, LoRAs on them, and files of kohya's form, for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
WIDTH = 16  # of the texts' vectors


def unet(*, xl: bool = False) -> nn.Module:
    """A UNet in two blocks each way; `xl`: as of SD XL, whose attentions are linear and several deep."""
    more: dict[str, Any] = {}
    if xl:
        more = {
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        }
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D" if xl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if xl else "CrossAttnUpBlock2D"),
        cross_attention_dim=2 * WIDTH if xl else WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    ).eval()


def encoder(*, projected: bool = False) -> nn.Module:
    """A CLIP text encoder in two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def stable_diffusion() -> Any:
    """A pipeline as of SD 1.5, without a VAE and a tokenizer."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=encoder(), tokenizer=None, unet=unet(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    """A pipeline as of SD XL, without a VAE and tokenizers."""
    return diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=encoder(), text_encoder_2=encoder(projected=True), tokenizer=None, tokenizer_2=None,
        unet=unet(xl=True), scheduler=diffusers.DDPMScheduler(clip_sample=False), add_watermarker=False,
    )  # fmt: skip


def flux() -> Any:
    """A pipeline with a diffusion transformer, as of FLUX."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoder(), tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "dit": flux}
TARGETS: dict[str, dict[str, list[str]]] = {
    "sd": {"unet": [*ATTENTION, "proj_in", "ff.net.0.proj", "ff.net.2", *CONVOLUTIONS], "text_encoder": ENCODER},
    "sdxl": {
        "unet": [*ATTENTION, "proj_in", "proj_out", "ff.net.2", *CONVOLUTIONS],
        "text_encoder": ENCODER,
        "text_encoder_2": ENCODER,
    },
    "dit": {"transformer": [*ATTENTION, "add_q_proj", "ff.net.2", "proj_mlp", "proj_out"], "text_encoder": ENCODER},
}


def pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline, the same for the same seed."""
    torch.manual_seed(seed)
    return PIPELINES[kind]()


def save_lora(
    kind: str, folder: Path, *, rank: int = 4, alpha: float = 4, seed: int = 1, dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] = {}, alphas: Mapping[str, int] = {},
) -> Path:  # fmt: skip
    """Put a random LoRA on a pipeline, and have diffusers save it; returns the file.

    `ranks` and `alphas` are of layers whose names end so.
    """
    from diffusers.training_utils import _collate_lora_metadata

    pipe = pipeline(kind)
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    trained = {}
    for part, targets in TARGETS[kind].items():
        module = getattr(pipe, part)
        wrapped = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            init_lora_weights=False,
            rank_pattern={key: value for key, value in ranks.items() if key in targets},
            alpha_pattern={key: value for key, value in alphas.items() if key in targets},
        )
        module.add_adapter(wrapped)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = (0.3 * torch.randn_like(parameter)).to(dtype).float()
        layers[f"{part}_lora_layers"] = {
            name: tensor.to(dtype) for name, tensor in peft.get_peft_model_state_dict(module).items()
        }
        trained[part] = module
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(trained))
    return folder / "pytorch_lora_weights.safetensors"


def outputs(pipe: Any) -> dict[str, Tensor]:
    """What every part of a pipeline with a LoRA gives for the same inputs."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(2, 50, (2, 8), generator=generator)
    found = {}
    with torch.no_grad():
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, part, None) is not None:
                found[part] = getattr(pipe, part)(ids)[0]
        if getattr(pipe, "unet", None) is not None:
            width = pipe.unet.config.cross_attention_dim
            own: dict[str, Any] = {}
            if pipe.unet.config.addition_embed_type:
                own["added_cond_kwargs"] = {"text_embeds": random(2, WIDTH), "time_ids": random(2, 6)}
            found["unet"] = pipe.unet(random(2, 4, 8, 8), torch.tensor([3, 700]), random(2, 8, width), **own)[0]
        else:
            found["transformer"] = pipe.transformer(
                hidden_states=random(2, 6, 4), encoder_hidden_states=random(2, 8, WIDTH),
                pooled_projections=random(2, WIDTH), timestep=torch.tensor([0.1, 0.7]), img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(8, 3),
            )[0]  # fmt: skip
    return found


def with_lora(kind: str, file: Path) -> dict[str, Tensor]:
    """What a pipeline gives with a file as diffusers loads it; nothing of the file may be left over."""
    pipe = pipeline(kind)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return outputs(pipe)


def with_sum(kind: str, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a pipeline gives with ΔW added to its weights, of `Adapter.layers`; the oracle without any loader."""
    pipe = copy.deepcopy(pipeline(kind))
    for name, factors in layers.items():
        part, _, path = name.partition(".")
        module = getattr(pipe, part)
        names = dict(module.named_modules())
        layer = names[path if path in names else path.removeprefix("text_model.")]
        layer.weight.data += factors.delta_OI().reshape(layer.weight.shape)
    return outputs(pipe)


def kohya_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A file as kohya's scripts write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata=dict(metadata or {})
    )
    return file


def as_kohya(source: Path, file: Path, prefixes: Mapping[str, str], *, alpha: float | None = None) -> Path:
    """A LoRA of diffusers' in kohya's form, its names made by the rule of kohya's scripts: every dot an underscore."""
    found: dict[str, Tensor] = {}
    for key, tensor in load_file(source).items():
        name, _, leaf = key.rpartition(".lora_")
        part, _, path = name.partition(".")
        if part.startswith("text_encoder") and not path.startswith("text_model."):
            path = f"text_model.{path}"
        name = prefixes[part] + path.replace(".", "_")
        found[f"{name}.lora_{'down' if leaf.startswith('A') else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(
            float(tensor.shape[0] if leaf.startswith("A") else tensor.shape[1]) if alpha is None else alpha
        )
    return kohya_file(file, found, {"ss_network_dim": "4", "ss_network_alpha": "4", "ss_output_name": "mine"})


def largest_difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Of outputs of a pipeline's parts."""
    assert one.keys() == two.keys()
    return max(float((one[part] - two[part]).abs().max()) for part in one)
