"""Components inside sentence-transformers' own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import WORDS, model_folder
from trainer_helpers import EVENTS, losses

from dynlora_cli.trainers import Attached, DynamicRankCallback, attach

pytest.importorskip("sentence_transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEXTS = ["count the words 3", "sort names", "every line"]


def encoder(folder: Path) -> Any:
    """A tiny Bert with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(model_folder(folder, "bert")), max_seq_length=32)
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


def trained(folder: Path, out: Path, resume: Path | None = None) -> tuple[Any, Attached, Any]:
    """A model after 12 steps of pairs, its components, and the trainer."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = Dataset.from_dict(
        {
            "anchor": [f"{WORDS[i % 12]} {i}" for i in range(48)],
            "positive": [f"{WORDS[i % 12]} the {WORDS[i * 5 % 12]}" for i in range(48)],
        }
    )
    model = encoder(folder)
    attached = attach(model, 2, init=8)
    callback = DynamicRankCallback(attached, **EVENTS)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(out), max_steps=12, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        save_strategy="steps", save_steps=6, report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, attached, trainer


def vectors(model: Any) -> torch.Tensor:
    return torch.tensor(model.encode(TEXTS))


def test_a_sentence_transformer_is_pruned_saved_and_goes_on(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    plain = vectors(encoder(tmp_path))
    model, attached, trainer = trained(tmp_path, tmp_path / "run")
    assert attached.outer is model
    assert attached.parameters <= attached.start.budget < attached.start.parameters
    trainer.save_model(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(vectors(loaded), vectors(model), atol=1e-5, rtol=0)
    assert (vectors(model) - plain).abs().max() > 0.1

    again, other, later = trained(tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoint-6")
    assert losses(later) == losses(trainer)
    assert other.rank_map == attached.rank_map
    assert torch.equal(vectors(again), vectors(model))
    assert attached.detach() is model
    assert torch.equal(vectors(model), plain)
