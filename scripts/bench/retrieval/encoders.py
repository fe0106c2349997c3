"""Which encoder finds the right update: top-1 over sets, topics and passages, for a base's own states and for MiniLM.

    python scripts/bench/retrieval/encoders.py FOLDER... minilm > scripts/bench/retrieval/encoders.md

Each FOLDER is a language model. Data: DYNLORA_SHARED/data, chat_mlx_wwdc, covidqa, qed_nq, xquad_en. No training.

sets       1,500 questions of four sets; 80 % are keys, and each of the rest should find its own set
topics     299 questions about one event in 8 topics (k-means on words), 70 % of them keys
passages   questions of xquad_en; each should find its passage among 240

Five splits by seed; the numbers are means and standard deviations over them.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.library.space import Space
from dynlora_cli.retrieval.encoders import MINILM, Encoder, base_encoder, model_encoder

DATA = Path(os.environ["DYNLORA_SHARED"]) / "data"
SETS = ("covidqa", "qed_nq", "xquad_en")
AS_THEY_ARE, CENTRED, EVENED_OUT = "as they are", "mean subtracted", "evened out"
QUESTIONS, PASSAGES, TOPICS, SEEDS = 400, 240, 8, 5


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions() -> tuple[list[str], np.ndarray]:
    """Different questions, and the number of the set of each."""
    chat = sorted({row["prompt"] for part in ("train", "valid") for row in lines(DATA / f"chat_mlx_wwdc/{part}.jsonl")})
    texts, owner = list(chat), [0] * len(chat)
    for number, name in enumerate(SETS, 1):
        asked = sorted({row["question"] for row in lines(DATA / name / "queries.jsonl")})
        random.Random(0).shuffle(asked)
        texts += asked[:QUESTIONS]
        owner += [number] * len(asked[:QUESTIONS])
    return texts, np.array(owner)


def passages() -> tuple[list[str], list[str], np.ndarray]:
    """Passages, questions, and which passage each question is about."""
    corpus = lines(DATA / "xquad_en/corpus.jsonl")[:PASSAGES]
    number = {row["id"]: index for index, row in enumerate(corpus)}
    asked = [row for row in lines(DATA / "xquad_en/queries.jsonl") if row["passage_id"] in number]
    random.Random(0).shuffle(asked)
    asked = asked[:PASSAGES]
    return (
        [row["text"] for row in corpus],
        [row["question"] for row in asked],
        np.array([number[row["passage_id"]] for row in asked]),
    )


def topics_of(texts: list[str]) -> np.ndarray:
    words = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    return KMeans(TOPICS, n_init=10, random_state=0).fit_predict(words)


def space_for(how: str, groups: list[np.ndarray]) -> Space:
    """Where keys are compared: as they are, with their mean subtracted, or evened out as a library does it."""
    if how == AS_THEY_ARE:
        return Space.plain(groups[0].shape[1])
    space = Space.of(groups)
    return space if how == EVENED_OUT else replace(space, gains_R=np.zeros_like(space.gains_R))


def split(vectors: np.ndarray, owner: np.ndarray, share: float, how: str) -> str:
    """The share of requests whose nearest key is of the right kind, over splits by seed."""
    found = []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(vectors))
        key, asked = order[: int(share * len(order))], order[int(share * len(order)) :]
        groups = [vectors[key][owner[key] == kind] for kind in np.unique(owner[key])]
        nearest = space_for(how, groups).requests(vectors[asked]).cosines(vectors[key]).argmax(1)
        found.append(100 * float((owner[key][nearest] == owner[asked]).mean()))
    return f"{np.mean(found):.1f} ± {np.std(found):.1f}"


def measure(encoder: Encoder) -> Callable[[str], list[str]]:
    texts, owner = questions()
    vectors = encoder.encode(texts)
    chat = [text for text, of in zip(texts, owner, strict=True) if of == 0]
    topics = topics_of(chat)
    about, asked, wanted = passages()
    keys, requests = encoder.encode(about), encoder.encode(asked)

    def row(how: str) -> list[str]:
        space = space_for(how, [keys])
        passage = 100 * float((space.requests(requests).cosines(keys).argmax(1) == wanted).mean())
        return [
            split(vectors, owner, 0.8, how),
            split(vectors[: len(chat)], topics, 0.7, how),
            f"{passage:.1f}",
        ]

    return row


def load(name: str) -> Encoder:
    if name == MINILM:
        return model_encoder(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return base_encoder(model, AutoTokenizer.from_pretrained(name), "")


def main() -> None:
    print("<!-- made by scripts/bench/retrieval/encoders.py -->\n")
    print("| encoder | compared | sets, % | topics, % | passages, % |\n|---|---|---:|---:|---:|")
    for name in sys.argv[1:]:
        row = measure(load(name))
        for how in (AS_THEY_ARE, CENTRED, EVENED_OUT):
            print(f"| {Path(name).name} | {how} | {' | '.join(row(how))} |", flush=True)


if __name__ == "__main__":
    main()
