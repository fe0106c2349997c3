"""What stored rows depend on, as one hash: the contents of the files, and all by which they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.vocabulary import sha256_of_text, tokenizer_sha256
from dynlora_cli.errors import UsageError
from dynlora_cli.files.whole import write_text

if TYPE_CHECKING:
    from datetime import datetime

    from dynlora_cli.data.read import Reader
    from dynlora_cli.data.sources import Table

VERSION = 1  # of the columns of a store
_BLOCK = 1 << 26  # bytes hashed in one go, by one thread
_SURE = 2.0  # seconds after its last change from which the date of a file tells one content from another
# What does not matter for how a single row is read.
_ASIDE = {"train", "val", "val_size", "packing", "shuffle", "replay", "retrieve", "cache", "workers"}
_ASIDE_OF_SOURCE = {"weight", "rows", "descriptions"}


def key_of(reader: Reader, lists: Mapping[str, Sequence[Sequence[Table]]], said: Sequence[str], dates: Path) -> str:
    """The hash of all that the rows of a run depend on, before they are chosen from.

    Args:
        reader: says how rows are read.
        lists: the tables of each source, by list; all of them files.
        said: what was told of files that were found or left out.
        dates: a folder where the hashes of files are kept, by their dates.
    """
    dataset, tokenizer, template = reader.dataset, reader.tokenizer, reader.tokenizer.chat_template
    sources = {name: getattr(dataset, name) for name in lists}
    told: dict[str, Any] = {
        "version": [VERSION, _code(), *(version(name) for name in ("transformers", "tokenizers", "jinja2"))],
        "dataset": dataset.model_dump(mode="json", exclude=_ASIDE),
        "sources": {
            name: [source.model_dump(mode="json", exclude=_ASIDE_OF_SOURCE) for source in of]
            for name, of in sources.items()
        },
        "files": {
            name: [[[table.name, sha256_of_file(table.file, dates)] for table in of if table.file] for of in tables]
            for name, tables in lists.items()
        },
        "said": list(said),
        "task": [reader.task.name, reader.task.objective, reader.max_length, reader.vocabulary.table],
        "tokenizer": [
            tokenizer_sha256(tokenizer),
            type(tokenizer).__name__,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            sorted((index, str(token), token.special) for index, token in tokenizer.added_tokens_decoder.items()),
        ],
        "template": template,
        "dates": _dates(str(template), reader.writing.moment),
        "turned": dict(reader.writing.turned),
    }
    return sha256_of_text(json.dumps(told, sort_keys=True, default=str))[:32]


def sha256_of_file(path: Path, dates: Path) -> str:
    """The hash of a file's blocks; it is not read again where neither its dates nor its place have changed.

    Args:
        path: of the file.
        dates: a folder where hashes are kept.

    Raises:
        UsageError: it cannot be read.
    """
    stat = path.stat()
    seen = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    kept = dates / f"{sha256_of_text(str(path.resolve()))[:32]}.json"
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["seen"] == seen:
            return str(before["sha256"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or somebody else's
        pass
    began = time.time()
    try:
        found = _hashed(path, stat.st_size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if began - max(stat.st_mtime, stat.st_ctime) > _SURE:
        write_text(kept, json.dumps({"path": str(path), "seen": seen, "sha256": found}))
    return found


def _hashed(path: Path, size: int) -> str:
    def digest(start: int) -> bytes:
        found = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(start)
            left = _BLOCK
            while left and (piece := file.read(min(left, 1 << 20))):
                found.update(piece)
                left -= len(piece)
        return found.digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, range(0, max(1, size), _BLOCK)))).hexdigest()


def _dates(template: str, moment: datetime) -> list[str]:
    """What a chat template writes of the date; all of it, where it is not plain how it does."""
    calls = re.findall(r"strftime_now\s*(?:\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\))?", template)
    forms = [one or other for one, other in calls]
    return [moment.strftime(form) for form in forms] if all(forms) else [moment.isoformat()]


@cache
def _code() -> str:
    """The hash of the code that reads rows: what it makes of them may change with any of its files."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
