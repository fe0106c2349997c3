"""Whole pipelines of diffusers with random weights, saved by diffusers itself: VAE, tokenizers and text encoders.

sd     Stable Diffusion 1: a UNet, a CLIP encoder, latents of half a picture's lines
xl     SDXL: two CLIP encoders, and the sizes of pictures as conditions
sd3    Stable Diffusion 3: a transformer that learns the flow, two CLIP encoders, no T5
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16  # of the texts' vectors
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_pipeline(kind: str, folder: Path, **scheduler: Any) -> Path:
    """Write the pipeline to `folder`/`kind`; `scheduler` are keys of its scheduler."""
    path = folder / kind
    if not path.is_dir():
        torch.manual_seed(0)
        MAKERS[kind](folder, scheduler).save_pretrained(path)
    return path


def _tokenizer(folder: Path) -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def _encoder(*, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS), hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _vae(channels: int = 4, **more: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, sample_size=16, **more,
    )  # fmt: skip


def _unet(*, xl: bool = False) -> diffusers.UNet2DConditionModel:
    more: dict[str, Any] = {}
    if xl:
        more = {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        }
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH if xl else WIDTH, attention_head_dim=2, norm_num_groups=4, **more,
    )  # fmt: skip


def _sd(folder: Path, scheduler: dict[str, Any]) -> Any:
    noise = diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True, **scheduler)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_encoder(), tokenizer=_tokenizer(folder), unet=_unet(), scheduler=noise,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _xl(folder: Path, scheduler: dict[str, Any]) -> Any:
    tokenizer = _tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_encoder(), text_encoder_2=_encoder(projected=True), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=_unet(xl=True), scheduler=diffusers.EulerDiscreteScheduler(**scheduler),
        add_watermarker=False,
    )  # fmt: skip


def _sd3(folder: Path, scheduler: dict[str, Any]) -> Any:
    tokenizer = _tokenizer(folder)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=8,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(8, shift_factor=0.1, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        text_encoder=_encoder(projected=True), tokenizer=tokenizer, text_encoder_2=_encoder(projected=True),
        tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


MAKERS = {"sd": _sd, "xl": _xl, "sd3": _sd3}
