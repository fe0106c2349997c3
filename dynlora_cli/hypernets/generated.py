"""A hypernetwork as what trains in a run: the same methods as of a `Pool` and of a `WholeModel`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dynlora_cli.evaluation.generation import generate
from dynlora_cli.hypernets.layer import silent
from dynlora_cli.lora.whole import WithoutComponents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example
    from dynlora_cli.evaluation.generation import Prompt
    from dynlora_cli.hypernets.conditions import Conditions
    from dynlora_cli.hypernets.hypernet import Hypernet
    from dynlora_cli.hypernets.layer import WrittenLinear


class Generated(WithoutComponents):
    """A hypernetwork that trains, see lora/whole.py. Before each pass it writes the adapters of the batch's rows.

    Args:
        net: writes them.
        written: the layers of the model that use them, by name.
        conditions: what rows come with.
        limit: numbers that a written adapter may hold (`rank.budget`).
    """

    def __init__(self, net: Hypernet, written: dict[str, WrittenLinear], conditions: Conditions, limit: int) -> None:
        super().__init__()
        self.net, self.written, self.conditions, self.limit = net, written, conditions, limit
        self._of_step: dict[Hashable, None] = {}

    def to(self, device: torch.device) -> Generated:  # noqa: ARG002
        """Stay on the device that the model was loaded to."""
        return self

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"params": list(self.net.parameters()), "coupled": False}]

    def see(self, batch: Batch) -> None:
        self.write_for(batch.examples, batch.labels.device)

    def write_for(self, examples: Sequence[Example], device: torch.device) -> None:
        """Write the adapters of some rows, which a batch holds in this order; each different one once."""
        keys = [self.conditions.key(example) for example in examples]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        trains = torch.is_grad_enabled()
        if trains and self.net.regular:
            self._of_step |= dict.fromkeys(places)
        self.net.train(trains)
        with torch.autocast(device.type, enabled=False):
            components = self.net(self.conditions.of(list(places)))
        condition_R = torch.tensor([places[key] for key in keys], device=device) if len(places) > 1 else None
        for name, layer in self.written.items():
            layer.hold(components[name], condition_R)

    @torch.no_grad()
    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        context: int | None,
    ) -> list[str]:
        """The likeliest answer to each prompt, under the adapter of the row that it was taken from.

        Args:
            model: that the layers are on.
            tokenizer, batch_size, context: as of `generate`.
            prompts: with their rows.
        """
        longest = max((prompt.longest for prompt in prompts), default=0)
        ends = set[int]().union(*(prompt.end_ids for prompt in prompts))
        alike: dict[Hashable, tuple[Example, list[int]]] = {}
        for number, prompt in enumerate(prompts):
            assert prompt.example is not None
            _, numbers = alike.setdefault(self.conditions.key(prompt.example), (prompt.example, []))
            numbers.append(number)
        found = [""] * len(prompts)
        for example, numbers in alike.values():
            together = [replace(prompts[number], longest=longest, end_ids=ends) for number in numbers]
            self.write_for([example], model.device)
            texts = generate(model, tokenizer, together, batch_size=batch_size, context=context)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def begin_step(self, step: int, total_steps: int) -> None:  # noqa: ARG002
        self._of_step.clear()

    def penalty(self) -> Tensor | None:
        if not self.net.regular:
            return None
        keys = list(dict.fromkeys(gather_object(list(self._of_step))))  # of the rows of all processes
        return self.net.penalty(self.net(self.conditions.of(keys))) if keys else None

    def switched_off(self) -> AbstractContextManager[None]:
        return silent(self.written.values())
