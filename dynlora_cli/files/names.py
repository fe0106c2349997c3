"""Names that become names of folders: of an update in a library, of an adapter in a router."""

from __future__ import annotations

import re

A_NAME = "letters, digits, dots, hyphens and underscores, at most 64, a letter or digit first"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICES = {"con", "prn", "aux", "nul"}  # what Windows has files of


def is_name(name: str) -> bool:
    """Whether it can be the name of a folder on every system, and is part of no path."""
    return _NAME.fullmatch(name) is not None and name.lower() not in _DEVICES and not name.endswith(".")
