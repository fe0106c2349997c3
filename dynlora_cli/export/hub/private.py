"""What a file says of the machine that it was written on, taken out of a copy that is sent away."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from dynlora_cli.errors import DynloraError

TEXTS = (".json", ".jinja", ".md", ".sh", ".txt", ".yaml")
_LARGEST_TEXT = 4 << 20  # bytes; larger ones are vocabularies
_WHOLE = re.compile(r"(?:file://)?(?:~|[A-Za-z]:)?[/\\][^\n]*[/\\][^\n]*")
_IN_TEXT = re.compile(r"(?<![\w:/.<\\])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+~=-]+){2,}")


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """A value of JSON in which each text that is an absolute path is only its last part.

    Args:
        value: of any depth.
        names: what certain paths are called elsewhere.
    """
    if isinstance(value, dict):
        return {key: without_paths(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, names) for item in value]
    if isinstance(value, str) and (value in names or _WHOLE.fullmatch(value)):
        return names.get(value, last_part(value))
    return value


def text_without_paths(text: str, names: Mapping[str, str]) -> str:
    """A text for people in which absolute paths are only their last part; addresses of the web stay."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _IN_TEXT.sub(lambda match: last_part(match[0]), text)


def last_part(path: str) -> str:
    """The name of a file or folder, of any system."""
    return PureWindowsPath(path.rstrip("/\\")).name


def clean_json(path: Path, names: Mapping[str, str]) -> bytes | None:
    """The content of a JSON file without absolute paths; None: it has none, and may be sent as it is."""
    value = json.loads(path.read_bytes())
    cleaned = without_paths(value, names)
    return None if cleaned == value else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def is_text(name: str, size: int) -> bool:
    """Whether a file is small and for people, or settings: where a path may stand."""
    return size <= _LARGEST_TEXT and (name.endswith(TEXTS) or "." not in name)


def refuse_places(files: Mapping[str, Path | bytes], places: Sequence[str]) -> None:
    """Check that no text names a folder of this machine.

    Raises:
        DynloraError: one does; nothing may be sent.
    """
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes() if _may_hold(name, content) else b""
        for place in places:
            if place.encode() in data:
                raise DynloraError(f"{name} names {place}, a folder of this machine; nothing was sent", "take it out")


def _may_hold(name: str, path: Path) -> bool:
    return is_text(name, path.stat().st_size)
