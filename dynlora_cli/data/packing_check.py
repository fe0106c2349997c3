"""Whether a model keeps packed rows apart, asked of the model itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_mask_dtype(model: PreTrainedModel, max_length: int) -> torch.dtype:
    """The `mask_dtype` with which a model can train on packed rows.

    Some models and kernels ignore positions or masks and would mix the rows in silence, so two short rows go through
    the model alone and packed, and their logits must agree: within 5 %, or what three times rounding makes where that
    is more (deep models in 4 bits), and in any case within half of what mixing them changes.

    Args:
        model: a causal language model, on its device.
        max_length: capacity of a bin.

    Raises:
        UsageError: the model cannot keep packed rows apart.
    """
    config = model.config.get_text_config()
    name, kernel = type(model).__name__, config._attn_implementation
    hint = "set dataset.packing: false, or model.attn_implementation: sdpa"
    if kernel not in ("sdpa", "eager"):
        raise UsageError(f"dataset.packing: {kernel} attention takes no mask between packed rows", hint)
    window = getattr(config, "sliding_window", None)
    if window and window < max_length:
        raise UsageError(
            f"dataset.packing: {name} sees {window} tokens back, and the packed mask would lift that limit",
            f"set dataset.packing: false, or dataset.max_length: {window}",
        )
    # Eager attention adds the mask to the scores: a boolean one would close nothing.
    mask_dtype = model.dtype if kernel == "eager" else torch.bool
    together, padded, mixed = _differences(model, mask_dtype)
    if not (together <= max(0.05, 3 * padded) and together <= max(0.001, 0.5 * mixed)):
        raise UsageError(f"dataset.packing: {name} does not keep packed rows apart", hint)
    return mask_dtype


@torch.no_grad()
def _differences(model: PreTrainedModel, mask_dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest difference from separate logits, as a share of the largest: of rows packed; in one batch with padding,
    which rounding makes; and read as one row."""
    examples = [OneText(ids, ids, number) for number, ids in enumerate([[7, 5, 3, 11, 2], [3, 2, 13]])]
    settings: dict[str, Any] = {"micro_batch_size": 1, "max_length": 8, "pad_id": 0, "shuffle": False}
    alone, both = Batches(examples, **settings), Batches(examples, **{**settings, "micro_batch_size": 2})
    training = model.training
    model.eval()
    packed = Batches(examples, packing=True, mask_dtype=mask_dtype, **settings).step(0, 0)[0]
    together = _logits(model, packed)
    mixed = _logits(model, replace(packed, inputs={"input_ids": packed.inputs["input_ids"]}))
    lines = zip(_logits(model, both.step(0, 0)[0]), examples, strict=True)
    padded = torch.cat([line[: len(example.input_ids)] for line, example in lines])[None]
    apart = torch.cat([_logits(model, alone.step(0, index)[0]) for index in range(2)], 1)
    model.train(training)

    def share(other: Tensor) -> float:
        return float((other - apart).abs().max() / apart.abs().max())

    return share(together), share(padded), share(mixed)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    logits = model(**inputs).logits.float()
    return logits - logits.mean(-1, keepdim=True)  # a constant added to all logits changes nothing
