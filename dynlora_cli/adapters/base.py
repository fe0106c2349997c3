"""The base model that an adapter belongs to: which one, where it lies, and whether it is the one it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dynlora_cli.models.load import Base, load_base
from dynlora_cli.models.place import Place
from dynlora_cli.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN, Adapter, Factors, tasks_by_type
from dynlora_cli.adapters.expert_files import parameter_of, parts_of
from dynlora_cli.config.plug_in_keys import section_form
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, first_fault, read_object
from dynlora_cli.models.experts import ExpertSlice
from dynlora_cli.models.find import find_model, quantization_of
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.models.linear import is_linear, is_transposed, linear_shape
from dynlora_cli.models.load import HEAD_NAMES
from dynlora_cli.runs.folder import RECORD

COMMIT = re.compile("[0-9a-f]{40}")
ANOTHER = "this is another base model; name the right one with --base FOLDER"
# Of a config: what a quantized model and the one that it was made from have in common.
SIZES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


def find_base(adapter: Adapter, base: str | None = None, trust: bool | Model = False) -> Place:
    """The base of an adapter.

    Args:
        adapter: knows its base by name.
        base: a folder or hub id to take instead, such as one that was moved.
        trust: code that comes with the base may run, because the person said so on the command line; or the model of
            their own recipe, for that base alone. What the adapter's folder says of it is never followed.

    Raises:
        MachineError: it is not on this machine.
        UsageError: `base` holds no model, or the one that was found is not what the adapter was trained on.
    """
    kind = adapter.config.get("task_type")
    supported = tasks_by_type()
    if kind is not None and kind not in supported:
        raise UsageError(
            f"{adapter.folder}: models of task_type {kind} are not supported yet", f"there are: {', '.join(supported)}"
        )
    name = adapter.base_name
    if not (base or name):
        raise UsageError(f"{adapter.folder} does not say what its base model is", "name it with --base FOLDER")
    labels = label_names(adapter)
    recorded = recorded_model(adapter)
    options = recorded.model_copy(
        update={
            "name_or_path": base or name,
            "task": adapter.task,
            "num_labels": None,  # `labels` tell, and a reward model of another tool has a single output
            "revision": None if base else adapter.config.get("revision"),
            "trust_remote_code": False,
        }
    )
    if not base and name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise MachineError(
            f"the base model of {adapter.folder} was at {name}, and is not there", "say where it is with --base FOLDER"
        )
    folder, _ = find_model(options)
    if trust is True or (isinstance(trust, Model) and trust.trust_remote_code and find_model(trust)[0] == folder):
        options = options.model_copy(update={"trust_remote_code": True})
    place = Place(options, folder, labels, base is not None)
    place.files.refuse_code(trained_with_it=recorded.trust_remote_code)
    _refuse_another(adapter, place)
    return place


def recorded_model(adapter: Adapter) -> Model:
    """The `model` section that the adapter was trained by, without what only the person may switch on.

    Raises:
        UsageError: the record is damaged.
    """
    recorded = (adapter.record.get("recipe") or {}).get("model") or {"name_or_path": adapter.base_name or "?"}
    try:
        model = cast("Model", section_form("model", recorded).model_validate(recorded))
    except ValidationError as error:
        raise UsageError(f"{adapter.folder}: {RECORD} is damaged: model.{first_fault(error)}", COPY_AGAIN) from None
    if "/" in (model.attn_implementation or ""):  # a kernel of the hub, which is code
        model = model.model_copy(update={"attn_implementation": None})
    return model


def label_names(adapter: Adapter) -> list[str] | None:
    """Class names of a classifier; numbers where another tool did not record them. None for other tasks."""
    if outputs := plugins.declared("tasks", adapter.task, "OUTPUTS"):
        return list(outputs)
    if not plugins.declared("tasks", adapter.task, "HAS_CLASSES"):
        return None
    recorded = (adapter.record.get("data") or {}).get("labels")
    if recorded:
        return [str(label) for label in recorded]
    heads = [t for name, t in adapter.whole.items() if name.split(".")[0] in HEAD_NAMES and name.endswith("weight")]
    if not heads:
        raise UsageError(f"{adapter.folder} is a classifier without its head", "save it with modules_to_save")
    return [str(number) for number in range(heads[-1].shape[0])]


def _refuse_another(adapter: Adapter, place: Place) -> None:
    """Compare the model's commit, where its folder is named by one, and its fingerprint with those on record."""
    revision, commit = str(adapter.config.get("revision")), place.folder.name
    if COMMIT.fullmatch(revision) and COMMIT.fullmatch(commit) and revision != commit:
        raise UsageError(
            f"{place.folder} is another revision than {adapter.folder} was trained on, {revision}",
            "name the right one with --base FOLDER",
        )
    recorded: dict[str, Any] = adapter.record.get("base_model") or {}
    before = recorded.get("fingerprint") or {}
    if not before:
        return
    if place.chosen and _made_from(adapter, place):
        return
    if what := changed_since(before, place.folder, place.files.config):
        raise UsageError(
            f"{place.folder} is not the model that {adapter.folder} was trained on: {what}",
            "name the right one with --base FOLDER" if place.chosen else "bring back the model as it was",
        )


def stored_quantized(adapter: Adapter) -> Place | None:
    """The base that the adapter was trained on, where that is a folder here whose weights are stored quantized."""
    folder = Path(adapter.base_name or "?").expanduser()
    if not folder.is_dir() or not quantization_of(folder):
        return None
    before = (adapter.record.get("base_model") or {}).get("fingerprint")
    if before and changed_since(before, folder.resolve(), read_object(folder / "config.json")):
        return None
    update = {"name_or_path": str(folder), "task": adapter.task, "num_labels": None, "trust_remote_code": False}
    options = recorded_model(adapter).model_copy(update=update)
    return Place(options, find_model(options)[0], label_names(adapter), False)


def _made_from(adapter: Adapter, place: Place) -> bool:
    """Whether the base in training was stored quantized, so that the full model that a person names is another one.

    Its files cannot tell: names, shapes and types differ. Sizes are compared here, and predictions when it is merged.

    Raises:
        UsageError: it has other sizes.
    """
    recorded = (adapter.record.get("base_model") or {}).get("quantization")
    stored = stored_quantized(adapter)
    if not (recorded or stored) or place.files.quantization:
        return False
    now, before = place.files.config, stored.files.config if stored else {}
    for key in SIZES:
        if before.get(key) is not None and now.get(key) is not None and before[key] != now[key]:
            raise UsageError(
                f"{place.folder} is not the model that the quantized base of {adapter.folder} was made from: its "
                f"{key} is {now[key]}, and {before[key]} there",
                "name the right one with --base FOLDER",
            )
    return True


def module_of(model: PreTrainedModel, name: str, factors: Factors, adapter: Adapter) -> nn.Module:
    """The module that an adapted layer belongs to.

    Raises:
        UsageError: the model has none of that name, of that shape or of a kind that takes components.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"{adapter.folder}: the base model has no layer {name}", ANOTHER) from None
    if factors.embedding or factors.experts:
        fits = isinstance(module, nn.Embedding if factors.embedding else ExpertSlice)
    else:
        fits = is_linear(module) or (factors.kind == PLAIN and holds_weight(module))
    if not fits:
        raise UsageError(
            f"{adapter.folder}: {name} is a {type(module).__name__}, which takes no {adapter.kind} here",
            "merge it with the tool that made it",
        )
    if is_linear(module) and is_transposed(module) and name in adapter.as_parameters:
        raise UsageError(
            f"{adapter.folder}: {name} is a {type(module).__name__}, whose weight PEFT's target_parameters takes with "
            "inputs and outputs the other way around, which is not supported",
            "train it with target_modules, or merge it with PEFT",
        )
    d_in, d_out = (module.embedding_dim, module.num_embeddings) if factors.embedding else linear_shape(module)
    if (d_in, d_out) != (factors.a_CI.shape[1], factors.b_OC.shape[0]):
        found = f"{factors.b_OC.shape[0]} x {factors.a_CI.shape[1]}"
        raise UsageError(
            f"{adapter.folder}: {name} is {d_out} x {d_in} in the base and {found} in the adapter", ANOTHER
        )
    return module


def expert_slices(model: PreTrainedModel, adapter: Adapter) -> dict[str, dict[int, Factors]]:
    """The factors of all slices of parameters of many experts, by parameter and expert.

    They are in the parameter's own layout: a_CI is of its columns, b_OC of its rows. PEFT takes those of a module that
    says `is_transposed` for outputs and inputs, and those of every other one for inputs and outputs.

    Raises:
        UsageError: the model has no such parameter, or one of another shape.
    """
    found: dict[str, dict[int, Factors]] = {}
    for name, factors in adapter.layers.items():
        if not factors.experts:
            continue
        (owner, expert, _), parameter = parts_of(name), parameter_of(name)
        try:
            module, shape = model.get_submodule(owner), tuple(model.get_parameter(parameter).shape)
        except AttributeError:
            raise UsageError(f"{adapter.folder}: the base model has no parameter {parameter}", ANOTHER) from None
        if len(shape) == 3 and getattr(module, "is_transposed", False):
            factors = replace(factors, a_CI=factors.b_OC.T, b_OC=factors.a_CI.T)
        lead = (factors.experts,) if factors.experts > 1 or len(shape) == 3 else ()
        own = (*lead, factors.b_OC.shape[0], factors.a_CI.shape[1])
        if own != shape:
            raise UsageError(f"{adapter.folder}: {parameter} is {shape} in the base and {own} in the adapter", ANOTHER)
        found.setdefault(parameter, {})[expert] = factors
    return found


def holds_weight(module: nn.Module) -> bool:
    """Whether a module that is no layer of a known kind has a weight [O, I], such as a router of experts."""
    weight, kind = module._parameters.get("weight"), type(module)
    plain = is_linear(module) or isinstance(module, nn.Embedding)
    # Some routers are linear layers by name alone, and return more than one tensor.
    own = isinstance(module, nn.Linear) and kind.__module__.startswith("transformers") and "forward" in vars(kind)
    return weight is not None and weight.ndim == 2 and (own or not plain)


def read_tokenizer(adapter: Adapter, place: Place) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the adapter, its chat template included, or the base's."""
    own = (adapter.folder / "tokenizer_config.json").is_file()
    if own and not (
        place.options.trust_remote_code and read_object(adapter.folder / "tokenizer_config.json").get("auto_map")
    ):
        return load_tokenizer(adapter.folder)
    tokenizer = load_tokenizer(place.folder, trust_remote_code=place.options.trust_remote_code)
    template = adapter.folder / "chat_template.jinja"
    if own and template.is_file():  # a tokenizer made of code: the base's is trusted, one beside an adapter never is
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def base_in_memory(adapter: Adapter, place: Place, tokenizer: PreTrainedTokenizerBase) -> Base:
    """The base model as the adapter was trained on it (its dtype, 4 or 8 bits), on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(
        place.options,
        place.files,
        tokenizer,
        device=device,
        labels=place.labels,
        seed=int(adapter.record.get("seeds", {}).get("seed", 0)),
    )
    base.model.requires_grad_(False)
    base.model.eval()
    return base
