"""Pipelines of diffusers with random weights, small enough to be trained in tests; pictures with captions for them.

pixel_pipeline    a UNet that draws 16 x 16 pixels without a VAE, and a Bert that reads captions letter by letter
write_pictures    squares of three colours as PNG, and a JSONL with their captions
picture_recipe    a checked recipe on both, 12 steps
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe

COLOURS = ("red", "green", "blue")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pixel_pipeline(folder: Path, **scheduler: Any) -> Path:
    """Write the pipeline to `folder`/pixel; `scheduler` are keys of its DDPMScheduler."""
    path = folder / "pixel"
    if path.is_dir():
        return path
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(path / "unet")
    DDPMScheduler(steps_offset=1, clip_sample=False, **scheduler).save_pretrained(path / "scheduler")
    write_bert(path)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def write_bert(path: Path) -> None:
    """A tokenizer of letters, and an encoder that gives 16 numbers for each of 16 tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(path / "vocab.txt"), model_max_length=16).save_pretrained(path / "tokenizer")
    (path / "vocab.txt").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(path / "text_encoder")


def write_pictures(folder: Path, count: int = 10, size: tuple[int, int] = (24, 20)) -> Path:
    """Write so many pictures, and return the file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, lines = np.random.default_rng(0), []
    for number in range(count):
        pixels = chance.integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
        pixels[4:14, 6:16, number % 3] = 230
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": f"a {COLOURS[number % 3]} box"}))
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines))
    return rows


def picture_recipe(folder: Path, *overrides: str, base: Path | None = None, out: str = "out") -> Recipe:
    """A recipe of 12 steps of 2 x 2 rows that prunes from 4 to 2 components per layer.

    Args:
        folder: for the pipeline, the rows, the recipe and the run folder.
        overrides: as of `--set`.
        base: a pipeline's folder; None: `pixel_pipeline`.
        out: the run folder's name.
    """
    rows = folder / "pictures" / "rows.jsonl"
    recipe = {
        "model": {"name_or_path": str(base or pixel_pipeline(folder)), "task": "text-to-image"},
        "dataset": {"train": [{"path": str(rows if rows.is_file() else write_pictures(rows.parent))}], "val_size": 0.2},
        "rank": {"init": 4, "budget": 2},
        "pruning": {"start": 0.17, "end": 0.67, "events": 2},
        "train": {
            "max_steps": 12,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "log_steps": 1,
        },
        "eval": {"steps": 6, "samples": 0},
        "output_dir": str(folder / out),
    }
    path = folder / f"{out}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return load_recipe(path, overrides)
