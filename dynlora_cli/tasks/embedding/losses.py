"""Losses of vectors, row by row. Value and gradient of their means are those of sentence-transformers' classes.

    ranked     MultipleNegativesRankingLoss: the right passage among all passages of the batch (InfoNCE)
    triplet    TripletLoss: a right passage nearer than a wrong one, by a margin
    cosent     CoSENTLoss: pairs in the order of their scores
    cosine     CosineSimilarityLoss: the cosine is the score

Sources: van den Oord et al., Representation Learning with Contrastive Predictive Coding (arXiv 1807.03748), eq. 4;
Hermans et al., In Defense of the Triplet Loss (arXiv 1703.07737), eq. 1; Huang et al., CoSENT (2024), eq. 6.

Dimensions: B rows, M passages of all rows, N negatives of all rows, D numbers of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ranked(query_BD: Tensor, passage_MD: Tensor, also_right_BM: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own passage among all of the batch.

    Args:
        query_BD: of every row.
        passage_MD: first the right one of each row, in the order of the rows, then the others.
        also_right_BM: passages that answer the query, too, and its own: they are left out of its wrong ones.
        scale: cosines times this are the logits; 1 / temperature.

    Returns:
        The loss [B], and which passage is nearest [B].
    """
    scores_BM = scale * F.normalize(query_BD, dim=1) @ F.normalize(passage_MD, dim=1).T
    own_B = torch.arange(len(query_BD), device=query_BD.device)
    left_out_BM = also_right_BM.clone()
    left_out_BM[own_B, own_B] = False
    scores_BM = scores_BM.masked_fill(left_out_BM, -torch.inf)
    return F.cross_entropy(scores_BM, own_B, reduction="none"), scores_BM.argmax(1)


def triplet(
    query_BD: Tensor, passage_BD: Tensor, negative_ND: Tensor, row_N: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """max(0, |q - p| - |q - n| + margin), the mean over the negatives of each row; distances are Euclidean.

    Args:
        query_BD, passage_BD: of every row.
        negative_ND: of all rows, each with at least one.
        row_N: the row that each negative belongs to.
        margin: by how much the right one should be nearer.

    Returns:
        The loss [B], and 0 where the right passage is nearer than all negatives, 1 elsewhere [B].
    """
    right_N = torch.linalg.vector_norm(query_BD - passage_BD, dim=1)[row_N]
    wrong_N = torch.linalg.vector_norm(query_BD[row_N] - negative_ND, dim=1)
    zeros_B = right_N.new_zeros(len(query_BD))
    counts_B = zeros_B.index_add(0, row_N, torch.ones_like(right_N))
    loss_B = zeros_B.index_add(0, row_N, F.relu(right_N - wrong_N + margin)) / counts_B
    missed_B = zeros_B.index_add(0, row_N, (wrong_N <= right_N).to(zeros_B.dtype))
    return loss_B, (missed_B > 0).long()


def cosent(first_BD: Tensor, second_BD: Tensor, score_B: Tensor, scale: float) -> Tensor:
    """log(1 + Σ exp(scale (cos_j - cos_i))) over all pairs of rows of which i has the higher score.

    It is a number of the whole batch, which stands for each of its rows. [B]
    """
    cosine_B = F.cosine_similarity(first_BD, second_BD) * scale
    apart_BB = cosine_B[:, None] - cosine_B[None, :]  # a pair in the wrong order has a positive one
    wrong_BB = score_B[:, None] < score_B[None, :]
    logits = torch.cat([apart_BB.new_zeros(1), apart_BB[wrong_BB]])
    return torch.logsumexp(logits, 0).expand(len(first_BD))


def cosine(first_BD: Tensor, second_BD: Tensor, score_B: Tensor) -> Tensor:
    """(cosine - score)², [B]."""
    return (F.cosine_similarity(first_BD, second_BD) - score_B).square()
