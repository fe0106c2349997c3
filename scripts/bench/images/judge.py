"""A frozen judge of pictures for images.py: a small network that tells 1,700 emoji apart, in any context.

    python scripts/bench/images/judge.py --work FOLDER

It sees every emoji, the concepts too, on all backgrounds, in all places, shifted, noisy and blurred, and names which one it
is; the layer before that answer is the feature in which pictures are compared, as DINO's is for photographs. It is trained
once, before the arms, and knows nothing of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from emoji_data import COLOURS, PLACES, Emoji, fetch, read
from torch import nn
from torch.nn import functional

STEPS, BATCH, RATE, WIDTH = 2500, 96, 2e-3, 128


def as_input(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(N, side, side, 3) bytes to (N, 3, side, side) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge(nn.Module):
    """Pictures to features (N, WIDTH) of length 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()

        def block(came: int, goes: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(came, goes, 3, stride, 1), nn.BatchNorm2d(goes), nn.ReLU())

        self.body = nn.Sequential(
            block(3, 32, 1), block(32, 64, 2), block(64, 64, 1), block(64, 128, 2), block(128, 128, 1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(128 * 16, WIDTH),
        )  # fmt: skip
        self.classes = nn.Parameter(torch.randn(classes, WIDTH) * 0.1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.body(x_NCHW), dim=-1)

    def logits(self, features_NW: torch.Tensor) -> torch.Tensor:
        return 20 * features_NW @ functional.normalize(self.classes, dim=-1).T

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> torch.Tensor:
        return self(as_input(pictures))


def spoiled(x_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to a pixel, brighter or darker, noisy, half of them blurred."""
    shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
    x = torch.roll(x_NCHW, shift, (2, 3))
    count = len(x)
    x = x * (1 + 0.2 * torch.randn(count, 3, 1, 1, generator=generator)) + 0.1 * torch.randn(
        count, 3, 1, 1, generator=generator
    )
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = (
        0.7 * torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    )
    x = x + share * (blurred - x)
    return x + 0.25 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)


def train(work: Path, emoji: list[Emoji]) -> None:
    contexts = [(colour, place) for colour in COLOURS for place in PLACES]
    rng = np.random.default_rng(0)
    every = [np.stack([e.picture() for e in emoji])]
    for _ in range(6):
        drawn = [contexts[i] for i in rng.integers(len(contexts), size=len(emoji))]
        every.append(np.stack([e.picture(*context) for e, context in zip(emoji, drawn, strict=True)]))
    views = torch.cat([as_input(p)[None] for p in every])
    torch.manual_seed(0)
    judge, began, right = Judge(len(emoji)).train(), time.time(), []
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        label = torch.randint(len(emoji), (BATCH,), generator=generator)
        view = torch.randint(len(views), (BATCH,), generator=generator)
        logits = judge.logits(judge(spoiled(views[view, label], generator)))
        loss = functional.cross_entropy(logits, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right.append(float((logits.argmax(-1) == label).float().mean()))
        if (step + 1) % 100 == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 3), "right": round(float(np.mean(right[-100:])), 3)}
            print(json.dumps(line | {"seconds": round(time.time() - began)}), flush=True)
    torch.save(judge.state_dict(), work / "judge.pt")


def load(work: Path, classes: int) -> Judge:
    judge = Judge(classes)
    judge.load_state_dict(torch.load(work / "judge.pt", weights_only=True))
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train(asked.work, read(fetch(asked.work)))


if __name__ == "__main__":
    main()
