"""What a person says of an update that is to be added; known before anything heavy loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Addition:
    """What a person says of an update.

    Attributes:
        adapter: a run folder or any PEFT LoRA folder.
        name: of the update; None: the run's or the folder's.
        date: the day that it is about, YYYY-MM-DD; None: the day that the run ended, or today.
        tags: words to find it by.
        data: a file of rows, in place of the run's own.
        documents: a file or folder of texts whose passages become keys too.
        encoder: base, minilm, a folder or a hub id; None: the library's, `base` in a new one.
        base: the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run.
    """

    adapter: Path
    name: str | None = None
    date: str | None = None
    tags: list[str] = field(default_factory=list)
    data: Path | None = None
    documents: Path | None = None
    encoder: str | None = None
    base: str | None = None
    trust_remote_code: bool = False
