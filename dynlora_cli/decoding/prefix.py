"""A beginning that all prompts of a batch have in common, such as a document, read once for all of them.

Each row then is: the beginning, padding, the rest of its prompt. The padding in between is masked, and positions count
only what is not.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 32  # tokens that are worth it


def can_share(model: PreTrainedModel) -> bool:
    """Whether the model's cache is one of keys and values of all tokens, so that a copy of it serves each row."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    recurrent = any(hasattr(config, name) for name in ("ssm_cfg", "mamba_d_state", "state_size", "linear_attn_config"))
    return not model.config.is_encoder_decoder and kinds == {"full_attention"} and not (windowed or recurrent)


def shared(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with, of which each has at least one more; 0: too few to be worth it."""
    if len(texts) < 2:
        return 0
    least = min(len(text) for text in texts) - 1
    alike = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    same = min(least, sum(1 for _ in takewhile(bool, alike)))
    return same if same >= LEAST else 0


@torch.no_grad()
def read(model: PreTrainedModel, beginning: Sequence[int], rows: int) -> Cache:
    """What the model keeps of a beginning, once for each row."""
    cache = DynamicCache(config=model.config)
    ids_1T: Tensor = torch.tensor([list(beginning)], device=model.device)
    model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    return cache
