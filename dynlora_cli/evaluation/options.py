"""What `dynlora eval` is to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.evaluation.thresholds import Thresholds

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model


@dataclass(frozen=True)
class Options:
    """What to measure, beside the loss.

    Attributes:
        base: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run; or the model of the person's recipe, see find_base.
        with_base: measure the base model too.
        max_samples: rows at most; None: as the recipe says of its own rows, and all of a file.
        also: further files by name: what was forgotten of them, against the base model.
        generate: prompts to answer; 0: none; None: 32 where there are prompts and the packages for it.
        samples: generated answers to show.
        tasks: of lm-evaluation-harness: names, or paths of task files.
        limit: documents of each task at most.
        allow_template_mismatch: measure conversations with another chat template than the adapter was trained with.
        thresholds: thresholds that must be reached.
    """

    base: str | None = None
    trust_remote_code: bool | Model = False
    with_base: bool = True
    max_samples: int | None = None
    also: Mapping[str, Path] = field(default_factory=dict)
    generate: int | None = None
    samples: int = 0
    tasks: Sequence[str] = ()
    limit: int | None = None
    allow_template_mismatch: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
