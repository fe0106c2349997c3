"""The documents that an adapter was made from, in words and numbers, for those who show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynlora_cli.text import count, counted, duration, number

COLUMNS = ("document", "characters", "chunks", "sha256")


def documents(info: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, characters, chunks and the beginning of the hash of each; empty where there are none.

    Args:
        info: dynlora.json.
    """
    found = (info.get("adapted") or {}).get("documents") or []
    return [(one["name"], count(one["characters"]), count(one["chunks"]), one["sha256"][:12]) for one in found]


def made_from(info: Mapping[str, Any]) -> str:
    """Who wrote the rows, and what the model reaches with the document in its prompt, in sentences."""
    adapted = info.get("adapted") or {}
    rows, held_out = counted(adapted.get("rows"), "row"), count(adapted.get("held_out"))
    questions, answers = adapted.get("questions") or "unknown", adapted.get("answers") or "unknown"
    parts = [f"{rows} to train and {held_out} held out: questions by {questions}, answers by {answers}."]
    if teacher := adapted.get("teacher"):
        parts.append(f"The teacher was {teacher}, with the document in its prompt.")
    if (loss := adapted.get("loss_with_document")) is not None:
        parts.append(f"Its own loss on the held-out answers is {number(loss)}: what there was to reach.")
    if adapted.get("chunks_added"):
        parts.append("Each chunk was trained by itself, and the components were put side by side.")
    if seconds := adapted.get("writing_seconds"):
        parts.append(f"The rows took {duration(seconds)}.")
    return " ".join(parts)
