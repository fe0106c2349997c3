"""InfLoRA's start of new components beside old ones (`adapter.init_weights: inflora`): the two looks at rows it takes.

First at the rows of the runs that the old components came from, then at those of this run; see lora/complement.py. Both
are looked at with the old components in the model, as they stand at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dynlora_cli.data.earlier import earlier_data, lineage, run_folder
from dynlora_cli.data.load import Data
from dynlora_cli.lora.complement import complement_start, span_of, widest, without
from dynlora_cli.lora.directions import Directions
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.load import Base
from dynlora_cli.models.randomness import seeded
from dynlora_cli.pruning.calibration import watch_inputs
from dynlora_cli.tasks import task as tasks
from dynlora_cli.text import counted
from dynlora_cli.training.batches import make_batches

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example

MOST_BATCHES = 64  # micro-batches of each run that are looked at


@torch.no_grad()
def write_silent(pool: Pool, recipe: Recipe, base: Base, data: Data, accelerator: Accelerator, origin: Path) -> None:
    """Write A of the new components: silent on the rows of the earlier runs, and open to those of this one.

    Args:
        pool: holds the old components; on the model.
        recipe: of the run.
        base: its model.
        data: of the run; gets a note.
        accelerator: of the run.
        origin: the folder that the old components came from.

    Raises:
        UsageError: the rows of an earlier run are not there, or not what they were.
    """
    new = {name: layer.count - layer.old for name, layer in pool.layers.items()}
    layers: dict[str, nn.Module] = {name: layer for name, layer in pool.layers.items() if new[name]}
    most = {name: widest(layer.in_features, new[name]) for name, layer in pool.layers.items() if new[name]}
    earlier: dict[str, Directions] = {}
    with seeded(recipe.seed, accelerator.device):
        for rows in _earlier_rows(recipe, base, origin):
            batches = _batches(recipe, rows, base, accelerator)
            watch_inputs(base.model, batches, layers, most, accelerator.autocast, around_zero=True, found=earlier)
        spans = {name: span_of(earlier[name], most[name]) for name in layers}

        def outside(name: str, x_NI: Tensor) -> Tensor:
            return without(x_NI, spans[name][0])

        batches = _batches(recipe, data.train, base, accelerator)
        now = watch_inputs(base.model, batches, layers, new, accelerator.autocast, around_zero=True, change=outside)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name in layers:
        layer = pool.layers[name]
        layer.a_CI[layer.old :].copy_(complement_start(now[name], spans[name][0], new[name], generator))
    sizes, held = [len(span) for span, _ in spans.values()], min(share for _, share in spans.values())
    data.notes.append(
        f"adapter.init_weights: inflora: what earlier rows send into a layer spans {min(sizes)} to "
        f"{counted(max(sizes), 'direction')}, which hold at least {held:.1%} of it; new components do not look there"
    )


def _earlier_rows(recipe: Recipe, base: Base, origin: Path) -> Iterator[Sequence[Example]]:
    """The training rows of every run that the old components came from."""
    for folder in lineage(run_folder(origin)):
        yield earlier_data(
            folder,
            base.tokenizer,
            tasks.of(recipe.model),
            table=base.files.table_rows,
            context=base.files.context_length,
        ).train


def _batches(recipe: Recipe, rows: Sequence[Example], base: Base, accelerator: Accelerator) -> Iterator[Batch]:
    """The first micro-batches of some rows, in this run's order."""
    batches = make_batches(recipe, rows, base, shuffle=True)
    steps = (batches.step(0, index) for index in range(batches.steps_per_epoch))
    return (batch.to(accelerator.device) for batch in islice(chain.from_iterable(steps), MOST_BATCHES))
