"""Fused functions instead of chains of ordinary operations, equal up to rounding and with less memory traffic.

What it does:
    A frozen layer and its components run as one function (kernels/fused_lora.py), layers that read the same input
    together (lora/shared_inputs.py), and the loss without all logits in memory (kernels/linear_cross_entropy.py).
    Norms, gates and rotary positions of the blocks train by functions of our own (execution/lean_blocks.py), but not
    under `train.compile`, which fuses ordinary operations itself.

When to use it:
    Always; `train.fused: false` runs ordinary operations throughout, to compare with.

Reference:
    scripts/bench/NOTES.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dynlora_cli.execution import mode
from dynlora_cli.execution.lean_blocks import lean_blocks
from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.lora.shared_inputs import share_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.whole import Trained

ORDER = 20
ALWAYS = True  # layers and loss are fused unless they are told otherwise


class Mode(mode.Mode):
    """`train.fused`."""

    def prepare(self, model: PreTrainedModel) -> None:
        if not self.train.fused:
            self.patches.set(ending(model), "fused", False)
        elif not self.train.compile:
            self.changed = lean_blocks(model, self.patches)

    def apply(self, model: PreTrainedModel, trained: Trained) -> None:
        for layer in () if self.train.fused else trained.layers.values():
            self.patches.set(layer, "fuse", False)

    def begin(
        self, model: PreTrainedModel, trained: Trained, forward: Callable[[], object], tell: Callable[[str], None]
    ) -> None:
        layers = {name: layer for name, layer in trained.layers.items() if layer.fuse and not layer.dropout}
        if not layers or self.train.compile:
            return
        self.patches.set(trained, "sharing", share_inputs(layers, forward))
        for layer in layers.values():
            self.patches.callback(setattr, layer, "shared", None)
