"""Where a model's parameters lie in its files: transformers renames, joins and splits tensors when it loads a model.

transformers' own tables say how, so they are used here instead of being repeated. Every name in the files goes through
their renaming. Every conversion runs once on small tensors that hold row numbers instead of weights. Where a number
comes out shows which row of which stored tensor became which row of a parameter, whatever the steps in between.

A tensor is seen as [matrices, rows, columns]: one of two dimensions has one matrix, a vector has no columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from dynlora_cli.models.weights import Weights

_COLUMNS = 2  # columns of a tensor of row numbers; not 1, since some conversions drop dimensions of size 1


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor, and the rows of a parameter that they become.

    Attributes:
        tensor: its name in the files.
        matrix: of the stored tensor.
        rows: of that matrix; in the order of `own`.
        own_matrix: of the parameter.
        own: its rows, from first to last; its columns where `transposed`.
        transposed: stored rows are columns of the parameter.
    """

    tensor: str
    matrix: int
    rows: slice | Tensor
    own_matrix: int
    own: tuple[int, int]
    transposed: bool = False


@dataclass
class _Group:
    """The stored tensors that one conversion reads together."""

    converter: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)  # pattern, tensor


class Layout:
    """The places of a model's parameters in its files.

    Args:
        weights: the files.
        model: its structure, on any device.

    Attributes:
        whole: by parameter, the tensor that is the parameter as it is.
        parts: by parameter, the pieces of it that a conversion puts together.
        unknown: by parameter, why it is not known where it lies.
    """

    def __init__(self, weights: Weights, model: PreTrainedModel) -> None:
        self.weights, self.model = weights, model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.whole: dict[str, str] = {}
        self.parts: dict[str, list[Part]] = {}
        self.unknown: dict[str, str] = {}
        self._state = dict.fromkeys(self.shapes, True)  # transformers only looks which names are in it
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        groups: dict[str, _Group] = {}
        by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        for tensor in sorted(weights.entries, key=dot_natural_key):
            parameter, pattern = self._loaded_as(tensor)
            if parameter in self.shapes and pattern is None:
                self.whole.setdefault(parameter, tensor)
            elif parameter in self.shapes and pattern is not None:
                groups.setdefault(parameter, _Group(by_pattern[pattern])).sources.append((pattern, tensor))
        for first, group in groups.items():
            self._follow(first, group)
        shared = getattr(model, "all_tied_weights_keys", None) or {}
        self._twins: dict[str, list[str]] = {}
        # The source comes first: files of a model whose ties parted in part hold others, and those are no one else's.
        for name in dict.fromkeys([*shared.values(), *shared]):
            self._twins.setdefault(shared.get(name, name), []).append(name)
        self._first_twin = {name: first for first, names in self._twins.items() for name in names}

    def _loaded_as(self, tensor: str) -> tuple[str, str | None]:
        """The parameter that transformers' loader makes of a stored tensor, and the pattern of the conversion."""
        prefix = self.model.base_model_prefix
        found, pattern = rename_source_key(tensor, self._renamings, self._converters, prefix, self._state)
        if found not in self.shapes and tensor in self.shapes:
            return rename_source_key(tensor, [], [], prefix, self._state)
        return found, pattern

    def _follow(self, first: str, group: _Group) -> None:
        """Run a conversion on row numbers, and see where each comes out."""
        converter: Any = deepcopy(group.converter)
        numbers = _Numbers()
        for pattern, tensor in group.sources:
            made = numbers.of(tensor, self.weights.entries[tensor].shape)
            converter.add_tensor(first, tensor, pattern, made)
        try:
            results = converter.convert(first, model=_Narrow(self.model), config=self.model.config)
        except Exception as error:  # a conversion that does not work on row numbers
            results, reason = {first: None}, str(error)
        for name, result in results.items():
            result = result[0] if isinstance(result, list) else result
            if name not in self.shapes:
                continue
            parts = None if result is None else numbers.parts(result, self.shapes[name], self.weights)
            if parts is None:
                steps = ", ".join(type(step).__name__ for step in group.converter.operations)
                self.unknown[name] = f"transformers makes it by {steps}" + (f" ({reason})" if result is None else "")
            else:
                self.parts[name] = parts

    def holds(self, parameter: str) -> bool:
        """Whether the files have a parameter under its own name."""
        return parameter in self.whole or parameter in self.parts

    def find(self, parameter: str) -> str | None:
        """The name under which the files have a parameter: its own, or that of another that shares its weight."""
        twins = self._twins.get(self._first_twin.get(parameter, ""), [])
        return next((name for name in (parameter, *twins) if self.holds(name)), None)

    def pieces(self, parameter: str) -> list[Part]:
        """A parameter's parts; of one that lies in the files as it is, one for each of its matrices."""
        if parameter not in self.whole:
            return self.parts[parameter]
        matrices, rows = _matrices(self.shapes[parameter])
        tensor = self.whole[parameter]
        return [Part(tensor, index, slice(0, rows), index, (0, rows)) for index in range(matrices)]

    def read(self, parameter: str, tensor: Callable[[str], Tensor]) -> Tensor:
        """A parameter, put together from tensors.

        Args:
            parameter: one that the files have.
            tensor: gives a stored tensor by its name.
        """
        if parameter in self.whole:
            return tensor(self.whole[parameter])
        shape = self.shapes[parameter]
        matrices, _ = _matrices(shape)
        made: Tensor | None = None
        for name, parts in _by_tensor(self.parts[parameter]).items():
            stored = tensor(name)
            made = stored.new_empty(shape) if made is None else made
            view = made.view(matrices, *shape[-2:]) if len(shape) > 1 else made.view(1, *shape)
            stored = stored.view(-1, *stored.shape[-2:]) if stored.ndim > 1 else stored.view(1, *stored.shape)
            for part in parts:
                target = view[part.own_matrix].T if part.transposed else view[part.own_matrix]
                target[slice(*part.own)] = stored[part.matrix][part.rows]
        assert made is not None
        return made

    def name_of_new(self, parameter: str) -> str:
        """The name that a tensor must have in the files to be loaded as a parameter that they lack.

        In the way of the others: published, or as in memory.
        """
        names = [parameter]
        try:
            back = revert_weight_conversion(self.model, {parameter: torch.empty(self.shapes[parameter], device="meta")})
            names = [*back, parameter] if any(name != tensor for name, tensor in self.whole.items()) else names
        except Exception:  # a conversion that needs other tensors as well
            pass
        return next((name for name in names if self._loaded_as(name) == (parameter, None)), parameter)


class _Narrow:
    """A model whose parameters have as few columns as the row numbers, for conversions that compare shapes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(_narrow(tuple(self._model.get_parameter(name).shape)), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Numbers:
    """Makes tensors of row numbers, and finds out from the numbers that come out which rows they were."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, int]] = []  # tensor and matrix
        self.starts: list[int] = []
        self.count = 0

    def of(self, tensor: str, shape: tuple[int, ...]) -> Tensor:
        """[..., rows, 2], the same number in both columns; [rows] of a vector."""
        matrices, rows = _matrices(shape)
        for matrix in range(matrices):
            self.tensors.append((tensor, matrix))
            self.starts.append(self.count + matrix * rows)
        numbers = torch.arange(self.count, self.count + matrices * rows)
        self.count += len(numbers)
        if len(shape) < 2:
            return numbers.view(shape)
        return numbers.view(*shape[:-1], 1).repeat(*[1] * (len(shape) - 1), _COLUMNS)

    def parts(self, result: Tensor, shape: tuple[int, ...], weights: Weights) -> list[Part] | None:
        """The parts of a parameter that came out so; None if it is not rows of the tensors, or columns of them."""
        if len(shape) < 2:
            numbers, transposed, width = result.view(1, -1), False, 0
            if tuple(result.shape) != shape:
                return None
        elif tuple(result.shape) == _narrow(shape) and (result[..., :1] == result).all():
            numbers, transposed, width = result[..., 0].reshape(-1, shape[-2]), False, shape[-1]
        elif tuple(result.shape) == (*shape[:-2], _COLUMNS, shape[-1]) and (result[..., :1, :] == result).all():
            numbers, transposed, width = result[..., 0, :].reshape(-1, shape[-1]), True, shape[-2]
        else:
            return None
        starts, parts = torch.tensor(self.starts), []
        for matrix, row in enumerate(numbers.contiguous()):
            places = torch.bucketize(row, starts, right=True) - 1
            at = 0
            for place, length in zip(
                *(each.tolist() for each in places.unique_consecutive(return_counts=True)), strict=True
            ):
                tensor, of = self.tensors[place]
                stored = weights.entries[tensor].shape
                if (stored[-1] if len(stored) > 1 else 0) != width:
                    return None
                rows = row[at : at + length] - self.starts[place]
                parts.append(Part(tensor, of, _as_slice(rows), matrix, (at, at + length), transposed))
                at += length
        return parts


def _matrices(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many, and the rows of one."""
    return (math.prod(shape[:-2]), shape[-2]) if len(shape) > 1 else (1, math.prod(shape))


def _narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], _COLUMNS) if len(shape) > 1 else shape


def _as_slice(rows: Tensor) -> slice | Tensor:
    first = int(rows[0])
    return slice(first, first + len(rows)) if bool((rows.diff() == 1).all()) else rows


def _by_tensor(parts: list[Part]) -> Mapping[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.tensor, []).append(part)
    return found


def within(part: Part, first: int, last: int) -> Iterator[tuple[slice | Tensor, slice | Tensor]]:
    """The rows of a part that lie between two stored ones, counted from the first; and the parameter's own."""
    if isinstance(part.rows, slice):
        low, high = max(first, part.rows.start), min(last, part.rows.stop)
        if low < high:
            shift = part.own[0] - part.rows.start
            yield slice(low - first, high - first), slice(low + shift, high + shift)
        return
    chosen = ((part.rows >= first) & (part.rows < last)).nonzero().squeeze(1)
    if len(chosen):
        yield part.rows[chosen] - first, chosen + part.own[0]
