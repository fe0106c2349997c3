"""Folds an adapter into the parts of a diffusion pipeline: first a plan, which finds every fault, then files.

Of a part that the adapter changes every variant is written anew, tensor by tensor, in its own number format; whatever
else the pipeline holds is copied. A convolution's weight is [O, inputs, height, width], whose rows are ΔW's.

Dimensions: C components of a layer, I inputs (x height x width of a kernel), O outputs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.images.by_timestep import no_single_weight
from dynlora_cli.adapters.images.names import CLIP_LEVEL
from dynlora_cli.adapters.patches import folded, rows_of
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.models.pipelines.parts import PipelineFolder
from dynlora_cli.models.weights import Entry, New, Space, Weights, write_files

ANOTHER = "this is another pipeline's adapter; name the right one with --base FOLDER"
SLACK = 1e-5  # share of ΔW by which two ways to add it up in fp32 may differ
_AT_ONCE = 1 << 18  # numbers that are compared; they stay in the processor's cache


@dataclass(frozen=True)
class Variant:
    """The weights of a part in one number format, such as those of `variant="fp16"`.

    Attributes:
        part: such as `unet`.
        weights: as they are.
        files: that hold them.
        layers: adapted layers, by the name of their tensor.
    """

    part: str
    weights: Weights
    files: list[Path]
    layers: dict[str, Factors]

    def changed(self) -> dict[str, New]:
        """What is written in the place of adapted layers."""
        space = Space()
        return {name: _sum(self.weights, name, factors, space) for name, factors in self.layers.items()}


@dataclass
class Plan:
    """What a merge will write; made by `plan_pipeline`.

    Attributes:
        pipeline: as it is.
        variants: weights that are written anew.
        copied: files that are copied, relative to the pipeline.
        left_out: what goes into no file, relative to the pipeline.
    """

    pipeline: PipelineFolder
    variants: list[Variant] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all files."""
        files = [file for variant in self.variants for file in variant.files]
        files += [self.pipeline.folder / name for name in self.copied]
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Loss:
    """What is lost of an update where weights are stored in few bits.

    Attributes:
        share: ‖W' − (W + ΔW)‖ / ‖ΔW‖ over all layers.
        variant: file name of the weights it is of.
    """

    share: float
    variant: str


def plan_pipeline(adapter: Adapter, pipeline: PipelineFolder) -> Plan:
    """Find the tensor of every layer of the adapter, in all variants of its part.

    Raises:
        UsageError: the pipeline has no such part or layer, or one of another shape or in numbers that nothing can be
            added to; a link that leads out of the folder.
        MachineError: a file is missing.
    """
    if adapter.schedule:
        raise no_single_weight()
    if own := adapter.own_numbers():
        raise UsageError(f"{adapter.folder}: {own}, and components alone are merged into a pipeline", "use PEFT")
    parts: dict[str, dict[str, Factors]] = {}
    for layer, factors in adapter.layers.items():
        part, _, name = layer.partition(".")
        parts.setdefault(part, {})[name] = factors
    plan = Plan(pipeline)
    for part, layers in parts.items():
        for files in pipeline.weights_of(part):
            weights = Weights(pipeline.folder / part, files)
            plan.variants.append(Variant(part, weights, files, _tensors(layers, weights, files, adapter)))
    plan.copied = pipeline.copied(parts)
    plan.left_out = pipeline.left_out({part: _files_of(plan, part) for part in parts})
    return plan


def _files_of(plan: Plan, part: str) -> list[Path]:
    return [file for variant in plan.variants if variant.part == part for file in variant.files]


def _tensors(layers: dict[str, Factors], weights: Weights, files: list[Path], adapter: Adapter) -> dict[str, Factors]:
    """The layers by the names of their tensors.

    Raises:
        UsageError: one has none, or one of another shape.
    """
    found = {name: _tensor_of(name, weights) for name in layers}
    if missing := [name for name, tensor in found.items() if tensor is None]:
        raise UsageError(
            f"{adapter.folder}: {files[0]} has no layer {missing[0]}"
            + (f", and {len(missing) - 1} more of {len(layers)} are missing" if len(missing) > 1 else ""),
            ANOTHER,
        )
    tensors = {tensor: layers[name] for name, tensor in found.items() if tensor is not None}
    for tensor, factors in tensors.items():
        _refuse_other(weights.entries[tensor], tensor, factors, adapter)
    return tensors


def _tensor_of(layer: str, weights: Weights) -> str | None:
    names = (f"{layer}.weight", f"{layer.removeprefix(CLIP_LEVEL)}.weight")
    return next((name for name in names if name in weights.entries), None)


def _refuse_other(entry: Entry, tensor: str, factors: Factors, adapter: Adapter) -> None:
    """Refuse a tensor that the layer's update is not added to."""
    kernel = entry.shape[2:] or (1, 1)
    same = len(entry.shape) in (2, 4) and kernel == (factors.kernel or (1, 1))
    outputs, inputs = factors.b_OC.shape[0], factors.a_CI.shape[1]
    if not same or (entry.shape[0], math.prod(entry.shape[1:])) != (outputs, inputs):
        of_kernel = factors.kernel or (1, 1)
        wanted = (outputs, inputs // math.prod(of_kernel), *factors.kernel)
        raise UsageError(
            f"{adapter.folder}: {tensor} is {_shape(entry.shape)} in {entry.file} and {_shape(wanted)} in the adapter",
            ANOTHER,
        )
    if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
        raise UsageError(
            f"{entry.file} holds {tensor} in {str(entry.dtype).removeprefix('torch.')}, and adding to it would round "
            "it once more",
            "name a pipeline in fp32, bf16 or fp16 with --base FOLDER",
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _sum(weights: Weights, tensor: str, factors: Factors, space: Space) -> New:
    """W + ΔW, made as a whole or row by row. [O, ...]"""
    entry = weights.entries[tensor]

    def rows(first: int, last: int) -> Tensor:
        W = weights.read(tensor, torch.float32, (first, last), space)
        folded(W.view(last - first, -1), rows_of(factors, False, slice(first, last)), False)
        if W.abs().max() > torch.finfo(entry.dtype).max:
            kind = str(entry.dtype).removeprefix("torch.")
            raise MeasureError(
                f"{entry.file}: {tensor} becomes too large for {kind}", "look at the adapter, or merge in fp32"
            )
        return W

    return New(entry.dtype, entry.shape, lambda: rows(0, entry.shape[0]), rows)


def write_pipeline(plan: Plan, folder: Path) -> None:
    """Write the merged pipeline into an existing, empty folder.

    Raises:
        MeasureError: a weight is not finite in its number format.
        OSError: there is no room.
    """
    for name in plan.copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.pipeline.folder / name, folder / name)
    for variant in plan.variants:
        target = folder / variant.part
        target.mkdir(exist_ok=True)
        write_files(variant.weights, target, {file: file.name for file in variant.files}, variant.changed())


def check_pipeline(plan: Plan, folder: Path) -> Loss:
    """Read every changed weight again, and compare it with what it should be.

    Returns:
        The largest loss by rounding, of all variants.

    Raises:
        MeasureError: a weight is further off than rounding to its number format explains.
    """
    losses, spaces = [], (Space(), Space(), Space())
    for variant in plan.variants:
        written = Weights(folder / variant.part, [folder / variant.part / file.name for file in variant.files])
        lost = update = 0.0
        for tensor, factors in variant.layers.items():
            off, size = _off(variant.weights, written, tensor, factors, spaces)
            lost, update = lost + off, update + size
        losses.append(Loss(math.sqrt(lost / update) if update else 0.0, f"{variant.part}/{variant.files[0].name}"))
    return max(losses, key=lambda loss: loss.share)


def _off(
    before: Weights, after: Weights, tensor: str, factors: Factors, spaces: tuple[Space, Space, Space]
) -> tuple[float, float]:
    """‖W' − (W + ΔW)‖² and ‖ΔW‖² of a layer."""
    entry = after.entries[tensor]
    lost = update = size = 0.0
    for first, last in _pieces(entry.shape):
        W_new, W_old = (
            each.read(tensor, torch.float32, (first, last), space).view(last - first, -1)
            for each, space in ((after, spaces[0]), (before, spaces[1]))
        )
        wanted = spaces[2](W_old.shape, torch.float32).copy_(W_old)
        folded(wanted, rows_of(factors, False, slice(first, last)), False)
        size += _squares(wanted)
        lost += _squares(W_new.sub_(wanted))
        update += _squares(W_old.sub_(wanted))
    allowed = torch.finfo(entry.dtype).eps * math.sqrt(size) + SLACK * math.sqrt(update)
    if not math.sqrt(lost) <= allowed:
        raise MeasureError(
            f"{tensor} was not written as it should be: {math.sqrt(lost):.2g} off, and rounding explains "
            f"{allowed:.2g}; nothing was kept",
            "is the disk in order? if it is, please report this",
        )
    return lost, update


def _squares(W: Tensor) -> float:
    return W.view(-1).dot(W.view(-1)).item()


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last rows of parts of a weight."""
    count = max(1, _AT_ONCE // math.prod(shape[1:]))
    return ((first, min(first + count, shape[0])) for first in range(0, shape[0], count))
