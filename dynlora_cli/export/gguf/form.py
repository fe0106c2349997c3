"""What GGUF must know of a model: hyperparameters, and one entry per tensor with its name, shape and how it is stored.

Dimensions: I inputs, O outputs of a matrix; R rows, of a matrix or a bias; E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dynlora_cli.errors import UsageError

INSTEAD = "export with `--to merged`, which every transformers model can"

Value = int | float | str | bool | list[bool]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a GGUF file.

    Args:
        name: in transformers' state dict.
        gguf: in the GGUF file.
        shape: in transformers: [O, I] of a matrix, [I, O] where `conv1d`, [R] of a bias or a norm, [E, O, I] of
            experts.
        heads: the rows belong to this many heads and are interleaved within each; 0: rows keep their order.
        conv1d: transformers stores the transpose.
        exact: stays f32 whatever the file's kind, as llama.cpp expects of norms, biases and positions.
        shift: what llama.cpp adds to each value: Gemma's norms multiply by 1 + weight.
        rows: only these rows of each matrix, from and up to; None: all. Then several entries share one name.
    """

    name: str
    gguf: str
    shape: tuple[int, ...]
    heads: int = 0
    conv1d: bool = False
    exact: bool = False
    shift: float = 0.0
    rows: tuple[int, int] | None = None

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """The shape that the file has, slowest dimension first."""
        if self.rows:
            return (*self.shape[:-2], self.rows[1] - self.rows[0], self.shape[-1])
        return self.shape[::-1] if self.conv1d else self.shape


@dataclass(frozen=True)
class Architecture:
    """What GGUF must know of a model.

    Args:
        name: llama.cpp's `general.architecture`.
        keys: hyperparameters by their full GGUF key; an int is written as uint32, a float as float32.
        entries: every tensor of a complete model, in the order of the file; those of one name stand together.
        vocab_size: rows of the embedding.
        tied: the output head is the embedding.
        factors: divisors of the rotary frequencies, one per pair of a head's dimensions, by the tensor's name.
        notes: where llama.cpp computes something else than transformers.
    """

    name: str
    keys: dict[str, Value]
    entries: Sequence[Entry]
    vocab_size: int
    tied: bool
    factors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, list[Entry]]:
        """Entries by transformers' name."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.name, []).append(entry)
        return found

    def named(self, name: str) -> list[Entry]:
        """The entries of a tensor; GPT-2's own checkpoint leaves `transformer.` out. Empty: not of this model."""
        return self.by_name.get(name) or self.by_name.get(f"transformer.{name}") or []


def to_gguf(entry: Entry, tensor: Tensor) -> Tensor:
    """A tensor as GGUF stores it: [O, I] or [R], rows interleaved where rotary embeddings need it.

    Raises:
        UsageError: the tensor has another shape than the config says.
    """
    if tuple(tensor.shape) != entry.shape:
        raise UsageError(
            f"{entry.name} has shape {list(tensor.shape)}, but config.json means {list(entry.shape)}",
            "config.json and the weights must be of the same model",
        )
    if entry.rows:
        tensor = tensor[..., slice(*entry.rows), :]
    if entry.conv1d:
        tensor = tensor.T
    if entry.shift:
        tensor = tensor + entry.shift
    return interleave(tensor, entry.heads) if entry.heads else tensor


def from_gguf(entry: Entry, tensor: Tensor) -> Tensor:
    """The inverse of `to_gguf`; of some rows only, where the entry has only those."""
    if entry.heads:
        tensor = deinterleave(tensor, entry.heads)
    if entry.shift:
        tensor = tensor - entry.shift
    return tensor.T if entry.conv1d else tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, n/2, 1, n/2 + 1, ...: first and second half of a head as neighbouring pairs."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def require(config: Mapping[str, Any], kind: str, **values: Any) -> None:
    """Raises UsageError where llama.cpp knows one value of a key, and the config has another."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"{key} is {config[key]!r}; llama.cpp's form of model_type {kind!r} knows {value!r} only", INSTEAD
            )


def prefixed(name: str, keys: Mapping[str, Value]) -> dict[str, Value]:
    """Keys as they stand in the file: behind the architecture's name."""
    return {f"{name}.{key}": value for key, value in keys.items()}
