"""What an adapter puts in the place of the base's own parameters: whole tensors, rows of tables, biases.

    replacements    all of them, checked against the base
    lengthen        gives a model without weights the shapes that they have

Dimensions: O outputs of a layer, T trained tokens, I width of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlora_cli.adapters.adapter import Adapter, TokenRows
from dynlora_cli.adapters.base import ANOTHER
from dynlora_cli.errors import UsageError
from dynlora_cli.models.linear import is_linear
from dynlora_cli.models.place import input_table

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Replacement:
    """One parameter of the base that becomes another.

    Attributes:
        name: of the parameter.
        shape: that it has then.
        whole: takes its place; None: the base's own stays.
        rows: of a table, which take the place of its own.
        bias_O: is added to a bias.
        new: the base has no parameter of that name.
    """

    name: str
    shape: tuple[int, ...]
    whole: Tensor | None = None
    rows: TokenRows | None = None
    bias_O: Tensor | None = None
    new: bool = False

    def made(self, read: Read) -> Tensor:
        """The parameter.

        Args:
            read: gives one of the base by its name; its type is kept where rows or numbers of it are.
        """
        if self.whole is None and self.new:
            assert self.bias_O is not None
            return self.bias_O
        own = read(self.name) if self.whole is None else self.whole
        if self.bias_O is not None:
            own = own + self.bias_O.to(own.device)
        if self.rows is None:
            return own
        table = own.new_zeros(self.shape)
        table[: len(own)] = own
        table[torch.tensor(self.rows.indices, device=own.device)] = self.rows.rows_TI.to(own)
        return table

    def same(self, other: Replacement) -> bool:
        """Whether both make the same of the same numbers."""
        whole = _equal(self.whole, other.whole)
        if self.rows is None or other.rows is None:
            return whole and self.rows is other.rows
        rows = self.rows.indices == other.rows.indices and torch.equal(self.rows.rows_TI, other.rows.rows_TI)
        return whole and rows


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def replacements(model: PreTrainedModel, adapter: Adapter) -> dict[str, Replacement]:
    """What becomes of the base's parameters, by name; components are not among it.

    Args:
        model: the base; shapes are enough.
        adapter: of that base.

    Raises:
        UsageError: the base has no such parameter, or one of another shape; or a row that neither has.
    """
    found: dict[str, Replacement] = {}
    for name, tensor in adapter.whole.items():
        for same in _sharing(model, adapter, name):
            found[same] = Replacement(same, _shape_of_whole(model, adapter, same, tensor), whole=tensor)
    for table, rows in adapter.token_rows.items():
        for name in _names(model, adapter, table):
            found[name] = _with_rows(model, adapter, found.get(name), name, rows)
            _without_bias(model, found, name)
    for layer, factors in adapter.layers.items():
        if factors.bias_O is not None:
            name, (module, own) = f"{layer}.bias", _parameter(model, adapter, f"{layer}.bias")
            if not is_linear(module):
                raise UsageError(
                    f"{adapter.folder}: {layer} is a {type(module).__name__}, which takes no bias", ANOTHER
                )
            before = found.get(name, Replacement(name, tuple(factors.bias_O.shape), new=own is None))
            found[name] = replace(before, bias_O=factors.bias_O)
    _refuse_short_head(model, adapter, found)
    return found


def tied_names(model: PreTrainedModel, name: str) -> list[str]:
    """A parameter and those that share its numbers."""
    shared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    first = shared.get(name, name)
    return list(dict.fromkeys([name, first, *(other for other, source in shared.items() if source == first)]))


def _sharing(model: PreTrainedModel, adapter: Adapter, name: str) -> list[str]:
    """The parameters that a whole tensor is put in the place of.

    Of a table with components PEFT keeps the table itself (`base_layer`), which a tied head goes on sharing; one of
    `modules_to_save` is a copy of its own.
    """
    if name.removesuffix(".weight") not in adapter.layers:
        return [name]
    return [other for other in tied_names(model, name) if other == name or other not in adapter.whole]


def _without_bias(model: PreTrainedModel, found: dict[str, Replacement], name: str) -> None:
    """Take the bias from an output head with trained rows, as PEFT computes it in training and after.

    Source: peft 0.21, tuners/trainable_tokens/layer.py: forward_adapters, which gives F.linear no bias.
    """
    module, bias = model.get_submodule(name.rpartition(".")[0]), f"{name.removesuffix('weight')}bias"
    own = module._parameters.get("bias")
    if is_linear(module) and own is not None:
        size = found[name].shape[:1]
        found[bias] = Replacement(bias, size, whole=torch.zeros(size, dtype=own.dtype))


def _names(model: PreTrainedModel, adapter: Adapter, table: str) -> list[str]:
    """The parameters that get the rows of a table: of the input table also those that share its numbers."""
    name = f"{table}.weight"
    module, _ = _parameter(model, adapter, name)
    if module is not input_table(model):
        return [name]
    own = {f"{other}.weight" for other in adapter.token_rows if other != table} | set(adapter.whole)
    return [other for other in tied_names(model, name) if other == name or other not in own]


def _parameter(model: PreTrainedModel, adapter: Adapter, name: str) -> tuple[nn.Module, Tensor | None]:
    """A parameter of the base, or None where its module has none of that name; and its module."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise UsageError(
            f"{adapter.folder}: the base model has no layer {owner}, and here is its {leaf}", ANOTHER
        ) from None
    return module, module._parameters.get(leaf, module._buffers.get(leaf))


def _shape_of_whole(model: PreTrainedModel, adapter: Adapter, name: str, tensor: Tensor) -> tuple[int, ...]:
    _, own = _parameter(model, adapter, name)
    shape = tuple(tensor.shape)
    if own is None:
        raise UsageError(f"{adapter.folder}: the base model has no {name}", ANOTHER)
    packed = not own.dtype.is_floating_point  # a quantized layer, whose numbers do not lie in its shape
    longer = len(shape) == 2 and shape[1:] == own.shape[1:]
    behind = adapter.whole.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
    if not (packed or longer or shape == tuple(own.shape) or (behind is not None and shape == behind.shape[:1])):
        raise UsageError(
            f"{adapter.folder}: {name} is {shape} in the adapter and {tuple(own.shape)} in the base", ANOTHER
        )
    return shape


def _with_rows(
    model: PreTrainedModel, adapter: Adapter, before: Replacement | None, name: str, rows: TokenRows
) -> Replacement:
    """A table with trained rows, perhaps longer than the base's.

    Raises:
        UsageError: it is no table of that width, or rows of it are nowhere.
    """
    module, own = _parameter(model, adapter, name)
    takes = isinstance(module, (nn.Embedding, nn.Linear))
    shape = before.shape if before else tuple(own.shape) if own is not None else ()
    if not takes or len(shape) != 2 or shape[1] != rows.rows_TI.shape[1]:
        raise UsageError(
            f"{adapter.folder}: the rows of {name} have {rows.rows_TI.shape[1]} numbers, and in the base it is a "
            f"{type(module).__name__} of {shape}",
            ANOTHER,
        )
    length, own_tokens = max(shape[0], max(rows.indices) + 1), set(rows.indices)
    absent = next((token for token in range(shape[0], length) if token not in own_tokens), None)
    if absent is not None:
        raise UsageError(
            f"{adapter.folder} has a row for token {length - 1} of {name}, the base's table ends at {shape[0] - 1}, "
            f"and token {absent} is in neither",
            "name the base with the longer table with --base FOLDER, or save the adapter with PEFT's "
            "save_embedding_layers=True",
        )
    return replace(before or Replacement(name, shape), rows=rows, shape=(length, shape[1]))


def _refuse_short_head(model: PreTrainedModel, adapter: Adapter, found: Mapping[str, Replacement]) -> None:
    """Refuse an input table that became longer than the output head, whose rows for these tokens nobody knows."""
    inner, outer = input_table(model), model.get_output_embeddings()
    if inner is None or outer is None or getattr(outer, "weight", None) is None:
        return
    names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
    lengths = []
    for module in (inner, outer):
        name = names[id(module)]
        lengths.append((name, found[name].shape[0] if name in found else module.weight.shape[0]))  # type: ignore[index]
    (table, rows), (head, outputs) = lengths
    before = inner.weight.shape[0] == outer.weight.shape[0]  # type: ignore[index]
    if before and rows != outputs:
        raise UsageError(
            f"{adapter.folder}: {table} has {rows} rows with the adapter and {head} has {outputs}, so some tokens are "
            "in one of them alone",
            "save the adapter with PEFT's save_embedding_layers=True, or train the rows of both",
        )


def tables_of(model: PreTrainedModel, adapter: Adapter) -> dict[str, Replacement]:
    """The same of tables of tokens alone, without what PEFT puts into a model by itself."""
    return {name: new for name, new in replacements(model, adapter).items() if len(new.shape) == 2}


def lengthen(model: PreTrainedModel, found: Mapping[str, Replacement]) -> None:
    """Give a model without weights the shapes of what replaces its parameters, and biases where it had none."""
    for name, new in found.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        own = module._parameters.get(leaf)
        if own is None or tuple(own.shape) != new.shape:
            module._parameters[leaf] = nn.Parameter(torch.empty(new.shape, device="meta"), requires_grad=False)
            fit_sizes(module)
    if (size := new_vocabulary(model, found)) is not None:
        model.config.get_text_config().vocab_size = size


def new_vocabulary(model: PreTrainedModel, found: Mapping[str, Replacement]) -> int | None:
    """How many tokens the model has with these; None where nothing changes, or the config does not say."""
    table = input_table(model)
    name = next((name for name, module in model.named_modules() if module is table), "")
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    new = found.get(f"{name}.weight")
    return new.shape[0] if new is not None and size is not None and size != new.shape[0] else None


def fit_sizes(module: nn.Module) -> None:
    """Let a table or a head say how long it is, where its weight became another."""
    weight = module._parameters["weight"]
    if isinstance(module, nn.Embedding) and weight is not None:
        module.num_embeddings = weight.shape[0]
    elif isinstance(module, nn.Linear) and weight is not None and weight.dtype.is_floating_point:
        module.out_features = weight.shape[0]
