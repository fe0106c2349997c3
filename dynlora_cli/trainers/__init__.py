"""Components inside the trainers of others: transformers, TRL, sentence-transformers.

    attached = attach(model, budget=8)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[DynamicRankCallback(attached, start=0.25, end=0.5)])
    trainer.train()

The names are looked up when they are used, so that importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynlora_cli.trainers.attached import Attached, attach
    from dynlora_cli.trainers.callback import DynamicRankCallback

__all__ = ["Attached", "DynamicRankCallback", "attach"]

_HOME = {"Attached": "attached", "attach": "attached", "DynamicRankCallback": "callback"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
