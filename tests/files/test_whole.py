"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynlora_cli.files.whole import write_text


def test_nothing_is_left_where_a_file_cannot_be_written(tmp_path: Path):
    place = tmp_path / "folder"
    place.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text(place, "text")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "half", "\ud800")
    assert list(tmp_path.iterdir()) == [place]
