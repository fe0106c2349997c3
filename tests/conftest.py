"""Shared fixtures. No test touches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DYNLORA_SHARED", REPOSITORY.parent / "shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no data sets and models at {SHARED} (set DYNLORA_SHARED)")
    return SHARED
