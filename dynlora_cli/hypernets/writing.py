"""From a text to an adapter, by a hypernetwork that is trained.

open_writer     finds the base that the network belongs to, and what makes its conditions
Writer.write    components for one text, as an adapter with a scale of 1
cut             what a budget leaves of it: the largest components
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.hypernets.conditions import Conditions, Descriptions
from dynlora_cli.hypernets.documents import CHUNK, Documents, reader_of
from dynlora_cli.hypernets.files import Hypernetwork
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.place import Place
from dynlora_cli.pruning.bytes_budget import most_within
from dynlora_cli.pruning.posthoc import Order, parameters_of
from dynlora_cli.retrieval.encoders import BASE, base_encoder, model_encoder
from dynlora_cli.runs.folder import RECORD, read_record

if TYPE_CHECKING:
    from dynlora_cli.models.load import Base


@dataclass(frozen=True)
class Writer:
    """A hypernetwork beside its base.

    Attributes:
        hypernetwork: as it was read.
        place: of the base.
        empty: an adapter of this base without layers.
        conditions: what the network writes from.
    """

    hypernetwork: Hypernetwork
    place: Place
    empty: Adapter
    conditions: Conditions

    def write(self, key: Hashable) -> Adapter:
        """The adapter of one text: all of its components, without those that are 0.

        Args:
            key: the description, or what `Conditions.key` is of a document.

        Raises:
            UsageError: the network writes nothing but zeros.
            MeasureError: it writes a number that is not finite.
        """
        with torch.no_grad():
            written = self.hypernetwork.net(self.conditions.of([key]))
        layers = {}
        for name, (a, b, gate) in written.items():
            a_CI, b_OC = _alone(a), _alone(b)
            b_OC = b_OC if gate is None else b_OC * gate[0]
            factors = Factors(a_CI.float().cpu(), b_OC.float().cpu())
            if not (factors.a_CI.isfinite().all() and factors.b_OC.isfinite().all()):
                text = f"{self.hypernetwork.folder} writes NaN or infinity for {name}"
                raise MeasureError(text, "train again with a lower learning rate")
            layers[name] = factors.keep(factors.a_CI.norm(dim=1) * factors.b_OC.norm(dim=0) > 0)
        if not any(factors.rank for factors in layers.values()):
            raise UsageError(
                f"{self.hypernetwork.folder} writes nothing but zeros: it has not been trained",
                "train it for more steps, or with a higher train.learning_rate",
            )
        return self.empty.with_layers(layers)


def open_writer(hypernetwork: Hypernetwork, base: str | None = None, trust: bool = False) -> Writer:
    """Find the base of a hypernetwork and make ready what it writes from.

    Args:
        hypernetwork: as it was read.
        base: folder or hub id of its base, where that has moved.
        trust: Python code that comes with the base may run.

    Raises:
        UsageError: that is another base, or the encoder of descriptions is another one.
        MachineError: base or encoder is not on this machine.
    """
    empty = empty_adapter(hypernetwork)
    place = find_base(empty, base, trust)

    def load() -> Base:
        return base_in_memory(empty, place, read_tokenizer(empty, place))

    return Writer(hypernetwork, place, empty, conditions_of(hypernetwork, load))


def cut(adapter: Adapter, budget: Budget, dtype: str = FULL) -> Adapter:
    """The adapter with no more than a budget allows: in each layer's SVD basis, the largest components of all layers.

    Args:
        adapter: as it was written.
        budget: as in a recipe.
        dtype: of the factors in the file, for a budget of bytes.

    Raises:
        UsageError: it allows not even one component.
    """
    if budget.kind == "auto":
        raise UsageError("--budget auto measures rows while it prunes, and there are none", "write a number")
    order = Order.by_policy(adapter, plugins.load("policies", "magnitude"), None, None)
    if budget.kind == "bytes":
        target = most_within(int(budget.value), order, dtype, order.least, order.adapter.parameters)
    else:
        target = parameters_of(budget, [adapter])
        if target >= adapter.parameters:
            return adapter
    if target < order.least:
        raise UsageError(
            f"the budget allows less than one component, which has up to {order.least:,} parameters", "allow more"
        )
    return order.cut(order.keep(target)[0])


def empty_adapter(hypernetwork: Hypernetwork) -> Adapter:
    """An adapter of the base that a hypernetwork belongs to, without layers."""
    folder, form = hypernetwork.folder, hypernetwork.form
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    kept: dict[str, Any] = {key: record[key] for key in ("chat_template_sha256", "data") if key in record}
    if separator := ((record.get("recipe") or {}).get("dataset") or {}).get("separator"):
        kept["data"] = {**kept.get("data", {}), "separator": separator}  # the rest of the recipe is the network's
    model = {"model": (record.get("recipe") or {}).get("model")} if record.get("recipe") else {}
    layers = {layer.name: {"d_in": layer.d_in, "d_out": layer.d_out, "rank": 0} for layer in form.layers}
    about: dict[str, Any] = {**kept, "recipe": model, "base_model": form.base.model_dump(), "layers": layers}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": form.base.reference,
        "revision": form.base.revision,
        "task_type": plugins.declared("tasks", "causal-lm", "TASK_TYPE"),
        "fan_in_fan_out": form.transposed,
    }
    return Adapter(folder, {}, config, about, model_type=form.base.model_type)


def conditions_of(
    hypernetwork: Hypernetwork, load: Callable[[], Base], device: torch.device | None = None
) -> Conditions:
    """What a hypernetwork writes from; it is moved to where that is.

    Args:
        hypernetwork: as it was read.
        load: gives its base, in memory and without an adapter; not asked where an encoder of its own does without.
        device: where conditions are wanted; None: where they are made.

    Raises:
        UsageError: the encoder of descriptions is another one than it was trained with, or the base has no such block.
        MachineError: the encoder is not on this machine.
    """
    form = hypernetwork.form
    if form.encoder is None:
        base = load()
        hypernetwork.net.to(base.model.device)
        places, context = hypernetwork.net.places, base.files.context_length
        reader = reader_of(base.model.eval(), base.tokenizer, places, getattr(hypernetwork.net.options, CHUNK), context)
        return Documents(reader, base.tokenizer)
    if form.encoder.name == BASE:
        base = load()
        identity = fingerprint(base.folder, base.files.config)["sampled_sha256"]
        encoder, made_on = base_encoder(base.model.eval(), base.tokenizer, identity), base.model.device
    else:
        encoder, made_on = model_encoder(form.encoder.name), torch.device("cpu")
    if encoder.fingerprint != form.encoder.fingerprint:
        raise UsageError(
            f"the encoder {form.encoder.name} is not the one that {hypernetwork.folder} was trained with",
            "bring it back as it was, or train anew",
        )
    hypernetwork.net.to(device or made_on)
    return Descriptions.from_tensors(encoder, hypernetwork.conditions, device or made_on)


def _alone(factor: Tensor) -> Tensor:
    """Of a factor its only condition's."""
    return factor[0] if factor.ndim == 3 else factor
