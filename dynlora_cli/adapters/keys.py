"""What the names of an adapter's tensors say: which layer and which factor, and what others have put into the names.

sorted_tensors   the tensors of every layer, and those that replace tensors of the base
natural_order    a sort key by which layer 2 comes before layer 10
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dynlora_cli.adapters import kind
from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.errors import UsageError
from dynlora_cli.text import natural_order

# What puts a level of its own into the names of a model's modules, by the name of that level.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
PARALLEL = "module."  # DistributedDataParallel's; only a name of all tensors alike is that
UNTRAINED = "original_module"  # what PEFT keeps beside `modules_to_save`, and saves in some versions
VELORA = "lora_velora_embed"  # directions by which VeLoRA compresses what its backward pass keeps
_SAVED_WHOLE = re.compile(r"\.((token_adapter\.)?base_layer|modules_to_save(\.default)?)(?=\.)")
# Rows of a table, of LoRA's `trainable_token_indices` and of PEFT's kind that has nothing else.
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?P<adapter>\w+))?")
BIAS = "lora_B.bias"  # among the parts of a layer


@dataclass
class Sorted:
    """An adapter's tensors by what they are.

    Attributes:
        parts: of every layer, by name of the factor, fp32; layers in the model's order.
        whole: tensors that replace one of the base, by its name.
        tokens: rows of a table of tokens, by the table's module, fp32.
        notes: what was taken off names or left out, for the person.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sorted_tensors(tensors: Mapping[str, Tensor], path: Path) -> Sorted:
    """Sort the tensors of a file.

    Args:
        tensors: by their names in it.
        path: the file, for messages.

    Raises:
        UsageError: a name is not understood, two tensors are of one name, or the file holds several adapters.
    """
    found = Sorted()
    names = _without_wrappers(tensors, found.notes)
    untrained: list[str] = []
    of_training: list[str] = []
    tensors = {key: _in_words_of_torch(tensor) for key, tensor in tensors.items()}
    adapters: set[str | None] = set()
    taken: dict[str, str] = {}
    known = kind.tensor_names()
    ours = (*{f"{name.partition('_')[0]}_" for name in known}, "token_adapter", "trainable_tokens")
    part_of_a_layer = re.compile(
        rf"(?P<module>.+?)\.(?P<part>{'|'.join(known)})(\.(?P<adapter>(?!weight$|weight_scale|bias$)\w+))?(\.(?P<leaf>weight|bias))?"
    )
    for key, name in names.items():
        if name in taken:
            raise UsageError(f"{path} holds {taken[name]} and {key}, which name one tensor", "leave one of them out")
        taken[name] = key
        if not name.isprintable():  # no module is called so, and a terminal would obey it
            raise UsageError(f"{path}: the name of the tensor {key!a} holds control characters", "leave it out")
        if f".{UNTRAINED}." in name:
            untrained.append(key)
        elif f".{VELORA}" in name:
            of_training.append(key)
        elif match := _TOKENS.fullmatch(name):
            _refuse_integers(tensors[key], key, path)
            found.tokens[match["module"]] = tensors[key].float()
            adapters.add(match["adapter"])
        elif (match := part_of_a_layer.fullmatch(name)) and (match["leaf"] != "bias" or match["part"] == "lora_B"):
            part = BIAS if match["leaf"] == "bias" else match["part"]
            _refuse_integers(tensors[key], key, path)
            found.parts.setdefault(match["module"], {})[part] = tensors[key].float()
            adapters.add(match["adapter"])
        elif any(part in (own := _SAVED_WHOLE.sub("", name)) for part in ours):
            raise UsageError(f"{path}: the tensor {key} is not understood", "is it a newer kind of LoRA?")
        elif own in found.whole and not found.whole[own].equal(tensors[key]):  # PEFT writes a head's bias twice
            raise UsageError(f"{path} holds {own} twice, once as {key}, with other numbers", "leave one of them out")
        else:
            if own.endswith((".weight", ".bias")):  # others may be counters
                _refuse_integers(tensors[key], key, path)
            found.whole[own] = tensors[key]
    if not (found.parts or found.tokens):
        raise UsageError(f"{path} holds no LoRA factors", "the files are incomplete or of another kind")
    if len(adapters) > 1:
        shown = ", ".join(sorted(str(name) for name in adapters))
        raise UsageError(f"{path} holds several adapters: {shown}", "save each alone: PEFT's save_pretrained does")
    if untrained:
        found.notes.append(f"left out, since they are the base's own as it was: {_some(untrained)}")
    if of_training:
        found.notes.append(f"left out, since only training uses them: {_some(of_training)}")
    found.parts = {module: found.parts[module] for module in sorted(found.parts, key=natural_order)}
    return found


def _in_words_of_torch(tensor: Tensor) -> Tensor:
    """In fp32, where it has a type of eight bits that nothing can compute with."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _refuse_integers(tensor: Tensor, key: str, path: Path) -> None:
    """Refuse weights of whole numbers: they were quantized, and what they stand for is not to be told.

    Raises:
        UsageError: it holds such.
    """
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(
            f"{path}: {key} holds whole numbers ({kind}), without what they stand for", "save it in floats"
        )


def without_wrappers(name: str) -> str:
    """A module's name, or a pattern of names, without the levels that wrappers put into it."""
    return re.sub(rf"(?<![\w])({'|'.join(WRAPPERS)})(\\?\.|$)", "", name)


def _without_wrappers(keys: Mapping[str, Tensor], notes: list[str]) -> dict[str, str]:
    """The names of the tensors in the base, by their keys; a note says what was taken off."""
    seen = {what for key in keys for level, what in WRAPPERS.items() if level in key.split(".")}
    names = {key: without_wrappers(key).removeprefix(PREFIX) for key in keys}
    while all(name.startswith(PARALLEL) for name in names.values()) and names:
        seen.add("DistributedDataParallel")
        names = {key: name.removeprefix(PARALLEL).removeprefix(PREFIX) for key, name in names.items()}
    if seen:
        notes.append(f"saved from a model inside {' and '.join(sorted(seen))}, which is taken off the tensors' names")
    return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
