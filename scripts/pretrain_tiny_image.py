"""Pretrain `builtin:tiny-image`: a pipeline of diffusers that draws squares, discs and crosses of 16 pixels by caption.

    python scripts/pretrain_tiny_image.py --out dynlora_cli/assets/builtin_tiny_image --steps 3000

The UNet (0.26 M parameters, in pixel space, no VAE) and its text encoder (a BERT of one layer that reads letters) learn
together, from random weights, on the drawings of dynlora_cli/data/shapes.py alone. Written in fp16, with a README.

Dimensions: B pictures, S pixels of a side, L tokens of a caption.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer

from dynlora_cli.data.shapes import SIDE, drawings

TOKENS, DROPPED, AVERAGE = 24, 0.1, 0.995
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NOTHING = [None, None]  # how an index names a part that a pipeline does not have
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",  # the oldest that reads it
    "feature_extractor": NOTHING,
    "safety_checker": NOTHING,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": NOTHING,
}
README = """# builtin:tiny-image

A pipeline of diffusers (StableDiffusionPipeline without a VAE) that draws squares, discs and crosses of {side} pixels in six
colours, by captions such as "a red disc". {parameters:,} parameters, in fp16. Made for dynlora's recipe of pictures
and for tests: small, real, and of no other use.

Pretrained by `scripts/pretrain_tiny_image.py` from random weights on {pictures} drawings that the script makes itself
(`dynlora_cli/data/shapes.py`): {steps} steps of {batch} pictures, about {minutes:.0f} CPU minutes; loss at the end
{loss:.4f} (squared error of the noise).

Licence of the weights and the tokenizer: Apache-2.0, as the project.
"""


def make_tokenizer() -> BertTokenizer:
    """BERT's, with letters for words."""
    letters = string.ascii_lowercase
    known = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: at for at, token in enumerate(known)}, model_max_length=TOKENS)


def make_encoder(vocabulary: int) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=TOKENS,
        ),
        add_pooling_layer=False,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def make_scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


def read_rows(tokenizer: BertTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 3, S, S) in [-1, 1], token ids of their captions (N, L) and of no caption (1, L)."""
    pixels, captions = zip(*drawings("base"), strict=True)
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def ids(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")["input_ids"]

    return pictures, ids(list(captions)), ids([""])


def pretrain(encoder: BertModel, unet: UNet2DConditionModel, rows: tuple[Tensor, Tensor, Tensor], asked: Any) -> float:
    """Lower the error of the noise; leaves the running average of the weights in both. Returns the loss, averaged."""
    pictures, ids, none = rows
    scheduler, both = make_scheduler(), torch.nn.ModuleDict({"encoder": encoder, "unet": unet})
    average = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    optimizer = torch.optim.AdamW(both.parameters(), lr=asked.learning_rate, weight_decay=0.01)
    running = 1.0
    for step in range(asked.steps):
        rate = min(1.0, (step + 1) / 100, (asked.steps - step) / (0.3 * asked.steps))
        optimizer.param_groups[0]["lr"] = asked.learning_rate * rate
        chosen = torch.randint(len(pictures), (asked.batch,))
        dropped = torch.rand(asked.batch, 1) < DROPPED
        states = encoder(torch.where(dropped, none, ids[chosen])).last_hidden_state
        noise, t = torch.randn(asked.batch, 3, SIDE, SIDE), torch.randint(len(scheduler.betas), (asked.batch,))
        answer = unet(scheduler.add_noise(pictures[chosen], noise, t), t, states).sample
        loss = functional.mse_loss(answer, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(AVERAGE, (step + 1) / (step + 10))
        for name, tensor in both.state_dict().items():
            average[name].lerp_(tensor, 1 - decay) if tensor.is_floating_point() else average[name].copy_(tensor)
        running = 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99 or step + 1 == asked.steps:
            print(f"step {step + 1:5d}  loss {running:.4f}", flush=True)
    both.load_state_dict(average)
    return running


def save(out: Path, encoder: BertModel, unet: UNet2DConditionModel) -> None:
    """The folder that diffusers loads."""
    encoder.half().save_pretrained(out / "text_encoder")
    unet.half().save_pretrained(out / "unet")
    make_scheduler().save_pretrained(out / "scheduler")
    make_tokenizer().save_pretrained(out / "tokenizer")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="pictures of a step (B)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    began, tokenizer = time.process_time(), make_tokenizer()
    encoder, unet, rows = make_encoder(len(tokenizer)).eval(), make_unet(), read_rows(tokenizer)
    loss = pretrain(encoder, unet, rows, asked)
    save(asked.out, encoder, unet)
    said = {
        "side": SIDE,
        "parameters": encoder.num_parameters() + unet.num_parameters(),
        "pictures": len(rows[0]),
        "steps": asked.steps,
        "batch": asked.batch,
        "minutes": (time.process_time() - began) / 60,
        "loss": loss,
    }
    (asked.out / "README.md").write_text(README.format(**said), "utf-8")


if __name__ == "__main__":
    main()
