"""Losses and pooling of model.task embedding: value and gradient are those of sentence-transformers' own classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from dynlora_cli.tasks.embedding import losses as ours
from dynlora_cli.tasks.embedding.pooling import POOLINGS
from dynlora_cli.tasks.embedding.ranking import correlation, ranking

ROWS, WIDTH = 6, 8
SCORES = [0.1, 0.9, 0.5, 0.5, 0.0, 1.0]


def vectors(columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return [
        torch.rand(ROWS, WIDTH, dtype=torch.float64, generator=generator).sub(0.5).requires_grad_()
        for _ in range(columns)
    ]


def same(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Two scalars, and their gradients, are equal; in fp64, but for scores in fp32 and an eps of distances."""
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        assert other.abs().max() > 1e-3  # there is something to compare


def no_duplicates(passages: int) -> Tensor:
    return torch.eye(ROWS, passages, dtype=torch.bool)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("scale", [20.0, 3.0])
def test_ranked_is_multiple_negatives_ranking(negatives: int, scale: float):
    columns = vectors(2 + negatives)
    wanted = theirs.MultipleNegativesRankingLoss(Any, scale=scale).compute_loss_from_embeddings(columns, None)
    passages = torch.cat(columns[1:])
    loss_B, choice_B = ours.ranked(columns[0], passages, no_duplicates(len(passages)), scale)
    same(loss_B.mean(), wanted, columns)
    cosines = torch.nn.functional.cosine_similarity(columns[0][:, None], passages[None], dim=-1)
    assert choice_B.tolist() == cosines.argmax(1).tolist()


def test_a_passage_that_is_right_too_is_no_negative():
    columns = vectors(2)
    also_right = no_duplicates(ROWS)
    also_right[0, 3] = True
    loss_B, _ = ours.ranked(*columns, also_right, 20.0)
    without = [0, 1, 2, 4, 5]
    alone = theirs.MultipleNegativesRankingLoss(Any).compute_loss_from_embeddings(
        [columns[0][without], columns[1][without]], None
    )
    cosines = 20 * torch.nn.functional.cosine_similarity(columns[0][:1], columns[1][without])
    torch.testing.assert_close(loss_B[0], torch.logsumexp(cosines, 0) - cosines[0])
    assert loss_B[without].mean().item() != pytest.approx(alone.item())  # the others still see all


@pytest.mark.parametrize("margin", [5.0, 0.1])
def test_triplet_is_triplet(margin: float):
    columns = vectors(3)
    wanted = theirs.TripletLoss(Any, triplet_margin=margin).compute_loss_from_embeddings(columns, None)
    loss_B, _ = ours.triplet(*columns, torch.arange(ROWS), margin)
    same(loss_B.mean(), wanted, columns)


def test_triplet_is_the_mean_over_a_rows_negatives():
    query, passage, first, second = vectors(4)
    row = torch.tensor([*range(ROWS), 2, 4])
    loss_B, missed_B = ours.triplet(query, passage, torch.cat([first, second[[2, 4]]]), row, 1.0)
    singles = [ours.triplet(query, passage, each, torch.arange(ROWS), 1.0) for each in (first, second)]
    torch.testing.assert_close(loss_B[2], (singles[0][0][2] + singles[1][0][2]) / 2)
    torch.testing.assert_close(loss_B[0], singles[0][0][0])
    assert missed_B[4] == max(singles[0][1][4], singles[1][1][4])


@pytest.mark.parametrize("scale", [20.0, 2.0])
def test_cosent_is_cosent(scale: float):
    columns, score = vectors(2), torch.tensor(SCORES, dtype=torch.float64)
    wanted = theirs.CoSENTLoss(Any, scale=scale).compute_loss_from_embeddings(columns, score)
    loss_B = ours.cosent(*columns, score, scale)
    same(loss_B.mean(), wanted, columns)
    assert len(loss_B) == ROWS


def test_cosine_is_cosine_similarity():
    columns, score = vectors(2), torch.tensor(SCORES, dtype=torch.float64)
    wanted = theirs.CosineSimilarityLoss(Any).compute_loss_from_embeddings(columns, score)
    same(ours.cosine(*columns, score).mean(), wanted, columns)


@pytest.mark.parametrize(("name", "mode"), [("mean", "mean"), ("cls", "cls"), ("last", "lasttoken"), ("max", "max")])
def test_pooling_is_theirs(name: str, mode: Any):
    hidden = torch.rand(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    wanted = Pooling(WIDTH, mode)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(POOLINGS[name](hidden, mask), wanted)


def test_ranking_counts_what_stands_before_the_first_right_passage():
    query = np.eye(3, 4, dtype=np.float32)
    passage = np.array([[0.9, 0, 0, 0], [1, 0.5, 0, 0], [0, 0.5, 0, 1], [0, 0, 1, 0]], dtype=np.float32)
    found = ranking(query, passage, [{0}, {1, 2}, {3}])
    # The first query has a nearer passage; the second two right ones, as near as each other; the third is right.
    assert found["recall@1"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert found["recall@5"] == 1
    assert found["mrr"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["ndcg@10"] == pytest.approx((1 / np.log2(3) + 1 + 1) / 3)
    tied = ranking(query[:1], np.array([[1, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32), [{0}])
    assert tied["mrr"] == 0.5  # a model that cannot tell texts apart is not right by chance


def test_ranking_is_that_of_sentence_transformers():
    evaluator = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    generator = np.random.default_rng(0)
    query, passage = (generator.normal(size=(count, 16)).astype(np.float32) for count in (20, 30))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    passage /= np.linalg.norm(passage, axis=1, keepdims=True)
    right = [{at, at + 5} for at in range(20)]
    wanted = evaluator.InformationRetrievalEvaluator(
        {str(at): str(at) for at in range(20)},
        {str(at): str(at) for at in range(30)},
        {str(at): {str(each) for each in places} for at, places in enumerate(right)},
        mrr_at_k=[30],
    ).compute_metrics(
        [
            [{"corpus_id": str(at), "score": float(scores[at])} for at in np.argsort(-scores)]
            for scores in query @ passage.T
        ]
    )
    found = ranking(query, passage, right)
    assert found["recall@5"] == pytest.approx(wanted["recall@k"][5])
    assert found["mrr"] == pytest.approx(wanted["mrr@k"][30])
    assert found["ndcg@10"] == pytest.approx(wanted["ndcg@k"][10])


def test_correlation_is_spearmans():
    from scipy.stats import spearmanr

    first, second = np.array([0.1, 0.2, 0.2, 0.5, 0.9]), np.array([1.0, 3.0, 2.0, 2.0, 5.0])
    assert correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert correlation(first, np.ones(5)) == 0
