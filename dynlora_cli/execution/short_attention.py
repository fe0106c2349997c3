"""Attention over short rows in bf16 on a CPU: computed in fp32, which takes half the time.

torch's kernel for bf16 turns blocks of keys and values into another layout first, which costs more than it saves until
rows have some hundred tokens. Forward and backward, one thread, AVX-512 with bf16 products, 8 rows, 9 heads of 64: 80
tokens 17.6 ms in bf16 and 7.9 in fp32, 160 tokens 36 and 24; 2 rows of 512 tokens 44 and 51. Other CPUs were not
measured and keep their own: with AMX there is another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TABLE = "ALL_ATTENTION_FUNCTIONS"  # the name under which the modules of transformers find their attention
KERNEL = "sdpa"
SHORT = 256  # tokens

Attention = Callable[..., tuple[Tensor, Any]]


class ShortAttention(Mapping[str, Attention]):
    """A model's table of attention functions, with another one for short rows.

    Args:
        usual: transformers' `AttentionInterface`.
    """

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def get_interface(self, name: str, default: Attention) -> Attention:
        return _for(name, self.usual.get_interface(name, default))

    def __getitem__(self, name: str) -> Attention:
        return _for(name, self.usual[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.usual)

    def __len__(self) -> int:
        return len(self.usual)

    def __getattr__(self, name: str) -> Any:
        if name == "usual":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.usual, name)


def _for(name: str, attention: Attention) -> Attention:
    return in_fp32(attention) if name == KERNEL else attention


def in_fp32(attention: Attention) -> Attention:
    """An attention function of transformers that computes short rows in fp32, where they train."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, Any]:
        others = any(isinstance(other, Tensor) and other.is_floating_point() for other in more.values())
        if others or not is_slow(query, key, value):  # what else there is in bf16 would have to be cast, too
            return attention(module, query, key, value, attention_mask, **more)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):  # it would make them bf16 again
            y, weights = attention(module, query.float(), key.float(), value.float(), attention_mask, **more)
        return y.to(query.dtype), weights

    return attend


def is_slow(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for bf16 is slower than that for fp32.

    Args:
        query, key, value: [batch, heads, tokens, width of a head].
    """
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return (
        trains
        and {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        and query.device.type == "cpu"
        and max(query.shape[2], key.shape[2]) <= SHORT
        and _has("avx512_bf16")
        and not _has("amx_tile")
    )


def _has(what: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{what}_supported", bool)())
