"""The tutorials in docs/extending/: their code, as a test puts it to work."""

from __future__ import annotations

import re
from pathlib import Path

EXTENDING = Path(__file__).parents[1] / "docs" / "extending"
_BLOCK = re.compile(r"`(dynlora_cli/[\w/]+\.py)`:\n\n```python\n(.*?)```", re.S)


def code_of(page: str) -> dict[str, str]:
    """The files of a tutorial, by their paths: a path in the text, then a block of Python."""
    return dict(_BLOCK.findall((EXTENDING / f"{page}.md").read_text(encoding="utf-8")))
