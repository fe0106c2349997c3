"""Layer names to a grid of blocks x module types, the shape of every rank map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A UNet has blocks in its blocks: a row is one attention, one block of transformers in it, or one residual block.
_UNET = re.compile(
    r"(?P<stack>(?:.*\.)?(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions\.\d+\.transformer_blocks|\w+))"
    r"\.(?P<number>\d+)\.(?P<module>.+)"
)
_SHORT = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up", "transformer_blocks": "blocks"}

OUTSIDE = "other"  # name of the row for layers outside the blocks


def layer_grid(names: Iterable[str]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Arranges layer names as blocks x module types.

    `model.layers.3.mlp.up_proj` stands in block `3`, module `up_proj`. Modules are named by their shortest ending that
    is theirs alone (BERT has three called `dense`); where several stacks have a block 3, as an encoder and a decoder,
    the block is called `encoder 3`. Layers outside any block share the last row.

    Returns:
        blocks in order, modules in order of appearance, and {(block, module): name}; not every cell is filled.
    """
    places = {name: _split(name) for name in names}
    stacks = list(dict.fromkeys(stack for stack, number, _ in places.values() if number is not None))
    stack_label = _stack_labels(stacks)
    module_label = _shortest_endings([module for _, _, module in places.values()])
    order = {stack: index for index, stack in enumerate(stacks)}
    key = {name: (order.get(stack, len(order)), number or 0) for name, (stack, number, _) in places.items()}

    cells: dict[tuple[str, str], str] = {}
    blocks: dict[str, None] = {}
    modules: dict[str, None] = {}
    for name in sorted(places, key=lambda name: key[name]):
        stack, number, module = places[name]
        block = OUTSIDE if number is None else f"{stack_label[stack]}{number}"
        cells[block, module_label[module]] = name
        blocks[block] = modules[module_label[module]] = None
    return list(blocks), list(modules), cells


def shade(rank: float, start: float) -> float:
    """Strength of a rank map's colour, 0 to 1, for `rank` components kept of `start`.

    Eye and budget both care for the low end (most layers keep a quarter or less), so it is stretched.
    """
    return min(1.0, max(0.0, rank / start) ** 0.6) if start > 0 else 0.0


def _split(name: str) -> tuple[str, int | None, str]:
    """A name as (stack, block number, module): the first whole number in it tells where the block is."""
    if match := _UNET.fullmatch(name):
        stack = ".".join(_SHORT.get(word, word) for word in match["stack"].split("."))
        return stack, int(match["number"]), match["module"]
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return "", None, name


def _stack_labels(stacks: Sequence[str]) -> dict[str, str]:
    """A prefix for the blocks of each stack: nothing where there is one, else the words that not all stacks share."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    shared = set.intersection(*(set(stack.split(".")) for stack in stacks))
    own = {stack: ".".join(word for word in stack.split(".") if word not in shared) for stack in stacks}
    distinct = len(set(own.values())) == len(stacks) and all(own.values())
    return {stack: f"{own[stack] if distinct else stack} " for stack in stacks}


def _shortest_endings(names: Iterable[str]) -> dict[str, str]:
    """For each dotted name the fewest last words that no other name ends with."""
    owners: dict[str, set[str]] = {}
    for name in names:
        words = name.split(".")
        for length in range(1, len(words) + 1):
            owners.setdefault(".".join(words[-length:]), set()).add(name)
    label = {}
    for name in {name for group in owners.values() for name in group}:
        words = name.split(".")
        endings = [".".join(words[-length:]) for length in range(1, len(words) + 1)]
        label[name] = next((ending for ending in endings if owners[ending] == {name}), name)
    return label
