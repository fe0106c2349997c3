"""Puts an update into a library. `add` is the table of contents."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli.adapters.adapter import IMAGE_TASK, Adapter, Factors
from dynlora_cli.adapters.base import base_in_memory, find_base, label_names, read_tokenizer
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.data.earlier import run_folder
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.whole import sha256_of, whole_folder
from dynlora_cli.library.addition import Addition
from dynlora_cli.library.forms import A_NAME, BaseOf, Card, EncoderOf, EntryForm, is_name
from dynlora_cli.library.held_out import choose_held_out, write_held_out
from dynlora_cli.library.keys import MOST_KEYS, Key, choose, write_texts, write_vectors
from dynlora_cli.library.library import ADAPTERS, Entry, Paths, WritableLibrary, library_for_writing
from dynlora_cli.library.sources import Found, find_passages, find_rows
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.place import Place
from dynlora_cli.retrieval.encoders import BASE, Encoder, full_name, make_encoder
from dynlora_cli.runs.folder import RECORD, copy_tokenizer
from dynlora_cli.text import counted, to_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tell = Callable[[str], None]


def add(root: Path, wanted: Addition, tell: Tell) -> tuple[Entry, list[str]]:
    """Copy an adapter into a library, and make its keys. If that fails, the library is as it was.

    Args:
        root: the library's folder, which is made if it is absent or empty.
        wanted: what to add.
        tell: takes a line for each part that begins.

    Returns:
        The new update, and notes for the person.

    Raises:
        DynloraError: with the exit code that fits.
    """
    adapter = read_adapter(wanted.adapter, wanted.base)
    if adapter.task == IMAGE_TASK:
        raise UsageError(
            f"{adapter.folder} is for {IMAGE_TASK}, and a library finds updates by texts that a model reads and writes",
            "keep it in a folder of its own; `dynlora merge` puts several of a pipeline together",
        )
    name = wanted.name or default_name(adapter.name)
    place = find_base(adapter, wanted.base, wanted.trust_remote_code)
    _refuse_unknown_tokens(adapter, place)
    base = describe_base(adapter, place)
    tokenizer = read_tokenizer(adapter, place)
    with library_for_writing(root, new=True) as library, library.adding(name):
        _refuse_other_base(library, base)
        if library.entries:
            refuse_other_kind(library.root, read_adapter(library.entries[0].folder, wanted.base), adapter)
        files = _copy(library, adapter, name, wanted.base)
        found = _texts(adapter, place, tokenizer, wanted)
        keys = _chosen(found, adapter)
        encoder = _encoder(library, wanted, adapter, place, tokenizer, base)
        tell(f"{counted(len(keys), 'key')} by the encoder {encoder.name}")
        made_by = EncoderOf(name=encoder.name, dimension=encoder.dimension, fingerprint=encoder.fingerprint)
        _refuse_other_encoder(library, made_by)
        form = _write(library, wanted, adapter, name, files, found, keys, encoder)
        library.put(form, base, made_by)
        return library.entry(name), [*filter(None, [adapter.note]), *dict.fromkeys(found.notes)]


# -- before anything is written --------------------------------------------------------------------------------------


def default_name(text: str) -> str:
    """A name for an update, made of that of a run or a folder.

    Raises:
        UsageError: none can be.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64].rstrip("-._")
    if not is_name(name):
        raise UsageError(f"no name for an update can be made of {text!r}", f"give one with --name: {A_NAME}")
    return name


def describe_base(adapter: Adapter, place: Place) -> BaseOf:
    """What identifies the base that an adapter belongs to."""
    found = fingerprint(place.folder, place.files.config)
    kept: dict[Any, str] = {key: found[key] for key in ("sha256", "sampled_sha256")}
    kind = str(place.files.config.get("model_type") or "")
    return BaseOf(name=place.options.name_or_path or adapter.base_name, model_type=kind, fingerprint=kept)


def _refuse_other_base(library: WritableLibrary, base: BaseOf) -> None:
    if library.base and library.base.fingerprint != base.fingerprint:
        raise UsageError(
            f"{library.root} holds updates of {library.base.name}, and this adapter is one of {base.name}, which is "
            "another model by its fingerprint",
            "put it into a library of its own: a library has one base",
        )


def refuse_other_kind(root: Path, first: Adapter, other: Adapter) -> None:
    """Check that two adapters can be measured on the same rows.

    Raises:
        UsageError: they are for different tasks, or classify into different classes.
    """
    if first.task != other.task:
        differ = f"{first.task}, and {other.name} is one for {other.task}"
    elif label_names(first) != label_names(other):
        differ = f"other classes than those of {other.name}"
    else:
        return
    raise UsageError(
        f"{root} holds updates for {differ}", "put it into a library of its own: a library has one task and one head"
    )


def _refuse_other_encoder(library: WritableLibrary, made_by: EncoderOf) -> None:
    if library.encoder and library.encoder.fingerprint != made_by.fingerprint:
        raise UsageError(
            f"the keys of {library.root} were made by another {library.encoder.name} than this one",
            "bring the encoder back as it was, or make a new library",
        )


# -- the parts -------------------------------------------------------------------------------------------------------


def _copy(library: WritableLibrary, adapter: Adapter, name: str, base: str | None) -> dict[str, str]:
    """Write the adapter as a plain PEFT folder, read it back, and give the hashes of its files.

    Raises:
        UsageError: the library has the same adapter already.
        DynloraError: it does not come back as it was.
    """
    folder = library.root / ADAPTERS / name
    with whole_folder(folder) as new:
        save(adapter, new)
        copy_tokenizer(adapter.folder, new)
        if adapter.record:
            shutil.copyfile(run_folder(adapter.folder) / RECORD, new / RECORD)
        digest = sha256_of(new / WEIGHTS)
        if twin := next((entry for entry in library.entries if entry.sha256 == digest), None):
            raise UsageError(f"{library.root} has this adapter already: {twin.name}", "the same tensors, by SHA-256")
        if not _same(adapter, read_adapter(new, base)):
            raise DynloraError(f"the copy of {adapter.folder} does not read back as it was", "please report this")
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _refuse_unknown_tokens(adapter: Adapter, place: Place) -> None:
    """Refuse an adapter with tokens that its base has no row for."""
    size = place.files.table_rows
    last = max((max(rows.indices) for rows in adapter.token_rows.values()), default=-1)
    if size is not None and last >= size:
        raise UsageError(
            f"{adapter.folder} has a row for token {last}, and the base's table has {size} rows: a library measures "
            "its updates, and the base beside them, on the same rows, which the base could not read",
            f"make a base that knows the tokens ({to_type('merge', '--adapter', adapter.folder)}) and train on that",
        )


def _same(one: Adapter, two: Adapter) -> bool:
    """Whether two adapters hold the same numbers."""
    whole = one.whole.keys() == two.whole.keys() and all(torch.equal(one.whole[n], two.whole[n]) for n in one.whole)
    layers = one.layers.keys() == two.layers.keys()
    rows = one.token_rows.keys() == two.token_rows.keys() and all(
        one.token_rows[n].indices == two.token_rows[n].indices
        and torch.equal(one.token_rows[n].rows_TI, two.token_rows[n].rows_TI)
        for n in one.token_rows
    )
    return whole and rows and layers and all(_same_layer(one.layers[name], two.layers[name]) for name in one.layers)


def _same_layer(one: Factors, two: Factors) -> bool:
    own = one.own.keys() == two.own.keys() and all(torch.equal(one.own[name], two.own[name]) for name in one.own)
    biases = [one.bias_O, two.bias_O]
    bias = biases == [None, None] or (None not in biases and torch.equal(one.bias_O, two.bias_O))  # type: ignore[arg-type]
    return own and bias and torch.equal(one.a_CI, two.a_CI) and torch.equal(one.b_OC, two.b_OC)


def _texts(adapter: Adapter, place: Place, tokenizer: PreTrainedTokenizerBase, wanted: Addition) -> Found:
    """Keys and held-out rows, from the run's rows or a file of rows, and from documents."""
    found = find_rows(adapter, place, tokenizer, wanted.data)
    if wanted.documents:
        passages = find_passages(wanted.documents)
        found.keys += passages.keys
        found.sources += passages.sources
        found.notes += passages.notes
    return found


def _chosen(found: Found, adapter: Adapter) -> list[Key]:
    """The keys to be kept; what is left out is told."""
    keys, different = choose(found.keys)
    if not keys:
        raise UsageError(
            f"{adapter.folder} does not say what it was trained on, so there is nothing to find it by",
            "name rows with --data FILE, or texts with --documents FILE",
        )
    if different > len(keys):
        found.notes.append(
            f"{len(keys):,} keys were kept of {different:,} texts, at most {MOST_KEYS:,}, by their hashes"
        )
    found.held_out = choose_held_out(found.held_out, [key.text for key in keys])
    if not found.held_out:
        found.notes.append("no held-out rows: calibration will know nothing of this update, which then stays off")
    return keys


def _encoder(
    library: WritableLibrary,
    wanted: Addition,
    adapter: Adapter,
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseOf,
) -> Encoder:
    """The library's encoder, or the one that a new library is to have; the base is loaded for its own alone."""
    name = full_name(wanted.encoder) if wanted.encoder else library.encoder.name if library.encoder else BASE
    model = base_in_memory(adapter, place, tokenizer).model if name == BASE else None
    return make_encoder(name, model, tokenizer, base.fingerprint["sampled_sha256"])


def _write(
    library: WritableLibrary,
    wanted: Addition,
    adapter: Adapter,
    name: str,
    files: dict[str, str],
    found: Found,
    keys: list[Key],
    encoder: Encoder,
) -> EntryForm:
    """Write keys, texts and held-out rows, and give the record of the update."""
    paths, record = Paths(library.root, name), adapter.record
    return EntryForm(
        name=name,
        date=_day(wanted, record, found.notes),
        tags=wanted.tags,
        sha256=files[WEIGHTS],
        data_sha256=(record.get("data") or {}).get("sha256"),
        trained=_ended(record),
        sources=found.sources,
        card=_card(adapter),
        files=files,
        vectors=write_vectors(paths.vectors, encoder.encode([key.text for key in keys])),
        texts=write_texts(paths.texts, keys),
        held_out=write_held_out(paths.held_out, found.held_out),
    )


def _ended(record: Mapping[str, Any]) -> str | None:
    """The day that a run ended; None where nobody says."""
    match = re.match(r"\d{4}-\d{2}-\d{2}", str(record.get("finished") or record.get("started") or ""))
    return match[0] if match else None


def _day(wanted: Addition, record: Mapping[str, Any], notes: list[str]) -> str:
    """The day that an update is about."""
    if known := wanted.date or _ended(record):
        return known
    today = time.strftime("%Y-%m-%d")
    notes.append(f"nothing says when this adapter was made: its date is today, {today}; --date sets another")
    return today


def _card(adapter: Adapter) -> Card:
    """What the run measured, as far as it says."""
    summary, trained = adapter.record.get("summary") or {}, adapter.record.get("trained")
    # Of an adapter that was pruned, the summary is of the cut, and `trained` that of the training before it.
    before = trained if isinstance(trained, dict) else summary
    losses = {"loss_before": before.get("loss_before"), "loss_after": summary.get("loss_after")}
    known = {key: loss for key, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)}
    rows = (adapter.record.get("data") or {}).get("val_rows")
    rows = rows if type(rows) is int and rows >= 0 else None
    return Card(rows=rows, parameters=adapter.parameters, **known)
