"""Compares two forms of one model on a few fixed lines of text: base + adapter against merged or exported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.errors import MeasureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = Path(__file__).parents[1] / "assets" / "probe.txt"
TOKENS = 48  # taken of each line, at most
ROUNDINGS = 8  # roughly how many roundings of weights add up on the way to a logit


@dataclass(frozen=True)
class Agreement:
    """How far a model's predictions are from a reference's.

    Attributes:
        kl: KL(reference ‖ model), mean over positions, nats.
        max_logit_difference: largest |Δlogit|.
        max_logit: largest |logit| of the reference, for comparison.
        same_choice: share of positions at which both find the same token (or class) most likely.
        changed: share of positions at which another is most likely, and rounding does not explain it: the reference
            prefers its own by more than `ROUNDINGS` of its largest logit.
        loss_reference, loss: next-token cross-entropy on the lines, nats per token; None for a classifier.
        positions: number of predictions compared.
    """

    kl: float
    max_logit_difference: float
    max_logit: float
    same_choice: float
    changed: float
    loss_reference: float | None
    loss: float | None
    positions: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe_rows(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The lines as token ids, each [1, T]."""
    lines = PROBE.read_text(encoding="utf-8").splitlines()
    return [torch.tensor([tokenizer(line, truncation=True, max_length=TOKENS)["input_ids"]]) for line in lines]


def random_rows(vocab_size: int) -> list[Tensor]:
    """The same random tokens each time, each [1, T], for a model that has no tokenizer beside it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (1, TOKENS), generator=generator) for _ in range(4)]


@torch.no_grad()
def predictions(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Logits of every line, each [T, V] in fp32 on the CPU ([1, classes] for a classifier).

    Of a model without any output layer, the mean of the last hidden states, [1, D]. A denoiser reads no text: it has
    a probe of its own.

    A language model gets all lines at once, so that one that is read from disk is read once. An encoder-decoder reads
    each line with both.
    """
    probe: Any = getattr(model, "probe", None)
    if probe is not None:
        return [probe()]
    device = model_device(model)
    if model.get_output_embeddings() is None:
        return [_answer(model(input_ids=row.to(device))).float().cpu() for row in rows]
    lengths = [row.shape[1] for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : lengths[index]] = row[0]
        mask[index, : lengths[index]] = 1
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, attention_mask=mask, **more).logits
    return [logits[index, :length].float().cpu() for index, length in enumerate(lengths)]


def _answer(found: Any) -> Tensor:
    logits = getattr(found, "logits", None)
    return found.last_hidden_state.mean(1) if logits is None else logits


def model_device(model: PreTrainedModel) -> torch.device:
    """Where the model computes; a streamed one on the CPU."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def agreement(reference: list[Tensor], found: list[Tensor], rows: list[Tensor], rounding: float = 0.0) -> Agreement:
    """Compare two sets of `predictions` on the same rows.

    Args:
        reference, found: of every row.
        rows: token ids, each [1, T].
        rounding: by what share one number of the weights may be off, from the type that they are stored in.

    Raises:
        MeasureError: one of them is not finite.
    """
    kl = worst = largest = same = changed = 0.0
    losses = [0.0, 0.0]
    positions = targets = 0
    for before, after, row in zip(reference, found, rows, strict=True):
        width = min(before.shape[-1], after.shape[-1])  # an export may pad the vocabulary
        before, after = before[:, :width], after[:, :width]
        if width == 1:  # a reward: the logit of one choice against another
            before, after = (F.pad(logits, (0, 1)) for logits in (before, after))
        log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
        kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        worst = max(worst, (before - after).abs().max().item())
        largest = max(largest, before.abs().max().item())
        same += (before.argmax(-1) == after.argmax(-1)).sum().item()
        changed += _other_choices(before, after, rounding)
        positions += len(before)
        if len(before) == row.shape[1] > 1:
            next_ids = row[0, 1:]
            targets += len(next_ids)
            for index, log_probabilities in enumerate((log_p, log_q)):
                losses[index] += F.nll_loss(log_probabilities[:-1], next_ids, reduction="sum").item()
    if not all(torch.isfinite(torch.tensor([kl, worst, largest]))):
        raise MeasureError("the model predicts NaN or infinity on the probe text", "look at its weights")
    reference_loss, loss = (total / targets if targets else None for total in losses)
    shares = (same / positions, changed / positions)
    return Agreement(max(0.0, kl / positions), worst, largest, *shares, reference_loss, loss, positions)


def _other_choices(before: Tensor, after: Tensor, rounding: float) -> int:
    """Positions at which another choice is made than before, by more than rounding explains."""
    first, second = before.argmax(-1, keepdim=True), after.argmax(-1, keepdim=True)
    preferred = (before.gather(-1, first) - before.gather(-1, second)).squeeze(-1)
    allowed = ROUNDINGS * rounding * before.abs().amax(-1)
    return int((preferred > allowed).sum())
