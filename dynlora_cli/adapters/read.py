"""Reads any LoRA folder in PEFT's layout, dynlora's own or another tool's: plain LoRA, rsLoRA, DoRA, with patterns.
Of PEFT's other kinds HiRA, and VeRA as the LoRA that it equals; mlx-lm's adapters as well.

Whatever would change the result without being understood is refused; nothing is skipped, and no pickle is opened.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dynlora_cli.adapters import mlx as mlx_adapter
from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.find import CONFIG, WEIGHTS, damage, find_adapter
from dynlora_cli.adapters.keys import natural_order, sorted_tensors, without_wrappers
from dynlora_cli.adapters.kinds.vera import hira_layers, vera_layers
from dynlora_cli.adapters.peft_parameters import WEIGHT, adapted_parameters
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.foreign import PatternMap, PeftForm, fits, read_object, refuse_links
from dynlora_cli.models.experts import unfuse
from dynlora_cli.runs.folder import RECORD, read_record

# Settings of PEFT's LoraConfig that change what the tensors mean, and that are not carried out here.
NOT_UNDERSTOOD = (
    "alora_invocation_tokens", "arrow_config", "bdlora_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Starts that also changed the base model's weights, so that the saved factors belong to another base.
CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def read_adapter(path: Path, base: str | None = None) -> Adapter:
    """Read the adapter that `path` names.

    Args:
        path: a folder, see `find_adapter`.
        base: folder or hub id of the base model, in place of the one on record; looked at where the adapter does not
            say how wide its layers are, as VeRA.

    Raises:
        UsageError: no adapter there, or one that is damaged, a pickle, or none that can be carried out exactly.
        MeasureError: its weights are not finite.
    """
    folder, note = find_adapter(path)
    refuse_links(folder)
    if fault := damage(folder):
        raise UsageError(f"{folder} {fault}", "name another checkpoint")
    config, mlx = _read_config(folder / CONFIG)
    file = folder / (mlx_adapter.FILE if mlx else WEIGHTS)
    tensors = _read_tensors(file)
    found = sorted_tensors(mlx_adapter.peft_tensors(tensors, file) if mlx else tensors, file)
    if mlx:
        found.notes.append("an adapter of mlx-lm's")
    parts = found.parts
    run = folder if (folder / RECORD).is_file() else folder.parent.parent
    record = read_record(run) if (run / RECORD).is_file() else {}
    notes = "; ".join(filter(None, [note, *found.notes])) or None
    adapter = Adapter(folder, {}, config, record, found.whole, notes)
    adapter = replace(adapter, model_type=_model_type(adapter, base))
    if config["peft_type"] == "VERA":
        return adapter.with_layers(vera_layers(adapter, parts, base))
    if config["peft_type"] == "HIRA":
        return adapter.with_layers(hira_layers(adapter, parts))
    scales = _Scales(config, folder)
    parameters = adapted_parameters(parts, config, folder / CONFIG)
    layers: dict[str, Factors] = {}
    for module, factors in parts.items():
        owner, _, leaf = parameters.get(module, "").rpartition(".")
        if owner and (leaf != WEIGHT or len(factors.get("lora_A", ())) != scales.rank_of(owner)):
            layers |= _slices(parameters[module], factors, scales)
        else:
            layers[owner or module] = _factors(owner or module, factors, scales)
    return replace(adapter, layers={name: layers[name] for name in sorted(layers, key=natural_order)})


def _model_type(adapter: Adapter, base: str | None) -> str:
    """Of the base: from the run's record, else from a folder that is named; empty where nobody says."""
    recorded = (adapter.record.get("base_model") or {}).get("model_type")
    config = Path(base or adapter.base_name) / "config.json"
    if not recorded and config.is_file():
        recorded = read_object(config).get("model_type")
    return str(recorded or "")


def _read_config(path: Path) -> tuple[dict[str, Any], bool]:
    """adapter_config.json as PEFT writes it, and whether it was mlx-lm's."""
    config = read_object(path)
    mlx = mlx_adapter.is_of_mlx(config)
    if mlx:
        config = mlx_adapter.peft_config(config, path)
    fits(PeftForm, config, path)
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA", "HIRA"):
        raise UsageError(
            f"{path}: peft_type is {kind}, not LORA", "PEFT's `convert_to_lora` makes a LoRA of many kinds"
        )
    strange = [key for key in NOT_UNDERSTOOD if config.get(key)]
    if config.get("bias", "none") != "none":
        strange.append("bias")
    if strange:
        shown = ", ".join(f"{key}: {config[key]!r}" for key in strange)
        raise UsageError(f"{path}: {shown}: this kind of LoRA is not understood", "merge it with the tool that made it")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise UsageError(
            f"{path}: init_lora_weights {start!r} changed the base model's weights too",
            "save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {without_wrappers(name): value for name, value in (config.get(key) or {}).items()}
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = [without_wrappers(name) for name in config[key]]
    return config, mlx


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = [file for ending in ("*.bin", "*.pt") for file in sorted(path.parent.glob(ending))]
        if pickles:
            raise UsageError(
                f"{pickles[0]} is a pickle, which can run any code when it is opened; it was not",
                "if you trust its source, load it with PEFT and save it again: safetensors is PEFT's default",
            )
        raise UsageError(
            f"{path.parent} holds {CONFIG} but no {path.name}", "the files are incomplete; copy them again"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}", "copy it again, or train again") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise MeasureError(f"{path}: {name} holds NaN or infinity", "train again with a lower learning rate")
    return tensors


def _factors(module: str, parts: dict[str, Tensor], scales: _Scales) -> Factors:
    embedding = "lora_embedding_A" in parts
    try:
        if embedding:  # of a table [tokens, width]: PEFT adds (B A)ᵀ
            a, b = parts["lora_embedding_B"].T.contiguous(), parts["lora_embedding_A"].T.contiguous()
        else:
            a, b = parts["lora_A"], parts["lora_B"]
    except KeyError as error:
        raise UsageError(f"{scales.folder}: layer {module} lacks its {error.args[0]}", "copy the files again") from None
    if a.ndim != 2 or b.ndim != 2:
        raise UsageError(f"{scales.folder}: layer {module} is a convolution; only linear layers and tables are merged")
    scale = scales.of(module, a.shape[0])
    if a.shape[0] != b.shape[1]:
        raise UsageError(f"{scales.folder}: layer {module} has factors of rank {a.shape[0]} and {b.shape[1]}")
    magnitude = parts.get("lora_magnitude_vector")
    if embedding and magnitude is not None:
        raise UsageError(
            f"{scales.folder}: {module} is a DoRA of an embedding, which is not supported", "merge it with PEFT"
        )
    if scales.config.get("use_dora") and magnitude is None:
        raise UsageError(f"{scales.folder}: layer {module} is DoRA and lacks its magnitude", "copy the files again")
    return Factors(a, *_scaled(b, scale), None if magnitude is None else magnitude.flatten(), embedding)


def _scaled(b_OC: Tensor, scale: float) -> tuple[Tensor, float]:
    """B with the scale in it, and the scale; 1 for a layer that an alpha of 0 switches off, whose B is 0 then."""
    return (scale * b_OC, scale) if scale else (b_OC.new_zeros(b_OC.shape), 1.0)


def _slices(parameter: str, parts: dict[str, Tensor], scales: _Scales) -> dict[str, Factors]:
    """The factors of every expert that has components."""
    if parts.keys() != {"lora_A", "lora_B"}:
        raise UsageError(f"{scales.folder}: {parameter} lacks its lora_A or lora_B", "copy the files again")
    a, b = parts["lora_A"], parts["lora_B"]
    rank = scales.rank_of(parameter)
    if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0):
        raise UsageError(
            f"{scales.folder}: {parameter} has factors {tuple(a.shape)} and {tuple(b.shape)}, and {CONFIG} rank {rank}",
            "one of the two files is of another adapter; copy both again",
        )
    scale = scales.of(parameter, rank)
    return {
        name: Factors(a_CI, *_scaled(b_OC, scale), experts=a.shape[0] // rank)
        for name, (a_CI, b_OC) in unfuse(parameter, a, b, rank).items()
    }


class _Scales:
    """alpha / r of every module, as PEFT finds it: a pattern's key matches the end of a name, and may be a regex."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ranks = PatternMap(config.get("rank_pattern") or {}, f"{folder / CONFIG}: rank_pattern")
        self.alphas = PatternMap(config.get("alpha_pattern") or {}, f"{folder / CONFIG}: alpha_pattern")

    def of(self, module: str, rank: int) -> float:
        """The scale of a module whose factors have this rank.

        Raises:
            UsageError: the config announces another rank.
        """
        announced = self.rank_of(module)
        alpha = self.alphas.first(self._named(module), self.config.get("lora_alpha"))
        if announced != rank:
            raise UsageError(
                f"{self.folder}: layer {module} has rank {rank} in {WEIGHTS} and {announced} in {CONFIG}",
                "one of the two files is of another adapter; copy both again",
            )
        if rank == 0 or not isinstance(alpha, (int, float)):
            raise UsageError(
                f"{self.folder / CONFIG}: layer {module} has rank {rank} and lora_alpha {alpha!r}",
                "a layer has a rank of at least 1, and an alpha; leave one without components out of the files",
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _named(self, module: str) -> str:
        """What patterns are matched with: the name of the weight, where that is the target and not the module."""
        weight = f"{module}.weight"
        wanted = self.config.get("target_parameters") or ()
        return weight if any(weight == end or weight.endswith(f".{end}") for end in wanted) else module

    def rank_of(self, module: str) -> Any:
        """The rank that the config announces."""
        return self.ranks.first(self._named(module), self.config.get("r"))
