"""The library as a folder. No torch here: looking into a library and taking an update out of it are quick.

    LIB/
      library.json         base, encoder, one record per update, calibration: the truth about what is in it
      adapters/NAME/       a plain PEFT adapter
      keys/NAME.npy        its keys: [N, D] fp32, rows of length 1
      keys/NAME.jsonl      the texts of the keys
      held_out/NAME.jsonl  rows that its training never saw, for calibration
      report.html          of `dynlora library calibrate`
      pending              the update that is being added or removed, while that goes on

Files come first and library.json last when an update is added, the other way round when it is removed. Should the
process be killed between the two, `pending` says whose files to remove, and the next command that writes does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import fits, read_object, refuse_links
from dynlora_cli.files.place import claimed
from dynlora_cli.files.whole import remove, sha256_of, sync, unfinished, write_json, write_text
from dynlora_cli.library.forms import SCHEMA_VERSION, BaseOf, Card, EncoderOf, EntryForm, LibraryForm, Origin, is_name
from dynlora_cli.text import did_you_mean, to_type

LIBRARY = "library.json"
ADAPTERS, KEYS, HELD_OUT = "adapters", "keys", "held_out"
REPORT = "report.html"
PENDING = "pending"
EMPTY = LibraryForm(schema_version=1, base=None, encoder=None, entries=[], calibration=None)


@dataclass(frozen=True)
class Paths:
    """Where the files of one update are.

    Attributes:
        root: the library's folder.
        name: of the update.
    """

    root: Path
    name: str

    @property
    def adapter(self) -> Path:
        return self.root / ADAPTERS / self.name

    @property
    def vectors(self) -> Path:
        return self.root / KEYS / f"{self.name}.npy"

    @property
    def texts(self) -> Path:
        return self.root / KEYS / f"{self.name}.jsonl"

    @property
    def held_out(self) -> Path:
        return self.root / HELD_OUT / f"{self.name}.jsonl"

    def all(self) -> list[Path]:
        """Everything that belongs to the update, and what a copy that was cut short leaves."""
        return [self.adapter, unfinished(self.adapter), self.vectors, self.texts, self.held_out]


@dataclass(frozen=True)
class Entry:
    """One update of a library.

    Attributes:
        root: the library's folder.
        form: its record.
    """

    root: Path
    form: EntryForm

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def paths(self) -> Paths:
        return Paths(self.root, self.name)

    @property
    def folder(self) -> Path:
        """Its adapter, as PEFT reads it."""
        return self.paths.adapter

    @property
    def date(self) -> str:
        """The day that the update is about, YYYY-MM-DD: the newer of two is preferred."""
        return self.form.date

    @property
    def tags(self) -> list[str]:
        return self.form.tags

    @property
    def sources(self) -> list[Origin]:
        """The files that its keys come from."""
        return self.form.sources

    @property
    def sha256(self) -> str:
        """Of its tensors' file."""
        return self.form.sha256

    @property
    def data_sha256(self) -> str | None:
        """Of the rows that it was trained on, as in dynlora.json."""
        return self.form.data_sha256

    @property
    def keys(self) -> int:
        """How many keys it has."""
        return self.form.vectors.count

    @property
    def held_out(self) -> int:
        """How many held-out rows there are to calibrate with."""
        return self.form.held_out.count

    @property
    def card(self) -> Card:
        return self.form.card

    @property
    def files(self) -> dict[Path, str]:
        """Every file of the update with its SHA-256."""
        own = {self.folder / name: digest for name, digest in self.form.files.items()}
        return own | {
            self.paths.vectors: self.form.vectors.sha256,
            self.paths.texts: self.form.texts.sha256,
            self.paths.held_out: self.form.held_out.sha256,
        }

    @property
    def bytes(self) -> int:
        """What its files take on the disk, those that are there."""
        return sum(file.stat().st_size for file in self.files if file.is_file())

    def damage(self) -> list[str]:
        """What is wrong with its files, a sentence each; all of them are read.

        Raises:
            UsageError: a link leads out of the library.
        """
        for folder in (self.root, self.root / ADAPTERS, self.root / KEYS, self.root / HELD_OUT, self.folder):
            if folder.is_dir():
                refuse_links(folder)
        found = []
        for file, digest in self.files.items():
            if not file.is_file():
                found.append(f"{file} is missing")
            elif sha256_of(file) != digest:
                found.append(f"{file} has changed since it was added")
        return found

    def check(self) -> None:
        """Refuse an update whose files are not what was added.

        Raises:
            UsageError: something is missing or has changed.
        """
        if found := self.damage():
            raise UsageError(
                "\n".join(found), f"bring the files back, or: {to_type('library', 'remove', self.root, self.name)}"
            )


class Library:
    """What library.json says.

    Args:
        root: the folder.
        form: the content of library.json.
    """

    def __init__(self, root: Path, form: LibraryForm) -> None:
        self.root, self.form = root, form

    @classmethod
    def open(cls, root: Path) -> Library:
        """Read a library.

        Raises:
            UsageError: there is none, or its library.json is damaged or of a later version.
        """
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise UsageError(
                f"the library {root} {problem}", f"{to_type('library', 'add', root, '--adapter', 'FOLDER')} makes one"
            )
        if not (root / LIBRARY).is_file():
            raise UsageError(f"{root} is no library ({LIBRARY} is missing)", "name the folder with library.json in it")
        return cls(root, _read(root))

    @property
    def base(self) -> BaseOf | None:
        """The model that all updates are for; None of an empty library."""
        return self.form.base

    @property
    def encoder(self) -> EncoderOf | None:
        """What made the keys; None of an empty library."""
        return self.form.encoder

    @property
    def entries(self) -> list[Entry]:
        """The updates, in the order in which they were added."""
        return [Entry(self.root, form) for form in self.form.entries]

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What `dynlora library calibrate` has learned; None where it has not run."""
        return self.form.calibration

    @property
    def seen(self) -> list[str]:
        """The updates that the calibration has learned from; no other is ever activated."""
        names = (self.calibration or {}).get("entries")
        return names if isinstance(names, list) else []

    @property
    def pending(self) -> str | None:
        """The update that a process adds or removes, or did when it was killed; anybody may have written this."""
        path = self.root / PENDING
        if not path.is_file() or path.is_symlink():
            return None
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(100).strip()

    def entry(self, name: str) -> Entry:
        """The update of a name.

        Raises:
            UsageError: there is none.
        """
        names = [entry.name for entry in self.entries]
        if name not in names:
            there = f"there are: {', '.join(names)}" if names else "it is empty"
            raise UsageError(f"{self.root} has no update {name!r}{did_you_mean(name, names)}", there)
        return self.entries[names.index(name)]

    def refuse_taken(self, name: str) -> None:
        """Check that an update can get this name, on every file system.

        Raises:
            UsageError: it cannot.
        """
        taken = {entry.name.lower(): entry.name for entry in self.entries}
        if there := taken.get(name.lower()):
            first = f"remove it first: {to_type('library', 'remove', self.root, there)}"
            raise UsageError(f"{self.root} has an update {there!r} already", f"choose another --name, or {first}")


class WritableLibrary(Library):
    """A library that this process alone may change; made by `library_for_writing`."""

    def put(self, form: EntryForm, base: BaseOf, encoder: EncoderOf) -> None:
        """Write down an update whose files are in place: from here on it is part of the library."""
        self._write(base=base, encoder=encoder, entries=[*self.form.entries, form])
        self._settled()

    @contextmanager
    def adding(self, name: str) -> Iterator[None]:
        """While the files of an update are made: unless `put` follows, they vanish.

        Raises:
            UsageError: the name is taken.
        """
        self.refuse_taken(name)
        self._begin(name)
        try:
            yield
        except BaseException:
            if name not in {entry.name for entry in self.entries}:
                self._sweep(name)
            raise

    def remove(self, name: str) -> bool:
        """Take an update out, with its adapter, keys, texts, held-out rows and all that was learned with it.

        Returns:
            Whether the calibration had seen it and went with it.

        Raises:
            UsageError: there is none of that name.
        """
        self.entry(name)
        seen = name in self.seen
        rest = [form for form in self.form.entries if form.name != name]
        self._begin(name)
        if rest:
            self._write(entries=rest, calibration=None if seen else self.calibration)
        else:  # the next update chooses base and encoder anew
            self._write(**dict(EMPTY))
        self._sweep(name)
        return seen

    def put_calibration(self, calibration: dict[str, Any] | None) -> None:
        """Write down what was learned; None: nothing."""
        self._write(calibration=calibration)

    def settle(self) -> None:
        """End what a killed process began."""
        for file in (PENDING, LIBRARY, REPORT):
            remove(unfinished(self.root / file))
        if (name := self.pending) is None:
            return
        if is_name(name) and name not in {entry.name for entry in self.entries}:
            self._sweep(name)
        else:
            self._settled()

    def _begin(self, name: str) -> None:
        write_text(self.root / PENDING, name)

    def _settled(self) -> None:
        remove(self.root / PENDING)

    def _sweep(self, name: str) -> None:
        """Remove all files of a name that library.json does not have, and what was learned where that was given up."""
        for path in Paths(self.root, name).all():
            remove(path)
        if self.calibration is None:
            remove(self.root / REPORT)
        for folder in (ADAPTERS, KEYS, HELD_OUT):
            if (self.root / folder).is_dir():
                sync(self.root / folder)
                if not any((self.root / folder).iterdir()):
                    (self.root / folder).rmdir()
        self._settled()

    def _write(self, **changes: Any) -> None:
        form = self.form.model_copy(update=changes)
        write_json(self.root / LIBRARY, form.model_dump())
        self.form = form


@contextmanager
def library_for_writing(root: Path, *, new: bool = False) -> Iterator[WritableLibrary]:
    """Hold a library as its only writer; what a killed process has left half done is put in order first.

    Args:
        root: its folder.
        new: make an empty one where the folder is absent or empty. It goes again if nothing is put into it.

    Raises:
        UsageError: there is no library, another process writes to it, or it may not be written.
    """
    if not new:
        Library.open(root)
    with claimed(root, "the library", lambda _: False) as place:
        made, first = not root.exists(), new and not (root / LIBRARY).exists()
        if first:
            _make_empty(root, place.work)
        library = WritableLibrary(root, Library.open(root).form)
        library.settle()
        try:
            yield library
        finally:
            if first and not library.entries:
                remove(root / LIBRARY)
                if made:
                    root.rmdir()


def _make_empty(root: Path, work: Path) -> None:
    """A library without updates, in a folder that is absent or empty but for our own."""
    if root.exists() and any(entry != work for entry in root.iterdir()):
        raise UsageError(f"{root} is no library, and not empty", "name a new folder, or that of a library")
    root.mkdir(exist_ok=True)
    write_json(root / LIBRARY, EMPTY.model_dump())


def _read(root: Path) -> LibraryForm:
    path = root / LIBRARY
    refuse_links(root)
    data = read_object(path)
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(f"{path} is of version {version}; this dynlora reads {SCHEMA_VERSION}", "update dynlora")
    form = fits(LibraryForm, data, path)
    names = [entry.name.lower() for entry in form.entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{path} is damaged: it has the update {twice!r} twice", "copy the files again")
    if form.entries and not (form.base and form.encoder):
        raise UsageError(f"{path} is damaged: it has updates and no base or no encoder", "copy the files again")
    return form
