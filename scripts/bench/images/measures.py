"""What images.py measures of a denoiser that has learned one concept from one picture.

    fidelity          cosine of the judge's features between samples of the concept's prompt and its picture
    pixels            root mean square distance to the picture, -1 to 1
    fidelity_context  the same cosine where the prompt also names a background or a place, to the picture in that context
    context           share of these prompts that are followed: corners of the colour, the emoji in its quarter
    drift             by band of noise: loss of emoji that nobody trained on, with their own captions
    moved             by band: mean square of the change of what the denoiser says of these (0 for the base)
    diversity         mean 1 - cosine among samples of the concept's kind, such as `animal bug`
    memorised         share of samples of other prompts (the kind, other emoji) that the judge takes for the concept
    leaked            their mean cosine to the concept's picture
    wrong             by band: loss of the concept's picture under captions of other emoji; it falls as all prompts give it
    others            mean cosine of samples of other emoji to their pictures

All samples start from the same noise for every arm, so arms are compared in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base import Words, make_scheduler
from emoji_data import COLOURS, PLACES, SIDE, Emoji, Split, fetch, read, split
from judge import Judge, as_input, load
from torch import Tensor

from dynlora_cli.tasks.images.pipeline import Pipeline
from dynlora_cli.tasks.images.sampling import drawn

TOKEN = "sks"
BANDS, PLAIN, KIND, OTHERS, HELD = 8, 4, 4, 6, 48
STEPS, GUIDANCE = 12, 3.0
TIMESTEPS = [round((band + 0.5) * 1000 / BANDS) for band in range(BANDS)]
UNUSED = ("white", "black")  # the plain one, and one that the base does not follow
CONTEXTS = [(colour, "") for colour in COLOURS if colour not in UNUSED] + [
    ("white", place) for place in PLACES if place
]
Found = dict[str, Any]


@dataclass
class Bench:
    """All that stays the same: the base, the judge, the emoji.

    Attributes:
        prototypes: the judge's features of all emoji, (N, W).
        states: what the text encoder makes of captions that were met, (1, TOKENS, 384) each.
        base_says: what the base says of held-out emoji at each band.
    """

    work: Path
    pipeline: Pipeline
    emoji: list[Emoji]
    parts: Split
    judge: Judge
    prototypes: Tensor
    words: Words
    states: dict[str, Tensor]
    base_says: list[Tensor]

    @classmethod
    def open(cls, work: Path, base: Path) -> Bench:
        emoji = read(fetch(work))
        judge = load(work, len(emoji))
        prototypes = judge.features(np.stack([e.picture() for e in emoji]))
        return cls(work, Pipeline(base), emoji, split(emoji), judge, prototypes, Words(), {}, [])

    def read(self, captions: list[str]) -> Tensor:
        """(N, TOKENS, 384)"""
        new = sorted(set(captions) - self.states.keys())
        if new:
            self.states.update(zip(new, self.words(new).split(1), strict=True))
        return torch.cat([self.states[caption] for caption in captions])

    def others(self, concept: Emoji) -> list[Emoji]:
        """Emoji that the base knows, a few of the concept's kind first; the same for all arms."""
        same = [e for e in self.parts.train if e.kind == concept.kind][: OTHERS // 2]
        rest = [e for e in self.parts.train if e.kind != concept.kind]
        return same + rest[: OTHERS - len(same)]


def named(concept: Emoji) -> Emoji:
    """The concept under the name that nobody has."""
    return Emoji(concept.file, TOKEN, concept.kind)


def measure(bench: Bench, unet: Any, concept: Emoji) -> tuple[Found, np.ndarray]:
    """The measures, and the samples: PLAIN of the concept, its CONTEXTS, KIND of the kind, OTHERS of other emoji."""
    sks, others = named(concept), bench.others(concept)
    prompts = [sks.caption()] * PLAIN + [sks.caption(*context) for context in CONTEXTS]
    prompts += [concept.caption(form="kind")] * KIND + [other.caption() for other in others]
    given = {"encoder_hidden_states": bench.read(prompts)}
    none = {"encoder_hidden_states": bench.read([""])}
    latents = drawn(bench.pipeline, unet, given, none, steps=STEPS, guidance=GUIDANCE, seed=0, side=SIDE)
    samples = bench.pipeline.pictures(latents)
    return judged(bench, samples, concept, others) | losses(bench, unet, concept, others), samples


def judged(bench: Bench, samples: np.ndarray, concept: Emoji, others: list[Emoji]) -> Found:
    plain, contexts, kind, other = np.split(samples, np.cumsum([PLAIN, len(CONTEXTS), KIND]))
    features = bench.judge.features
    own = features(concept.picture()[None])
    in_context = features(np.stack([concept.picture(*context) for context in CONTEXTS]))
    wrong = features(np.concatenate([kind, other]))
    nearest = (wrong @ bench.prototypes.T).argmax(-1)
    difference = as_input(plain) - as_input(concept.picture()[None])
    followed = [follows(sample, *context) for sample, context in zip(contexts, CONTEXTS, strict=True)]
    return {
        "fidelity": mean(features(plain) @ own.T),
        "pixels": mean(difference.square().flatten(1).mean(1).sqrt()),
        "fidelity_context": mean((features(contexts) * in_context).sum(-1)),
        "context": float(np.mean(followed)),
        "diversity": spread(features(kind)),
        "diversity_own": spread(features(plain)),
        "memorised": mean((nearest == bench.emoji.index(concept)).float()),
        "leaked": mean(wrong @ own.T),
        "others": mean((features(other) * features(np.stack([e.picture() for e in others]))).sum(-1)),
    }


def mean(x: Tensor) -> float:
    return round(float(x.mean()), 5)


def spread(features_NW: Tensor) -> float:
    """Mean 1 - cosine over pairs."""
    count = len(features_NW)
    return mean(1 - ((features_NW @ features_NW.T).sum() - count) / (count * (count - 1)))


def follows(sample: np.ndarray, colour: str, place: str) -> bool:
    """Whether a picture (SIDE, SIDE, 3) is in a context, by its pixels."""
    x = sample.astype(np.float32)
    if place:  # most of what is not the background lies in that quarter of the picture
        mass = np.abs(x - np.asarray(COLOURS[colour])).sum(-1).reshape(2, SIDE // 2, 2, SIDE // 2).sum((1, 3))
        return bool(mass.argmax() == 2 * ("bottom" in place) + ("right" in place))
    corners = np.stack([x[:2, :2], x[:2, -2:], x[-2:, :2], x[-2:, -2:]]).reshape(4, -1, 3).mean(1)
    distances = {name: np.abs(corners - np.asarray(rgb)).sum(-1) for name, rgb in COLOURS.items()}
    right = np.stack([d for name, d in distances.items()]).argmin(0) == list(COLOURS).index(colour)
    return bool(right.sum() >= 3)  # an emoji may cover a corner


@torch.no_grad()
def says(bench: Bench, unet: Any, pictures: np.ndarray, captions: list[str]) -> tuple[list[float], list[Tensor]]:
    """By band: the loss of pictures with fixed noise, and what the denoiser says of them (N, 3, SIDE, SIDE)."""
    scheduler, clean, found, said = make_scheduler(), as_input(pictures), [], []
    states = bench.read(captions)
    for t in TIMESTEPS:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t))
        t_B = torch.full((len(clean),), t)
        answer = unet(scheduler.add_noise(clean, noise, t_B), t_B, states).sample
        said.append(answer)
        found.append(round(float((answer - noise).square().mean()), 6))
    return found, said


def losses(bench: Bench, unet: Any, concept: Emoji, others: list[Emoji]) -> Found:
    held = bench.parts.held_out[:HELD]
    drift, said = says(bench, unet, np.stack([e.picture() for e in held]), [e.caption() for e in held])
    if not bench.base_says:  # the base itself is measured first
        bench.base_says = said
    moved = [round(float((now - then).square().mean()), 6) for now, then in zip(said, bench.base_says, strict=True)]
    own = np.repeat(concept.picture()[None], len(others), 0)
    wrong, _ = says(bench, unet, own, [other.caption() for other in others])
    return {"drift": drift, "moved": moved, "wrong": wrong}
