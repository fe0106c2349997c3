"""The runs that an adapter came from, in words and numbers, for those who show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a run did to the components that it began with, by `Birth.old`.
DID = {
    None: "began with new components",
    "tune": "trained the earlier ones on",
    "freeze": "held the earlier ones as they were",
    "magnitudes": "trained the earlier ones' magnitudes",
}


def lineage(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every run of a lineage with what is left of it, oldest first; empty where there is but one.

    Args:
        info: dynlora.json.

    Returns:
        name, run, date, did (in words) and components of each.
    """
    births = info.get("births") or []
    left = [0] * len(births)
    for layer in (info.get("layers") or {}).values():
        born = layer.get("born") or []
        if len(born) == len(births):
            left = [total + count for total, count in zip(left, born, strict=True)]
    if len(births) < 2:
        return []
    return [
        {**{key: birth[key] for key in ("name", "run", "date")}, "did": DID[birth["old"]], "components": count}
        for birth, count in zip(births, left, strict=True)
    ]


def day(date: str | None) -> str:
    """The day of a date on record; nothing where nobody says."""
    return date[:10] if date else ""
