"""A hypernetwork as files. Both lie in the root of its run's folder.

    hypernet.json           what it is: its variant and options, the layers it writes for, the base and the encoder that
                            it belongs to, by their fingerprints, and the hash of the other file
    hypernet.safetensors    net.*: the network; conditions.*: what belongs to the texts, such as the mean of vectors

There is no adapter_config.json beside them: PEFT has no such adapter. `dynlora adapt --hypernet` writes one for it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.find import HYPERNET, HYPERNET_WEIGHTS
from dynlora_cli.adapters.numbers import check_numbers
from dynlora_cli.config.options import options, section
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import (
    COPY_AGAIN,
    LARGEST_ALPHA,
    VersionOne,
    first_fault,
    fits,
    read_object,
    refuse_links,
)
from dynlora_cli.files.whole import sha256_of, write_json
from dynlora_cli.hypernets.hypernet import Hypernet, places_of
from dynlora_cli.models.randomness import seeded

NET, CONDITIONS = "net.", "conditions."
HASHES = ("sha256", "sampled_sha256")  # of a base, see models/fingerprint.py
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse NaN and infinity, which Python reads from JSON and which no record may hold.

    Raises:
        ValueError: there is one.
    """
    json.dumps(values, allow_nan=False)
    return values


def _of_a_base(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse a fingerprint that would fit any base.

    Raises:
        ValueError: a hash is missing.
    """
    missing = [key for key in HASHES if not re.fullmatch(r"[0-9a-f]{64}", str(values.get(key)))]
    if missing:
        raise ValueError(f"{missing[0]} is no hash, so that any base would fit")
    return values


def _once(layers: list[LayerForm]) -> list[LayerForm]:
    """Refuse a layer that is there twice.

    Raises:
        ValueError: there is one.
    """
    names = Counter(layer.name for layer in layers)
    if len(names) < len(layers):
        raise ValueError(f"{names.most_common(1)[0][0]} is there twice")
    return layers


class LayerForm(BaseModel):
    """A layer that it writes for."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    d_in: Size
    d_out: Size
    rank: Size


class BaseForm(BaseModel):
    """The base that it writes adapters of."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    name_or_path: str
    reference: str
    revision: str | None
    model_type: str
    fingerprint: Annotated[dict[str, Any], AfterValidator(_finite), AfterValidator(_of_a_base)]


class EncoderForm(BaseModel):
    """What makes vectors of descriptions."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    name: str
    fingerprint: str


class HypernetForm(BaseModel):
    """hypernet.json. It may have been made by somebody else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: VersionOne
    method: Annotated[str, Field(max_length=100)]
    options: dict[str, Any]
    scale: Annotated[float, Field(gt=0, le=LARGEST_ALPHA)]
    width: Size
    layers: Annotated[list[LayerForm], Field(min_length=1, max_length=100_000), AfterValidator(_once)]
    budget: Size
    transposed: bool
    base: BaseForm
    encoder: EncoderForm | None
    parameters: int
    sha256: Hash


@dataclass(frozen=True)
class Hypernetwork:
    """A hypernetwork that was read.

    Attributes:
        folder: that it was read from.
        form: hypernet.json.
        net: with its numbers, in evaluation mode on the CPU.
        conditions: tensors that belong to the texts.
        sha256: of hypernet.json, which holds the hash of the numbers.
    """

    folder: Path
    form: HypernetForm
    net: Hypernet
    conditions: Mapping[str, Tensor]
    sha256: str


def write_hypernet(folder: Path, form: Mapping[str, Any], net: Hypernet, conditions: Mapping[str, Tensor]) -> None:
    """Write both files, hypernet.json last; the bytes depend on the arguments only.

    Args:
        folder: exists.
        form: hypernet.json without what is known of the network itself.
        net: the network.
        conditions: tensors that belong to the texts.
    """
    tensors = {NET + name: tensor for name, tensor in net.state_dict().items()}
    tensors |= {CONDITIONS + name: tensor for name, tensor in conditions.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    (folder / HYPERNET_WEIGHTS).write_bytes(to_bytes(on_cpu, metadata={"format": "pt"}))
    layers = [{"name": p.name, "d_in": p.d_in, "d_out": p.d_out, "rank": p.rank} for p in net.places]
    about = {"schema_version": 1, "scale": net.scale, "width": net.width, "layers": layers}
    about |= {"parameters": net.parameter_count, "sha256": sha256_of(folder / HYPERNET_WEIGHTS)}
    write_json(folder / HYPERNET, HypernetForm.model_validate({**form, **about}).model_dump())


def read_hypernet(folder: Path) -> Hypernetwork:
    """Read the hypernetwork of a folder.

    Raises:
        UsageError: there is none, or it is damaged.
        MeasureError: a number of it is not finite.
    """
    path = folder / HYPERNET
    if not path.is_file():
        problem = "holds no hypernetwork" if folder.is_dir() else "is no folder"
        hint = "name the run folder of a variant that writes adapters, such as text-gated"
        raise UsageError(f"--hypernet {folder} {problem}", hint)
    refuse_links(folder)
    form = fits(HypernetForm, read_object(path), path)
    if form.method not in plugins.names("hypernets"):
        raise UsageError(f"{path}: no hypernetwork is called {form.method!r}", "a newer dynlora may have made it")
    reads = plugins.declared("hypernets", form.method, "READS")
    if (form.encoder is None) != (reads == "document"):
        raise UsageError(f"{path} is damaged: encoder: {form.method} reads a {reads}", COPY_AGAIN)
    weights = folder / HYPERNET_WEIGHTS
    if not weights.is_file():
        raise UsageError(f"{weights} is missing", COPY_AGAIN)
    if sha256_of(weights) != form.sha256:
        raise UsageError(f"{weights} is not the file that {HYPERNET} is about", COPY_AGAIN)
    tensors = _tensors(weights)
    net = _net(form, {name: t for name, t in tensors.items() if name.startswith(NET)}, path)
    conditions = {name.removeprefix(CONDITIONS): t for name, t in tensors.items() if name.startswith(CONDITIONS)}
    return Hypernetwork(folder, form, net, conditions, sha256_of(path))


def make_net(
    method: str, values: Mapping[str, Any], layers: list[tuple[str, int, int, int]], width: int, scale: float
) -> Hypernet:
    """A network with first values from torch's generator.

    Args:
        method: its variant.
        values: the variant's own keys.
        layers: name, inputs, outputs and components of each layer.
        width, scale: as of `Hypernet`.
    """
    form = section(options("variants", method)).model_validate(dict(values))
    kind = cast("type[Hypernet]", plugins.load("hypernets", method).Net)
    return kind(places_of(layers), form, width, scale)


def _net(form: HypernetForm, tensors: dict[str, Tensor], path: Path) -> Hypernet:
    """The network, with the numbers of the file. Its shapes are compared before memory is taken for them.

    Raises:
        UsageError: they are another network's.
    """
    layers = [(layer.name, layer.d_in, layer.d_out, layer.rank) for layer in form.layers]
    arguments = (form.method, form.options, layers, form.width, form.scale)
    names = {name.removeprefix(NET) for name in tensors}
    try:
        with torch.device("meta"):
            planned = make_net(*arguments)
            planned.make_room(names)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: options.{first_fault(error)}", COPY_AGAIN) from None
    except RuntimeError as error:  # sizes that no tensor can have
        raise UsageError(f"{path} is damaged: {error}", COPY_AGAIN) from None
    wanted = {NET + name: tuple(tensor.shape) for name, tensor in planned.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        said = f"{odd} has the shape {found.get(odd)} there, and {wanted.get(odd)} by {HYPERNET}"
        raise UsageError(f"{path.with_name(HYPERNET_WEIGHTS)} is of another network: {said}", COPY_AGAIN)
    if planned.parameter_count != form.parameters:
        said = f"parameters: {form.parameters:,}, and there are {planned.parameter_count:,}"
        raise UsageError(f"{path} is damaged: {said}", COPY_AGAIN)
    with seeded(0):  # draws first values, which are read over at once
        net = make_net(*arguments)
    net.make_room(names)
    net.load_state_dict({name.removeprefix(NET): tensor for name, tensor in tensors.items()})
    return net.requires_grad_(False).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}", COPY_AGAIN) from None
    odd = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if odd:
        raise UsageError(f"{path} is damaged: {odd} holds {tensors[odd].dtype}, not floating point", COPY_AGAIN)
    check_numbers(tensors, path)
    return tensors
