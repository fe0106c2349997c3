"""The documents that an adapter is made from: text files, or tables with a column `text`. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dynlora_cli.config.sections import Source
from dynlora_cli.data.forms import BadRowError, refuse_half_characters
from dynlora_cli.data.row_files import READERS, TEXT_SUFFIXES, kind_of, read_rows
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.runs.record import RECORD
from dynlora_cli.text import is_utf8

MOST_CHARACTERS = 20_000_000  # of all documents: some 10,000 chunks, which a model reads for days
LONGEST_TITLE = 80  # characters
AS_TEXT = {
    ".pdf": "pdftotext FILE.pdf FILE.txt",
    ".docx": "pandoc FILE.docx -o FILE.md",
    ".odt": "pandoc FILE.odt -o FILE.md",
    ".epub": "pandoc FILE.epub -o FILE.md",
    ".html": "pandoc FILE.html -o FILE.md",
    ".htm": "pandoc FILE.htm -o FILE.md",
}


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        name: of the file, without its folder.
        path: as it was named, or as it was found in a folder.
        texts: of a text file the whole; of a table one for each row. No chunk goes over the end of one.
        sha256: of the file.
    """

    name: str
    path: Path
    texts: tuple[str, ...]
    sha256: str

    @property
    def title(self) -> str:
        """Its first line, if that is a heading; else empty."""
        first = self.texts[0].strip().split("\n")[0].strip()
        heading = first.startswith("#") or not first.endswith((".", "!", "?", ":", ",", ";"))
        return first.lstrip("# ") if heading and len(first) <= LONGEST_TITLE else ""

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


def read_documents(paths: Iterable[Path], notes: list[str]) -> list[Document]:
    """All documents, in the order in which they were named; of a folder each file.

    Args:
        paths: of files or folders.
        notes: what was chosen or left out is added here.

    Raises:
        UsageError, DataError: none is named, one is missing, empty, twice there or no text, or they are too long.
    """
    found: dict[Path, Document] = {}
    for path in paths:
        for document in _read(path, notes):
            place = document.path.resolve()
            if place in found:
                raise UsageError(f"--document {document.path} is named twice", "name each document once")
            found[place] = document
    if not found:
        raise UsageError("no document is named", "name one: --document FILE, such as guide.md")
    characters = sum(document.characters for document in found.values())
    if characters > MOST_CHARACTERS:
        raise UsageError(
            f"the documents have {characters:,} characters, and at most {MOST_CHARACTERS:,} go into one adapter",
            "name fewer; for so many texts, passages that are looked up serve better: dataset.retrieve",
        )
    return list(found.values())


def _read(path: Path, notes: list[str]) -> list[Document]:
    """The documents of a file or a folder."""
    if path.suffix.lower() in AS_TEXT and path.is_file():
        text = f"--document {path}: files of the kind {path.suffix} are not read"
        raise DataError(text, f"make a text of it first: {AS_TEXT[path.suffix.lower()]}")
    if not is_utf8(str(path)):
        raise UsageError(f"--document: the name {path.name!a} is no text in UTF-8", "rename the file")
    # What is no file must not be taken for the name of a data set of the hub.
    name = str(path) if path.exists() or path.is_absolute() else f"./{path}"
    try:
        if path.is_dir():
            return [_document(file, notes) for file in _files_of(path, notes)]
        (table,) = tables(Source(path=name), notes, held_out=False)
        return [_document(Path(table.name), notes)]
    except (UsageError, DataError) as error:
        raise type(error)(f"--document: {error.message.removeprefix('dataset: ')}", error.hint) from None


def _document(file: Path, notes: list[str]) -> Document:
    texts = [_text_of(place, row) for place, row in read_rows(file, notes)]
    found = tuple(text for text in texts if text.strip())
    if not found:
        raise DataError(f"{file}: no text", "the file is empty")
    return Document(file.name, file, found, sha256_of(file))


def _files_of(folder: Path, notes: list[str]) -> list[Path]:
    """All texts and tables of texts below a folder, whatever they are called; rows of a recipe are another matter.

    Nothing hidden, nothing of a run of ours, and nothing to which a link leads that is not in the folder.

    Raises:
        DataError: there is none, or a table is damaged.
    """
    chosen, left_out = dict[Path, Path](), []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not (file.is_file() or file.is_symlink()):
            continue
        ours = any((folder / parent / RECORD).is_file() for parent in inside.parents)
        if is_utf8(str(inside)) and not ours and file.resolve().is_relative_to(folder.resolve()) and _holds_text(file):
            chosen.setdefault(file.resolve(), inside)
        else:
            left_out.append(inside)
    said = f"; left out: {_listed(left_out)}" if left_out else ""
    if not chosen:
        hint = f"name a folder of texts (.txt, .md), or of tables with a column 'text'{said}"
        raise DataError(f"no document in the folder {folder}", hint)
    notes.append(f"{folder}: reading {_listed(list(chosen.values()))}{said}")
    return [folder / inside for inside in chosen.values()]


def _listed(paths: Sequence[Path]) -> str:
    names = [str(path) if is_utf8(str(path)) else ascii(str(path)) for path in paths[:4]]
    return ", ".join(names) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _holds_text(file: Path) -> bool:
    """Whether a file of a folder is a text that is not empty, or a table of such; a folder has others besides."""
    if not file.is_file() or kind_of(file) not in READERS or not file.stat().st_size:
        return False
    if kind_of(file) in TEXT_SUFFIXES:
        return True
    try:
        return any("text" in row for _, row in islice(read_rows(file, []), 1))
    except DataError:
        if kind_of(file) == ".json":  # settings, as a rule
            return False
        raise


def _text_of(place: str, row: dict[str, object]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f"{place}: a document is a text, or rows with a column 'text'; found {', '.join(row)}")
    try:
        refuse_half_characters(text)
    except BadRowError as error:
        raise DataError(f"{place}: {error}") from None
    return text
