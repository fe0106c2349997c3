"""Whether a model keeps the requests of a batch apart, asked of the model itself.

A layer of a bank sees rows of tokens, and takes them for those of the first request, then those of the second, and so
on. Most models hand them over so. Some do not: experts are given the tokens that were sent to them, a layer for
positions has rows of no request at all, an encoder may drop the padding. There a mixed batch would be wrong in silence.

Two short requests of different lengths go through the model together and one by one:

    survey     are a layer's inputs the same rows in the same order? Of the base alone, so that a fault in one layer
               does not show in those after it.
    differs    are the logits the same where each request has adapters of its own?
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TEXTS = [7, 5, 3, 11, 2], [3, 2, 13]  # ids: two requests that differ everywhere
APART = 0.05  # of the largest number: rounding and the routers of experts stay below, another request does not


@torch.no_grad()
def survey(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> tuple[dict[str, str], float]:
    """What the base alone makes of a batch.

    Args:
        model: as the base alone.
        layers: about which is asked.

    Returns:
        Layers whose rows are not those of one request after the other, and what is wrong, in words; and how far logits
        are from those of each request alone, as a share of the largest. That is what rounding makes in this model.
    """
    with _heard(layers) as together:
        both = _logits(model, *TEXTS)
    alone, logits = [], []
    for text in TEXTS:
        with _heard(layers) as inputs:
            logits.append(_logits(model, text)[0])
        alone.append(inputs)
    wrong = {}
    for name in layers:
        calls = [inputs[name] for inputs in (together, *alone)]
        if not calls[0]:
            wrong[name] = "is not reached by a text"
        elif len({len(inputs) for inputs in calls}) > 1 or not all(_in_order(*c) for c in zip(*calls, strict=True)):
            wrong[name] = "does not see the rows of one request after the other"
    return wrong, _off(both, logits)


def _in_order(both: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether the rows of two requests are the two halves of an input, but for padding."""
    if (both.shape[0] if both.ndim > 2 else both.shape[:-1].numel()) % 2:
        return False
    width = both.shape[-1]
    halves, (own, other) = both.reshape(2, -1, width), (t.reshape(-1, width) for t in (first, second))
    if halves.shape[1] != len(own) or len(other) > len(own):
        return False
    size = float(own.abs().max())
    off = max(float((halves[0] - own).abs().max()), float((halves[1, : len(other)] - other).abs().max()))
    mixed = float((own[: len(other)] - other).abs().max())
    return off <= APART * size and (off <= 0.5 * mixed or off <= 1e-3 * size)


@torch.no_grad()
def differs(model: PreTrainedModel, using: Callable[..., Any], mixes: tuple[Any, Any], rounding: float) -> str | None:
    """How far a mixed batch is from each request alone, in words; None where only rounding is between them.

    Args:
        model: with its bank.
        using: `Bank.active`.
        mixes: of the two requests.
        rounding: of the base alone, see `survey`.
    """
    with using(mixes):
        together = _logits(model, *TEXTS)
    alone = []
    for text, mix in zip(TEXTS, mixes, strict=True):
        with using([mix]):
            alone.append(_logits(model, text)[0])
    off = _off(together, alone)
    # Sums are added up in another order in a batch. The base alone tells how much that is here, if not by chance 0.
    allowed = 4 * rounding + 256 * torch.finfo(torch.float32).eps + 8 * torch.finfo(model.dtype).eps
    return None if off <= allowed else f"off by {off:.1e} of the largest logit, and rounding explains {allowed:.1e}"


def _off(together: Tensor, alone: Sequence[Tensor]) -> float:
    """The largest difference between a batch and each request alone, as a share of the largest number."""
    shares = [
        float((both[: len(one)] - one).abs().max() / one.abs().max()) for both, one in zip(together, alone, strict=True)
    ]
    return max(shares) if all(map(math.isfinite, shares)) else math.inf


def _logits(model: PreTrainedModel, *texts: list[int]) -> Tensor:
    """The texts as one batch with padding behind. [B, T, V], fp32"""
    length = max(map(len, texts))
    words = model.config.get_text_config().vocab_size
    ids = torch.tensor([[token % words for token in text] + [0] * (length - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    finally:
        model.train(training)
    return logits.float()


@contextmanager
def _heard(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers inside the block, by name, call by call."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)

    def hear(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: inputs[name].append(next(iter((*args, *kwargs.values()))).float())

    hooks = [layer.register_forward_pre_hook(hear(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
