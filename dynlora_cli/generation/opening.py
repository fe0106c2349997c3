"""What an engine starts from: adapters of one base that write text, each with a name, and the base in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.mix import RESERVED
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.comparable import stored_otherwise
from dynlora_cli.library import loaded
from dynlora_cli.library.add import describe_base
from dynlora_cli.library.library import Library
from dynlora_cli.models.find import find_model
from dynlora_cli.models.load import Base, load_base
from dynlora_cli.models.place import Place
from dynlora_cli.retrieval.encoders import Encoder
from dynlora_cli.text import to_type

ONE_BASE = "adapters that are in memory together have one base: open them one by one"


@dataclass(frozen=True)
class Wanted:
    """What a person says of base, adapters and library.

    Attributes:
        adapters: folders, as `--adapter` names them.
        library: a folder; all of its adapters can be named, and a router can choose among them.
        base: the base model, in place of the one on record; alone: no adapters at all.
        router: by name; None: the default.
        options: of the router, as `--set` was given them.
        trust_remote_code: code that comes with the base may run.
    """

    adapters: Sequence[Path] = ()
    library: Path | None = None
    base: str | None = None
    router: str | None = None
    options: Sequence[str] = ()
    trust_remote_code: bool = False


@dataclass
class Opened:
    """A base in memory, and its adapters by name.

    Attributes:
        adapters: by name, those that were named themselves first.
        library, encoder: where there is a library.
        notes: for the person.
    """

    base: Base
    place: Place
    adapters: dict[str, Adapter]
    library: Library | None = None
    encoder: Encoder | None = None
    notes: list[str] = field(default_factory=list)


def open_all(wanted: Wanted) -> Opened:
    """Read the adapters, and load their base.

    Raises:
        UsageError: nothing is named; one is a classifier; they have different bases, or two have one name.
        MachineError: the base is not on this machine.
    """
    named = [read_adapter(folder, wanted.base, routed=True) for folder in wanted.adapters]
    if wanted.library is None:
        return _without_library(named, wanted)
    library = loaded.load(wanted.library, wanted.base, wanted.trust_remote_code)
    _refuse_silent(library.first, wanted.library)
    opened = Opened(library.base, library.place, {}, library.library, library.encoder)
    entries = {entry.name: library.adapter(entry.name) for entry in library.library.entries}
    for name, adapter in names_of(named, taken=list(entries)).items():
        admit(opened, name, adapter, wanted)
    for name, adapter in entries.items():
        opened.adapters[name if name not in RESERVED else f"{wanted.library.name}/{name}"] = adapter
    return opened


def _without_library(named: Sequence[Adapter], wanted: Wanted) -> Opened:
    if not named:
        return _base_alone(wanted)
    for adapter in named:
        _refuse_silent(adapter, adapter.folder)
    place = find_base(named[0], wanted.base, wanted.trust_remote_code)
    opened = Opened(base=_nothing(), place=place, adapters={})
    for name, adapter in names_of(named).items():
        admit(opened, name, adapter, wanted)
    opened.base = base_in_memory(named[0], place, read_tokenizer(named[0], place))
    return opened


def _nothing() -> Base:
    """Stands for a base until all adapters are checked: loading it takes longest."""
    return None  # type: ignore[return-value]


def _base_alone(wanted: Wanted) -> Opened:
    """A base without adapters."""
    if not wanted.base:
        raise UsageError("no adapter, library or base is named", "name one: --adapter FOLDER, --library L or --base M")
    options = Model(name_or_path=wanted.base, trust_remote_code=wanted.trust_remote_code)
    place = Place(options, find_model(options)[0], None, True)
    place.files.refuse_code()
    if place.files.config.get("is_encoder_decoder"):
        place = Place(options.model_copy(update={"task": "seq2seq-lm"}), place.folder, None, True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(place.options, place.files, place.files.tokenizer, device=device, labels=None, seed=0)
    base.model.requires_grad_(False)
    base.model.eval()
    return Opened(base, place, {})


def names_of(adapters: Sequence[Adapter], taken: Sequence[str] = ()) -> dict[str, Adapter]:
    """A name for each adapter: its own, or its folder where another has that, or the word means something else.

    Raises:
        UsageError: the same adapter twice.
    """
    folders = [adapter.folder.resolve() for adapter in adapters]
    if len(set(folders)) < len(folders):
        raise UsageError(
            f"two of these adapters are the same: {', '.join(map(str, folders))}", "name each of them once"
        )
    shorter = [adapter.name for adapter in adapters]
    longer = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    own = Counter([*RESERVED, *taken, *shorter])
    names = [one if own[one] == 1 else more for one, more in zip(shorter, longer, strict=True)]
    own = Counter([*taken, *names])
    names = [name if own[name] == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return dict(zip(names, adapters, strict=True))


def admit(opened: Opened, name: str, adapter: Adapter, wanted: Wanted) -> None:
    """Let an adapter in, if it belongs to the same base and writes text.

    Raises:
        UsageError: it does not.
    """
    if name in opened.adapters or name in RESERVED:
        raise UsageError(
            f"there is an adapter {name!r} already" if name in opened.adapters else f"no adapter can be called {name!r}"
        )
    _refuse_silent(adapter, adapter.folder)
    place = find_base(adapter, wanted.base, wanted.trust_remote_code)
    first = opened.place
    if place.folder != first.folder:
        mine, theirs = describe_base(adapter, place), describe_base(adapter, first)
        if mine.fingerprint != theirs.fingerprint:
            raise UsageError(
                f"{name} is an adapter of {place.folder}, and the base here is {first.folder}: another model by its "
                "fingerprint",
                ONE_BASE,
            )
    if place.options.task != first.options.task:
        raise UsageError(f"{name} is for {place.options.task}, and the base here for {first.options.task}", ONE_BASE)
    if adapter.record and (differing := stored_otherwise(first, place)):
        opened.notes.append(
            f"{name} was trained on this base loaded otherwise: {differing}; here it is as for the first"
        )
    if adapter.note:
        opened.notes.append(adapter.note)
    opened.adapters[name] = adapter


def _refuse_silent(adapter: Adapter, what: Path) -> None:
    if does := plugins.declared("tasks", adapter.task, "SILENT"):
        raise UsageError(
            f"{what} is for {adapter.task}: {does}, and writes no text",
            f"to measure it: {to_type('eval', '--adapter', adapter.folder)}",
        )
