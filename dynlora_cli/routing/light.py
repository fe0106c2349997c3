"""A router of a library without its base in memory: for whoever hands requests on, such as a proxy."""

from __future__ import annotations

from pathlib import Path

from dynlora_cli.errors import UsageError
from dynlora_cli.library.library import Library
from dynlora_cli.retrieval.encoders import BASE, Encoder, model_encoder
from dynlora_cli.routing.router import KEYS, Context, needs_of
from dynlora_cli.text import to_type


def light_context(root: Path, name: str) -> Context:
    """What a router needs that goes by the text of a request alone: the library, and the encoder where it is asked for.

    Args:
        root: the library's folder.
        name: of the router.

    Raises:
        UsageError: there is no library or no such router, or the keys were made by the base model itself.
        MachineError: the encoder is not on this machine.
    """
    library = Library.open(root)
    return Context(library=library, encoder=light_encoder(library) if KEYS in needs_of(name, library) else None)


def light_encoder(library: Library) -> Encoder:
    """The encoder of a library's keys, which must not be the base.

    Raises:
        UsageError: it is, or it is another than the one that made the keys.
        MachineError: it is not on this machine.
    """
    if library.encoder is None:
        raise UsageError(
            f"the library {library.root} is empty", to_type("library", "add", library.root, "--adapter", "FOLDER")
        )
    if library.encoder.name == BASE:
        raise UsageError(
            f"the keys of {library.root} were made by the base model, which is not in memory here",
            "make a library whose keys are of another encoder: dynlora library add LIB --encoder minilm",
        )
    encoder = model_encoder(library.encoder.name)
    if encoder.fingerprint != library.encoder.fingerprint:
        raise UsageError(
            f"the keys of {library.root} were made by another {library.encoder.name} than this one",
            "bring the encoder back as it was, or make a new library",
        )
    return encoder
