"""A trained router and its adapters as one folder, which is used like any adapter.

    out/name/
      router.json            method and options, and the adapters in the order of their columns, each with its hash
      router.safetensors     the router's numbers
      adapters/NAME/         each adapter, as plain PEFT files

Everything lies inside the folder, and nothing in it is followed out. There is no adapter_config.json in its root, for
PEFT has no such adapter and would put one of the many on the model. X-LoRA is the exception: PEFT knows it, and so it
is saved in PEFT's own form (adapters/xlora.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.find import ROUTER, ROUTER_WEIGHTS, WEIGHTS
from dynlora_cli.adapters.numbers import LARGEST, check_numbers
from dynlora_cli.adapters.side_by_side import SideBySide
from dynlora_cli.adapters.write import save
from dynlora_cli.config.options import options, section
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, VersionOne, first_fault, fits, read_object, refuse_links
from dynlora_cli.files.names import A_NAME, is_name
from dynlora_cli.files.whole import sha256_of, write_json
from dynlora_cli.lora.routers.gates import Gates

MEMBERS = "adapters"
MOST_MEMBERS = 1024


def _name(name: str) -> str:
    if not is_name(name):
        raise PydanticCustomError("name", f"Input should be a name: {A_NAME}")
    return name


class Member(BaseModel):
    """An adapter in router.json."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    name: Annotated[str, AfterValidator(_name)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RouterForm(BaseModel):
    """router.json. It may have been made by somebody else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    schema_version: VersionOne
    method: str
    options: dict[str, Any]
    adapters: Annotated[list[Member], Field(min_length=1, max_length=MOST_MEMBERS)]
    off: list[str] = []
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class RoutedAdapter(Adapter):
    """Adapters and the router that weighs them at every token. `layers` is empty: there is no single update.

    Attributes:
        method: the variant that trained the router.
        options: the variant's own keys.
        members: the adapters by name, in the order of their columns.
        tensors: the router's numbers.
        off: names of adapters that are left out when it is used; the others take over their weight.
    """

    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, Adapter] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    off: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in the components of all adapters, and in the router."""
        return sum(member.parameters for member in self.members.values()) + self.own_parameters

    @property
    def own_parameters(self) -> int:
        """Numbers of the router."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def components(self) -> int:
        return sum(member.components for member in self.members.values())

    @property
    def kind(self) -> str:
        return f"{gates_of(self.method).title} router over {len(self.members)} adapters"

    @contextmanager
    def put_on(self, model: PreTrainedModel) -> Iterator[Gates]:
        """The model with the adapters and the router inside the block, and as it was after it.

        Raises:
            UsageError: one of the adapters, or the router, does not fit the model.
        """
        placed = SideBySide(model, self.members, kinds=gates_of(self.method).mixes_kinds)
        try:
            gates = make_gates(self.method, self.options, placed, list(self.members), model)
            try:
                gates.load(self.tensors)
            except ValueError as error:
                text = f"{self.folder / ROUTER_WEIGHTS} is of another router: it {error}"
                raise UsageError(text, COPY_AGAIN) from None
            gates.off = frozenset(list(self.members).index(name) for name in self.off)
            gates.eval()
            with gates.watching(model), placed.routed(gates):
                yield gates
        finally:
            placed.close()


def gates_of(method: str) -> type[Gates]:
    """The class of a variant's router."""
    return cast("type[Gates]", plugins.load("variants", method).Gates)


def make_gates(
    method: str, values: Mapping[str, Any], placed: SideBySide, names: list[str], model: PreTrainedModel
) -> Gates:
    """A router with its first values, on the model's device."""
    form = section(options("variants", method)).model_validate(dict(values))
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    return gates_of(method)(placed.layers, names, form, hidden)


def is_routed(folder: Path) -> bool:
    """Whether a folder holds a router in the form of this file."""
    return (folder / ROUTER).is_file()


def write_routed(
    folder: Path, method: str, values: Mapping[str, Any], members: Mapping[str, Adapter], tensors: Mapping[str, Tensor]
) -> None:
    """Write a router and its adapters into a folder, router.json last; the bytes depend on the arguments only."""
    hashes = write_members(folder, members)
    (folder / ROUTER_WEIGHTS).write_bytes(to_bytes({name: tensors[name].cpu().contiguous() for name in tensors}))
    form = RouterForm(
        schema_version=1,
        method=method,
        options=dict(values),
        adapters=[Member(name=name, sha256=hashes[name]) for name in members],
        sha256=sha256_of(folder / ROUTER_WEIGHTS),
    )
    write_json(folder / ROUTER, form.model_dump())


def write_members(folder: Path, members: Mapping[str, Adapter]) -> dict[str, str]:
    """Write the adapters of a router below a folder; the hash of each one's tensors' file."""
    hashes = {}
    for name, member in members.items():
        own = folder / MEMBERS / name
        own.mkdir(parents=True)
        save(member, own)
        hashes[name] = sha256_of(own / WEIGHTS)
    return hashes


def read_routed(folder: Path, read: Any, record: dict[str, Any], note: str | None) -> RoutedAdapter:
    """The router in a folder, and its adapters.

    Args:
        folder: with router.json.
        read: reads an adapter from its folder.
        record: dynlora.json, or {}.
        note: how the folder was found.

    Raises:
        UsageError: it is damaged.
        MeasureError: a number is not finite.
    """
    path = folder / ROUTER
    form = fits(RouterForm, read_object(path), path)
    if form.method not in plugins.names("variants") or not plugins.declared("variants", form.method, "routes"):
        raise UsageError(f"{path}: no router is called {form.method!r}", "a newer dynlora may have made it")
    try:
        section(options("variants", form.method)).model_validate(form.options)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: options.{first_fault(error)}", COPY_AGAIN) from None
    names = [member.name for member in form.adapters]
    if len({name.lower() for name in names}) < len(names) or not set(form.off) <= set(names):
        raise UsageError(f"{path} is damaged: it names an adapter twice, or one in `off` that is not there", COPY_AGAIN)
    if set(form.off) >= set(names):
        raise UsageError(f"{path}: all adapters are `off`", "leave at least one on")
    if sha256_of(_file(folder / ROUTER_WEIGHTS)) != form.sha256:
        raise UsageError(f"{folder / ROUTER_WEIGHTS} is not the file that {ROUTER} is about", COPY_AGAIN)
    for member in form.adapters:
        weights = _file(folder / MEMBERS / member.name / WEIGHTS)
        if sha256_of(weights) != member.sha256:
            raise UsageError(f"{weights} is not the file that {ROUTER} is about", COPY_AGAIN)
    refuse_links(folder / MEMBERS)
    members = {name: read(folder / MEMBERS / name) for name in names}
    first = next(iter(members.values()))
    kept = ("base_model_name_or_path", "task_type", "revision", "fan_in_fan_out")
    return RoutedAdapter(
        folder,
        {},
        {"peft_type": None, **{key: first.config.get(key) for key in kept}},
        record,
        note=note,
        model_type=first.model_type,
        method=form.method,
        options=form.options,
        members=members,
        tensors=read_numbers(folder / ROUTER_WEIGHTS),
        off=tuple(form.off),
    )


def read_numbers(path: Path) -> dict[str, Tensor]:
    """The numbers of a router.

    Raises:
        UsageError: the file is missing or damaged.
        MeasureError: a number is not finite, or so large that the model's would not be.
    """
    try:
        tensors = load_file(_file(path))
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}", COPY_AGAIN) from None
    check_numbers(tensors, path)
    numbers = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in numbers.items():
        if tensor.numel() and not tensor.abs().max() <= LARGEST:
            raise MeasureError(f"{path}: {name} has numbers beyond {LARGEST:g} in it", COPY_AGAIN)
    return numbers


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path} is missing", COPY_AGAIN)
    return path
