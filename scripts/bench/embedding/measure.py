"""Questions to passages: MiniLM before and after, trained by dynlora and by sentence-transformers with PEFT.

    python scripts/bench/embedding/measure.py DATA [--only xquad_en] [--out results.jsonl]

DATA holds `xquad_en`, `covidqa` and `qed_nq`, each with corpus.jsonl and queries.jsonl. Passages are split into those to
train on, to choose the rate by and to test on; a question goes with its passage, and is looked for among the passages of
its own part alone. Both systems see the same rows for as many epochs, in batches of 16, and end with as many numbers:
rank 4 in all linear layers but the pooler, which dynlora may share out otherwise. Each has its own rate, the better of two
by the MRR on the validation part of xquad_en, with seed 0; the same rate won for both there, and is that of the other sets.
sentence-transformers has the batches without duplicates that it advises.

Every result is a line of the output, which is gone on with: what is there is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynlora_cli.retrieval.encoders import encoder_folder
from dynlora_cli.tasks.embedding.ranking import ranking

SETS = ("xquad_en", "qed_nq", "covidqa")
ROWS, VAL, TEST, LENGTH, BATCH, EPOCHS, RANK = 160, 100, 200, 64, 16, 2, 4
RATES = {"xquad_en": (5e-4, 2e-3), "qed_nq": (2e-3,), "covidqa": (2e-3,)}
SEEDS = (0, 1, 2)
SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}  # of the passages
Rows = list[dict[str, str]]


def split(folder: Path) -> dict[str, Rows]:
    """Pairs of each part; no passage is in two."""
    passages = {row["id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open(encoding="utf-8"))}
    order = sorted(passages, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts: dict[str, Rows] = {}
    start = 0.0
    queries = [json.loads(line) for line in (folder / "queries.jsonl").open(encoding="utf-8")]
    for (name, share), most in zip(SHARES.items(), (ROWS, VAL, TEST), strict=True):
        own = set(order[round(start * len(order)) : round((start + share) * len(order))])
        start += share
        rows = [
            {"query": row["question"], "passage": passages[row["passage_id"]]}
            for row in queries
            if row["passage_id"] in own
        ]
        random.Random(0).shuffle(rows)
        parts[name] = rows[:most]
    return parts


def score(folder: Path, rows: Rows) -> dict[str, float]:
    """How a folder that sentence-transformers loads ranks the passages of some rows."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = LENGTH
    texts = list(dict.fromkeys(row["passage"] for row in rows))
    places = {text: at for at, text in enumerate(texts)}
    vectors = [
        model.encode(each, normalize_embeddings=True).astype(np.float32)
        for each in ([row["query"] for row in rows], texts)
    ]
    return ranking(*vectors, [{places[row["passage"]]} for row in rows])


def by_dynlora(rows: Rows, rate: float, seed: int, out: Path) -> int:
    """Train, and give the size of what was trained, in numbers."""
    from dynlora_cli.commands import train
    from dynlora_cli.config.load import load_recipe

    data = out.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name_or_path": str(encoder_folder("minilm")), "task": "embedding"},
        "dataset": {"train": [str(data)], "val_size": 0, "max_length": LENGTH},
        "rank": {"budget": RANK},
        "train": {"epochs": EPOCHS, "micro_batch_size": BATCH, "learning_rate": rate},
        "output_dir": str(out),
        "seed": seed,
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return int(train.run(load_recipe(path))["parameters"])


def by_sentence_transformers(rows: Rows, rate: float, seed: int, out: Path) -> int:
    """The same with their trainer, and PEFT's LoRA of one rank."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    torch.manual_seed(seed)
    model = SentenceTransformer(str(encoder_folder("minilm")), device="cpu")
    model.max_seq_length = LENGTH
    layers = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=2 * RANK, target_modules=layers))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out.with_suffix(".trainer")),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        batch_sampler="no_duplicates",
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss).train()
    model.save(str(out))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


SYSTEMS = {"dynlora": by_dynlora, "sentence-transformers": by_sentence_transformers}


def one(system: str, parts: dict[str, Rows], rate: float, seed: int) -> dict[str, Any]:
    """A run and its numbers, in a process of its own: for its memory."""
    folder = Path(tempfile.mkdtemp())
    told = folder / "told.json"
    child = os.fork()
    if not child:
        started = time.perf_counter()
        size = SYSTEMS[system](parts["train"], rate, seed, folder / "out")
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {name: score(folder / "out", parts[name]) for name in ("val", "test")}
        told.write_text(json.dumps({"parameters": size, "seconds": seconds, "peak_bytes": memory, **found}))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{system} failed at rate {rate}, seed {seed}")
    found = json.loads(told.read_text())
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=SETS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(line["set"], line["system"], line["rate"], line["seed"]): line for line in lines}

    def result(name: str, system: str, rate: float | None, seed: int, parts: dict[str, Rows]) -> dict[str, Any]:
        key = (name, system, rate, seed)
        if key not in done:
            if rate is None:
                found: dict[str, Any] = {part: score(encoder_folder("minilm"), parts[part]) for part in ("val", "test")}
            else:
                found = one(system, parts, rate, seed)
            rows = {part: len(of) for part, of in parts.items()}
            done[key] = {"set": name, "system": system, "rate": rate, "seed": seed, "rows": rows, **found}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        return done[key]

    for name in options.only:
        parts = split(options.data / name)
        result(name, "none", None, 0, parts)
        best = {}
        for system in SYSTEMS:
            tried = {rate: result(name, system, rate, SEEDS[0], parts)["val"]["mrr"] for rate in RATES[name]}
            best[system] = max(tried, key=lambda rate: tried[rate])
        for seed in SEEDS[1:]:
            for system in SYSTEMS:
                result(name, system, best[system], seed, parts)


if __name__ == "__main__":
    main()
