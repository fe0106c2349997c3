"""Sources of a recipe to tables: local files (read by data/row_files.py) and folders, hub data sets, the built-in set.

Hub names go through `datasets.load_dataset`.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynlora_cli.config.adapter_section import LIBRARY_ROWS
from dynlora_cli.data import builtin as stdlib_docs
from dynlora_cli.data import shapes
from dynlora_cli.data.picture_folder import ENDINGS, captioned, picture_rows, without_picture
from dynlora_cli.data.row_files import (
    READERS,
    TEXT_SUFFIXES,
    holds_rows,
    kind_of,
    numbered,
    read_pieces,
    read_rows,
    refuse_unknown_kind,
    unfilled,
)
from dynlora_cli.data.rows.pieces import Piece, Row, in_pieces
from dynlora_cli.errors import DataError, MachineError, UsageError
from dynlora_cli.files.strict_json import loads
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Source

BUILTIN, SHAPES = "builtin:stdlib-docs", "builtin:shapes"
BUILT_IN: dict[str, Callable[[Literal["train", "val"]], Iterable[Row]]] = {
    BUILTIN: stdlib_docs.rows,
    SHAPES: shapes.rows,
}
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout"},
    "test": {"test", "testing"},
}
# Files about rows: LLaMA-Factory's list of sets, what `datasets` saves beside a set, and what a person should read.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
_ABOUT |= {f"{name}{ending}" for name in ("readme", "license", "changelog") for ending in (".md", ".txt")}


@dataclass(frozen=True, slots=True)
class Table:
    """One file or hub split.

    Args:
        name: what a person calls it.
        read: gives pairs of a place (`data.jsonl:3`) and a row.
        whole_text: it is one text file: a single row with the column `text`, to be cut into pieces.
        home: the folder from which paths in its rows count; None: it is no file.
        cut: gives the same rows in pieces, which need not be parsed yet; by default they are cut from `read`.
        file: that holds them, and nothing else does; None: there is no such file.
    """

    name: str
    read: Callable[[], Iterator[tuple[str, Row]]]
    whole_text: bool = False
    home: Path | None = None
    cut: Callable[[], Iterator[Piece]] | None = None
    file: Path | None = None

    def pieces(self) -> Iterator[Piece]:
        """Its rows, about a thousand at a time."""
        return self.cut() if self.cut else in_pieces(self.read())


def tables(source: Source, notes: list[str], *, held_out: bool, streamed: bool = False) -> list[Table]:
    """The tables of one source; a folder has one for each file.

    Args:
        source: path, split, hub config.
        notes: what was chosen or left out is added here.
        held_out: whether validation rows are asked for; the built-in set keeps its own.
        streamed: a hub data set is read as it comes, and not downloaded first.

    Raises:
        UsageError: a local file is missing.
        MachineError: a hub data set is neither cached nor reachable.
        DataError: a folder without data files, an unknown kind of file, an unknown split.
    """
    if source.path.startswith("builtin:"):
        if source.path == LIBRARY_ROWS:
            text = "are those of the adapters that a router learns to choose from, and stand alone under dataset.train"
            raise UsageError(f"dataset: {LIBRARY_ROWS}: these rows {text}", "name files of rows")
        name = source.path
        if name not in BUILT_IN:
            raise UsageError(f"dataset: there is no {name!r}", f"the built-in data sets are {', '.join(BUILT_IN)}")
        part: Literal["train", "val"] = "val" if held_out or source.split != "train" else "train"
        return [Table(name, lambda: numbered(name, BUILT_IN[name](part)), home=Path())]
    if not is_local(source.path):
        return [_hub(source, streamed=streamed)]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _of_folder(path, source.split, notes)
    if path.is_file():
        return [_table(path, notes)]
    if not path.exists() and glob.has_magic(source.path):
        return _matching(path, notes)
    if path.exists():
        raise UsageError(f"dataset: {path} is no regular file, and rows are read more than once", "save them in one")
    raise UsageError(f"dataset: no file or folder {source.path}{_nearest(path)}", "paths start at the current folder")


def _matching(pattern: Path, notes: list[str]) -> list[Table]:
    """The tables of all files whose path matches a pattern such as `parts/*.jsonl`, in the order of their names."""
    files = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())
    if not files:
        raise UsageError(f"dataset: no file matches {pattern}", "paths start at the current folder")
    notes.append(f"{pattern}: {counted(len(files), 'file')}, from {files[0].name} to {files[-1].name}")
    return [_table(file, notes) for file in files]


def _of_folder(folder: Path, split: str, notes: list[str]) -> list[Table]:
    """The tables of a folder: files of rows, else pictures with their captions beside them, else texts."""
    shown = [file for file in sorted(folder.rglob("*")) if not _is_hidden(file.relative_to(folder))]
    files = [file for file in shown if file.is_file()]
    if not _tables_of(files) and (pictures := captioned(files)):
        captions = sum(picture.with_suffix(".txt") in files for picture in pictures)
        number = "each" if captions == len(pictures) else f"{captions}" if captions else "none"
        notes.append(
            f"{folder}: {counted(len(pictures), 'picture')}, {number} with its caption in a text file beside it"
        )
        if lone := without_picture(files, pictures):
            notes.append(
                f"{folder}: left out: {_listed(folder, lone)}, beside which there is no {', '.join(sorted(ENDINGS))}"
            )
        return [Table(str(folder), lambda: picture_rows(folder, pictures), home=folder)]
    return [_table(file, notes) for file in _files_of(folder, split, notes)]


def other_splits(source: Source) -> dict[str, list[Path]]:
    """Files of the splits `val` and `test` that belong to local training rows: of their folder, or beside their file.

    Beside `rows.jsonl` these are `rows_valid.jsonl` and the like, or else `valid.jsonl`, which names no set.
    """
    path = Path(source.path).expanduser()
    found: dict[str, list[Path]] = {"val": [], "test": []}
    is_pattern = glob.has_magic(source.path) and not path.exists()
    if source.path.startswith("builtin:") or is_pattern or _split_of(Path(path.name)) in found:
        return found
    if path.is_dir():
        files = {file: _split_of(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()}
        files = {file: split for file, split in files.items() if not _is_hidden(file.relative_to(path))}
    else:
        files = {file: _split_of(Path(file.name)) for file in sorted(path.parent.iterdir()) if file.is_file()}
    text = kind_of(path) in TEXT_SUFFIXES
    for split, chosen in found.items():
        chosen += [file for file, of in files.items() if of == split and kind_of(file) in READERS]
        if path.is_dir():
            found[split] = _tables_of(chosen) or [file for file in chosen if _is_text(file)]
            continue
        alike = [file for file in chosen if (kind_of(file) in TEXT_SUFFIXES) == text]
        of_set = [file for file in alike if _set_of(file) == _set_of(path)]
        found[split] = of_set or [file for file in alike if not _set_of(file)]
    return found


def _set_of(path: Path) -> list[str]:
    """The words of a file's name that do not name a split."""
    known = set().union(*_SPLIT_NAMES.values())
    return [word for word in re.split(r"[\W_]+", path.stem.lower()) if word and word not in known]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_local(name: str) -> bool:
    """Whether a source is built in, a file or a folder, be it a missing one; anything else is a name on the hub."""
    path = Path(name).expanduser()
    like_a_path = kind_of(path) in READERS or name.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    return like_a_path or path.exists()


def _nearest(path: Path) -> str:
    """`; in that folder: a.jsonl, b.jsonl`, nearest names first, or which folder is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f" (the folder {folder} does not exist)"
    shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    there = sorted(entry.name for entry in shown if entry.is_dir() or kind_of(entry) in READERS)
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(str(folder / name)) for name in near)}?"
    return f"; {folder.resolve()} holds: {', '.join(there[:8])}" if there else f" (no data files in {folder})"


def _files_of(folder: Path, split: str, notes: list[str]) -> list[Path]:
    """Data files of a folder: those of the split where file names tell splits, tables before texts."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    shown = [file for file in files if not _is_hidden(file.relative_to(folder))]
    chosen = _tables_of(shown) or [file for file in shown if _is_text(file)]
    if not chosen:
        there = f"it holds: {_listed(folder, shown)}; " if shown else "it is empty; "
        raise DataError(
            f"dataset: no data files in the folder {folder}", f"{there}expected: {', '.join(sorted(READERS))}"
        )
    splits = {file: _split_of(file.relative_to(folder)) for file in chosen}
    if any(splits.values()):
        wanted = _split_of(Path(split)) or split
        chosen = [file for file in chosen if splits[file] == wanted]
        if not chosen:
            there = ", ".join(sorted({name for name in splits.values() if name}))
            raise DataError(f"dataset: no file of the split {split!r} in {folder}", f"splits there: {there}")
    left_out = [file for file in shown if file not in chosen]
    note = f"{folder}: reading {_listed(folder, chosen)}"
    notes.append(note + (f"; left out: {_listed(folder, left_out)}" if left_out else ""))
    return chosen


def _tables_of(files: list[Path]) -> list[Path]:
    """Those that hold rows: no settings of other programs, nor what such a program has saved beside its rows."""
    found = [file for file in files if kind_of(file) in READERS and kind_of(file) not in TEXT_SUFFIXES]
    found = [file for file in found if file.name.lower() not in _ABOUT]
    for state in (file for file in files if file.name == "state.json"):
        kept = _saved(state)
        found = [
            file for file in found if file.parent != state.parent or kind_of(file) != ".arrow" or file.name in kept
        ]
    # A folder of single objects is no folder of settings: its reader says what is wrong with them.
    return [file for file in found if kind_of(file) != ".json" or holds_rows(file)] or found


def _saved(state: Path) -> set[str]:
    """Names of the files that `datasets` lists as a saved set's; others beside them are left from work on it.

    Raises:
        DataError: one of them is missing.
    """
    try:
        listed = loads(state.read_text(encoding="utf-8"))["_data_files"]
        names = {str(file["filename"]) for file in listed}
    except (OSError, ValueError, TypeError, LookupError):  # somebody else's state.json
        return {file.name for file in state.parent.iterdir()}
    missing = sorted(name for name in names if not (state.parent / Path(name).name).is_file())
    if missing:
        raise DataError(
            f"{state}: names {missing[0]!r}, which is not beside it", "save the data set again, or copy all of it"
        )
    return names


def _is_text(file: Path) -> bool:
    return kind_of(file) in TEXT_SUFFIXES and file.name.lower() not in _ABOUT


def _listed(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((split for split, names in _SPLIT_NAMES.items() if names & set(words)), None)


def _table(path: Path, notes: list[str]) -> Table:
    refuse_unknown_kind(path)
    whole_text = kind_of(path) in TEXT_SUFFIXES
    return Table(
        str(path),
        lambda: read_rows(path, notes),
        whole_text=whole_text,
        home=path.parent,
        cut=lambda: read_pieces(path, notes),
        file=path,
    )


def _hub(source: Source, *, streamed: bool) -> Table:
    """A hub data set; class labels stored as numbers come back as their names."""
    import datasets

    called = f"{source.path} ({source.name})" if source.name else source.path
    try:
        how = {"streaming": True} if streamed else {}
        data: Any = datasets.load_dataset(source.path, source.name, split=source.split, **how)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise MachineError(
            f"dataset {called}: no such file or folder, and as a hub data set it is neither cached "
            f"nor reachable{offline}",
            f"check the name, or download it first: hf download --repo-type dataset {source.path}",
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            f"dataset {called}: it is read by a Python script of its own, which `datasets` no longer runs",
            "most have a copy in Parquet, to be named as a folder: hf download --repo-type dataset "
            f"--revision refs/convert/parquet --local-dir FOLDER {source.path}",
        ) from error
    except ValueError as error:  # unknown split or configuration: the library lists what there is
        raise DataError(f"dataset {called}, split {source.split!r}: {error}") from error
    if not streamed and len(data) == 0:
        raise DataError(f"dataset {called}, split {source.split!r}: no rows")
    features = data.features or {}  # of a stream of files that do not say what is in them, nobody knows before
    classes = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    # Objects that are stored as JSON have no keys but their own: a null there is meant.
    meant = {name for name, kind in features.items() if "Json(" in repr(kind)}

    def read(row: Row) -> Row:
        given = {name: row[name] for name in classes if row[name] is not None and row[name] >= 0}
        whole = {name: value if name in meant else unfilled(value) for name, value in row.items()}
        return whole | {name: classes[name].int2str(number) for name, number in given.items()}

    return Table(called, lambda: numbered(called, map(read, _coming(called, data) if streamed else data)))


def _coming(called: str, data: Iterable[Row]) -> Iterator[Row]:
    """The rows of a hub data set as they come.

    Raises:
        DataError: there are none. MachineError: the hub can no longer be reached.
    """
    number = 0
    try:
        for row in data:
            number += 1
            yield row
    except OSError as error:  # those of `requests` are such as well
        text = f"dataset {called}: cannot be read any further after row {number} ({error})"
        raise MachineError(text, "look whether the hub can be reached") from error
    if not number:
        raise DataError(f"dataset {called}: no rows")
