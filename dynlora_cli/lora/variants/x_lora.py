"""X-LoRA: what each adapter says is scaled by a classifier that has read the text once without them.

What it does
    Two passes. The first is the base's (scalings at `scaling_pass_value`); a small network makes of its last hidden
    states a scaling for each token and adapter, by default a softmax. The second pass uses them: W x + Σ λ_e B_e A_e x.
    Only the network trains. When text is written, both passes keep a cache of keys and values of their own.

When to use it
    Where the choice needs the whole text so far and not one layer's input. Every pass costs two.

Reference
    Buehler and Buehler 2024, X-LoRA (arXiv 2402.07148); computes what PEFT's `tuners/xlora` does, and is saved so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.routers import gates as token_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynlora_cli.lora.multi import MultiLinear

has_components = False
routes = True
takes = ()
OPTIONS = {
    "xlora_depth": {"type": "int", "default": 1, "at_least": 1, "help": "Linear layers of the classifier."},
    "xlora_size": {"type": "int", "default": 2048, "at_least": 1, "help": "Its width, where it has several."},
    "xlora_dropout_p": {
        "type": "float", "default": 0.2, "at_least": 0, "below": 1, "help": "Dropout between them."
    },
    "enable_softmax": {"type": "bool", "default": True, "help": "Scalings of a token add up to 1."},
    "enable_softmax_topk": {"type": "bool", "default": False, "help": "Those of the best `top_k_lora` do."},
    "softmax_temperature": {"type": "float", "default": 1.0, "above": 0, "help": "Lower is sharper."},
    "layerwise_scalings": {"type": "bool", "default": False, "help": "Each layer has scalings of its own."},
    "top_k_lora": {"type": "int", "default": None, "at_least": 1, "help": "Adapters of a token, at most; null: all."},
    "scaling_pass_value": {"type": "float", "default": 0.0, "help": "Scaling of all adapters in the first pass."},
    "global_scaling_weight": {"type": "float", "default": 1.0, "help": "Factor of all scalings."},
}  # fmt: skip
CONFLICTS = [
    {"with": "model.task", "is_not": "causal-lm", "why": "X-LoRA reads the hidden states of a decoder alone"},
]
# What changes a cache of keys and values beside a forward pass; both passes' caches follow.
CACHE_CHANGES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
_FIRST = "dynlora_first_pass"  # on the cache of the second pass: that of the first


class Gates(token_gates.Gates):
    """The classifier; its `layers` are called as in PEFT.

    Attributes:
        scalings: of the pass that is going on: [N, L, E], L layers, or 1 for all of them; None before the first.
    """

    title = "X-LoRA"

    def __init__(self, layers: Mapping[str, MultiLinear], names: Sequence[str], options: Any, hidden: int = 0) -> None:
        super().__init__(layers, names, options, hidden)
        self.places = {name: place for place, name in enumerate(layers)}
        self.scalings: Tensor | None = None
        device = next(iter(layers.values())).device
        widths = [hidden, *[options.xlora_size] * (options.xlora_depth - 1)]
        parts: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            parts += [nn.Linear(d_in, d_out, device=device), nn.ReLU()]
            parts += [nn.Dropout(options.xlora_dropout_p)] if options.xlora_dropout_p else []
        outputs = len(names) * (len(layers) if options.layerwise_scalings else 1)
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], outputs, device=device))

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.named_parameters()}

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:  # noqa: ARG002
        assert self.scalings is not None, "the model was called past its decoder"
        scalings_NE = self.scalings[:, self.places[layer.name] if self.options.layerwise_scalings else 0]
        return scalings_NE if len(layer.adapters) == len(self.names) else scalings_NE[:, layer.adapters]

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """The first pass runs before each pass of the model's decoder."""
        decoder: nn.Module = model.base_model
        first = False

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal first
            if first:  # this pass is the first one
                return
            self.train(module.training)
            ids = args[0] if args else kwargs.get("input_ids")
            tokens = ids if ids is not None else kwargs["inputs_embeds"]
            shape = (tokens.shape[0] * tokens.shape[1], 1, len(self.names))
            value = torch.full(shape, self.options.scaling_pass_value, device=tokens.device)
            self.scalings = self._chosen(value).expand(
                -1, len(self.places) if self.options.layerwise_scalings else 1, -1
            )
            first = True
            try:
                with torch.no_grad():
                    hidden = module(*args, **(kwargs | _own_cache(kwargs))).last_hidden_state
            finally:
                first = False
            with torch.autocast(hidden.device.type, enabled=False):
                self.scalings = self._scalings(hidden.flatten(0, 1).float())

        handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _scalings(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states of all tokens to the scalings of their layers. [N, L, E]"""
        logits = self.layers(hidden_ND).view(len(hidden_ND), -1, len(self.names))
        if self.options.enable_softmax:
            logits = (logits / self.options.softmax_temperature).softmax(-1)
        return self._chosen(logits)

    def _chosen(self, scalings: Tensor) -> Tensor:
        """Those of the best adapters, where only these are used, times the factor of all."""
        if self.options.top_k_lora is not None:
            best = scalings.topk(min(self.options.top_k_lora, scalings.shape[-1]), -1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter_(-1, best, 1.0)
        if self.options.enable_softmax_topk:
            zero = scalings == 0  # PEFT takes what is exactly 0 for what was not chosen
            shares = scalings.masked_fill(zero, -torch.inf).softmax(-1)
            scalings = shares.masked_fill(zero, 0.0)
        return scalings * self.options.global_scaling_weight


def _own_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the first pass that say where its keys and values are kept: never in the second's cache.

    Raises:
        UsageError: the second pass goes on from a cache that this router did not see from the beginning.
    """
    cache = kwargs.get("past_key_values")
    if cache is None:
        return {"use_cache": False}
    if not hasattr(cache, _FIRST):
        if cache.get_seq_length():
            raise UsageError(
                "X-LoRA keeps a cache for each of its two passes, and was given one that another pass began",
                "give the whole text again, with an empty cache or none",
            )
        setattr(cache, _FIRST, copy.deepcopy(cache))
        for name in CACHE_CHANGES:
            if hasattr(cache, name):
                setattr(cache, name, _both(getattr(cache, name), getattr(getattr(cache, _FIRST), name)))
    return {"past_key_values": getattr(cache, _FIRST)}


def _both(one: Any, other: Any) -> Any:
    def change(*args: Any, **kwargs: Any) -> Any:
        other(*args, **kwargs)
        return one(*args, **kwargs)

    return change
