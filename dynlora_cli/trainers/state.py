"""A trainer's checkpoints: beside the adapter the exact numbers, from which training goes on.

transformers' Trainer reads `model.safetensors` of a checkpoint into the model, before it makes the optimizer. So there
lie the leaves as they are, the modules that train whole, and what rank control knows; the base's own weights do not.
When such a file is read, the pool takes on its shapes first. What else the trainer saves (optimizer, rate, random
numbers) is of these shapes, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.trainers.leaves import settle, tie
from dynlora_cli.trainers.peft_names import translate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.pool import Pool

CHECKPOINT = re.compile(r"checkpoint-\d+")
STATE = "model.safetensors"
CONTROL, SETTINGS = "dynlora.control.", "dynlora.settings"


class Saved:
    """Writes and reads the state of components in a trainer's checkpoints.

    Args:
        model: with the components; gets hooks.
        pool: the components.
        settings: what a run must have in common with the one that it goes on with, as JSON.

    Attributes:
        control: gives what rank control knows, while a trainer is at work; None: no checkpoints are written.
        found: what the file that was read last says of rank control, until `take`.
        root: the trainer's model, by whose names the numbers are saved.
        resized: called with the leaves that were replaced, when a file of other shapes was read.
    """

    def __init__(self, model: PreTrainedModel, pool: Pool, settings: Callable[[], dict[str, Any]]) -> None:
        self.pool, self.settings, self._model = pool, settings, model
        self.control: Callable[[], Mapping[str, Tensor]] | None = None
        self.root: nn.Module = model
        self.found: dict[str, Tensor] | None = None
        self.resized: Callable[[list[nn.Parameter]], None] | None = None
        self._ours = False
        self._before_settings: dict[str, dict[str, Any]] = {}
        self._handles = [
            model.register_load_state_dict_pre_hook(self._before),
            model.register_load_state_dict_post_hook(self._after),
        ]

    def end(self) -> None:
        """Read and write no more."""
        for handle in self._handles:
            handle.remove()

    def write(self, folder: Path) -> None:
        """Write the exact state, where the folder is a checkpoint of a trainer at work."""
        if self.control is None or not CHECKPOINT.fullmatch(folder.name):
            return
        leaves = {id(leaf) for leaf in self.pool.leaves}
        tensors = {
            name: parameter.detach()
            for name, parameter in self.root.named_parameters()
            if parameter.requires_grad or id(parameter) in leaves
        }
        prefix = next(f"{name}." if name else "" for name, part in self.root.named_modules() if part is self._model)
        tensors |= {f"{prefix}{CONTROL}{key}": value for key, value in self.control().items()}
        text = json.dumps(self.settings(), sort_keys=True).encode()
        tensors[prefix + SETTINGS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        on_cpu = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
        (folder / STATE).write_bytes(to_bytes(on_cpu, metadata={"format": "pt"}))

    def read(self, folder: Path) -> bool:
        """Read the exact state in a checkpoint, for trainers that have read the adapter there; whether there is one."""
        path = folder / STATE
        if not path.is_file():
            return False
        self.root.load_state_dict(load_file(path), strict=False)
        return self.found is not None

    def _before(self, _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before the model reads a state: take out what is not of the model, and take on its shapes."""
        pool, counts = self.pool, {}
        translate(state, prefix, pool)
        for name, layer in pool.layers.items():
            a_CI, b_OC = state.get(f"{prefix}{name}.a_CI"), state.get(f"{prefix}{name}.b_OC")
            if a_CI is None or b_OC is None:
                return
            if a_CI.shape[1:] != layer.a_CI.shape[1:] or b_OC.shape[:1] != layer.b_OC.shape[:1]:
                raise UsageError(
                    f"the checkpoint's components of {name} are of another size than the layer's",
                    "attach to the model, and with the variant, that it was made with",
                )
            counts[name] = len(a_CI)
        # The state of a model inside another one holds the keys below its own name alone.
        self._ours = prefix + SETTINGS in state
        if self._ours:
            self._before_settings = json.loads(bytes(state.pop(prefix + SETTINGS).tolist()))
            keys = [key for key in state if key.startswith(prefix + CONTROL)]
            self.found = {key.removeprefix(prefix + CONTROL): state.pop(key) for key in keys}
        if counts != pool.counts:
            self._resize(counts)
        if self.found and "survivors" in self.found:
            pool.survive(self.found["survivors"].split(list(counts.values())))

    def _resize(self, counts: dict[str, int]) -> None:
        pool = self.pool
        tie(pool)
        old = pool.leaves
        numbers = sum(counts[name] * pool.cost(name) for name in counts)
        pool.adopt(pool.values.detach().new_zeros(numbers), counts)
        pool.survive([torch.arange(count) for count in counts.values()])
        settle(pool)
        if self.resized is not None:
            self.resized(old)

    def take(self) -> dict[str, Tensor] | None:
        """What the file that was read last says of rank control, for a run that goes on; once.

        Raises:
            UsageError: the run that wrote it had other settings.
        """
        found, self.found = self.found, None
        now = self.settings()
        differing = [
            f"{section}.{key}: {value!r} then, {now[section].get(key)!r} now"
            for section, keys in (self._before_settings if found else {}).items()
            for key, value in keys.items()
            if now.get(section, {}).get(key, value) != value
        ]
        if differing:
            raise UsageError(
                "the checkpoint was made with other settings: " + "; ".join(differing),
                "attach, and set up the callback, as for the run that made it",
            )
        return found

    def _after(self, _module: nn.Module, result: Any) -> None:
        """The frozen base is not in our files, and nobody need hear of it."""
        if self._ours:
            result.missing_keys.clear()
            self._ours = False
