"""A library with its base and its encoder in memory: what calibration and evaluation start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN
from dynlora_cli.library.add import describe_base, refuse_other_kind
from dynlora_cli.library.held_out import HeldOut, read_held_out, unreadable
from dynlora_cli.library.library import Entry, Library
from dynlora_cli.models.load import Base
from dynlora_cli.models.place import Place
from dynlora_cli.retrieval.encoders import Encoder, make_encoder
from dynlora_cli.text import to_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A library, ready to decide and to measure.

    Attributes:
        library: as it was when it was opened.
        first: one of its adapters, by which the base was found.
        place: where the base lies.
        tokenizer: of rows that are read from files.
        base: in memory.
        encoder: of the keys.
    """

    library: Library
    first: Adapter
    place: Place
    tokenizer: PreTrainedTokenizerBase
    base: Base
    encoder: Encoder

    def adapter(self, name: str) -> Adapter:
        """The adapter of an update."""
        return read_adapter(self.library.entry(name).folder, self.place.options.name_or_path)

    def held_out(self, entry: Entry) -> list[HeldOut]:
        """The held-out rows of an update, all of which the base can read.

        Raises:
            UsageError: the file is damaged, or a row is none of this base.
        """
        known = int(self.base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        rows = read_held_out(entry)
        fault = next((fault for row in rows if (fault := unreadable(row, known, self.base.files.context_length))), None)
        if fault:
            raise UsageError(f"{entry.paths.held_out} is damaged: {fault}", COPY_AGAIN)
        return rows


def refuse_empty(library: Library) -> None:
    """Check that there is an update at all.

    Raises:
        UsageError: there is none.
    """
    if not library.entries:
        raise UsageError(
            f"the library {library.root} is empty", to_type("library", "add", library.root, "--adapter", "FOLDER")
        )


def check_all(library: Library) -> list[Entry]:
    """The updates of a library, none of which is damaged.

    Raises:
        UsageError: there are none, or files have changed.
    """
    refuse_empty(library)
    for entry in library.entries:
        entry.check()
    return library.entries


def load(root: Path, base: str | None = None, trust_remote_code: bool = False) -> Loaded:
    """Read a library and load its base, and the encoder of its keys.

    Args:
        root: its folder.
        base: the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run.

    Raises:
        UsageError: it is empty or damaged, or base or encoder are not those of the keys.
        MachineError: base or encoder are not on this machine.
    """
    library = Library.open(root)
    entries = check_all(library)
    first = read_adapter(entries[0].folder, base)
    for entry in entries[1:]:
        refuse_other_kind(root, first, read_adapter(entry.folder, base))
    place = find_base(first, base, trust_remote_code)
    found = describe_base(first, place)
    assert library.base is not None
    assert library.encoder is not None
    if found.fingerprint != library.base.fingerprint:
        raise UsageError(
            f"{place.folder} is not the base of {root}: its fingerprint is another", "name the right one with --base"
        )
    tokenizer = read_tokenizer(first, place)
    in_memory = base_in_memory(first, place, tokenizer)
    identity = found.fingerprint["sampled_sha256"]
    encoder = make_encoder(library.encoder.name, in_memory.model, tokenizer, identity)
    if encoder.fingerprint != library.encoder.fingerprint:
        raise UsageError(
            f"the keys of {root} were made by another {library.encoder.name} than this one",
            "bring the encoder back as it was, or make a new library",
        )
    return Loaded(library, first, place, tokenizer, in_memory, encoder)


def names_of(entries: Sequence[Entry]) -> str:
    """Names with commas between them."""
    return ", ".join(entry.name for entry in entries)
