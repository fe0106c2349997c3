"""The adapter as data, and on disk: a plain PEFT LoRA (or HiRA) whose scale is exactly 1 for every module.

s is folded into B, and `lora_alpha = r` globally and per module. So every consumer computes the same update, whichever
of PEFT's patterns it honours: PEFT divides alpha by rank per module, vLLM knows one global ratio, llama.cpp divides by
each tensor's own rank.

    Factors    one layer: a_CI, b_OC, and for DoRA a magnitude
    Adapter    all layers, with what is known of where they came from; made by adapters/read.py
    save       an Adapter to a folder

Dimensions: C components of a layer, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.errors import MeasureError
from dynlora_cli.files.whole import write_json
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.experts import ExpertSlice, fuse, parameter_of
from dynlora_cli.models.peft_types import ends_in, taken_for_experts

PREFIX = "base_model.model."
# Keys of `lora_config` that PEFT's other configurations do not have.
ONLY_LORA = (
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora",
    "use_rslora",
)  # fmt: skip
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Factors:
    """The components of one layer: ΔW = b_OC @ a_CI, which is added to W.

    Attributes:
        a_CI: fp32.
        b_OC: fp32, with the scale in it.
        scale: s that training used; in `b_OC` already.
        magnitude_O: DoRA's m: W' = m · (W + ΔW) / ‖W + ΔW‖, norms over the inputs of each output; None for LoRA.
        embedding: the layer is a table, O its tokens and I its width.
        hadamard: HiRA: W' = W ∘ (1 + ΔW). What is said of ΔW, such as its energy, is of ΔW as it is here, not of W'.
        experts: the layer is the slice of one expert, in a parameter that holds so many; 0 for others.
    """

    a_CI: Tensor
    b_OC: Tensor
    scale: float = 1.0
    magnitude_O: Tensor | None = None
    embedding: bool = False
    hadamard: bool = False
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.a_CI.shape[0]

    @property
    def cost(self) -> int:
        """Numbers that one component holds."""
        return self.a_CI.shape[1] + self.b_OC.shape[0]

    @property
    def parameters(self) -> int:
        return self.rank * self.cost

    def delta_OI(self) -> Tensor:
        """ΔW as a dense matrix."""
        return self.b_OC @ self.a_CI

    def singular_values_C(self) -> Tensor:
        """Singular values of ΔW in fp64, largest first, from the thin factors alone; min(C, I, O) of them."""
        if self.rank == 0:
            return torch.zeros(0, dtype=torch.float64)
        _, r_a = torch.linalg.qr(self.a_CI.double().T)
        _, r_b = torch.linalg.qr(self.b_OC.double())
        return torch.linalg.svdvals(r_b @ r_a.T)

    def energy(self) -> float:
        """The Frobenius norm of ΔW, from thin products: ‖BA‖² = tr(BᵀB · AAᵀ)."""
        a, b = self.a_CI.double(), self.b_OC.double()
        return math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item()))


@dataclass(frozen=True)
class Adapter:
    """A LoRA read from a folder, dynlora's own or another tool's.

    Attributes:
        folder: it was read from.
        layers: by module name, in the order of the model's blocks.
        config: adapter_config.json.
        record: dynlora.json, or {} where another tool made it.
        whole: tensors that replace the base model's own, by their name there: a classifier head, new embeddings.
        note: how the folder was found, for the person; None where they named it themselves.
        model_type: of the base's config; empty where nobody says.
    """

    folder: Path
    layers: dict[str, Factors]
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    note: str | None = None
    model_type: str = ""

    @property
    def name(self) -> str:
        return self.record.get("name") or self.folder.resolve().name

    @property
    def base_name(self) -> str:
        """Folder or hub id of the base model; empty where nobody says."""
        recorded = str(((self.record.get("recipe") or {}).get("model") or {}).get("name_or_path") or "")
        # A built-in model lies elsewhere on every machine.
        return recorded if recorded.startswith("builtin:") else self.config.get("base_model_name_or_path") or recorded

    @property
    def task(self) -> str:
        by_type = {value: key for key, value in TASK_TYPES.items()}
        return self.record.get("task") or by_type.get(self.config.get("task_type") or "", "causal-lm")

    @property
    def ranks(self) -> dict[str, int]:
        return {name: factors.rank for name, factors in self.layers.items()}

    @property
    def parameters(self) -> int:
        """Numbers in all components; heads and magnitudes do not count."""
        return sum(factors.parameters for factors in self.layers.values())

    @property
    def components(self) -> int:
        return sum(self.ranks.values())

    @property
    def all_ranks(self) -> dict[str, int]:
        """Ranks with the layers that training pruned to nothing, which the files do not list."""
        return {**dict.fromkeys(self.record.get("layers") or {}, 0), **self.ranks}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the targets are GPT-2's Conv1D, whose weights are [I, O]."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def dora(self) -> bool:
        return any(factors.magnitude_O is not None for factors in self.layers.values())

    @property
    def hira(self) -> bool:
        return any(factors.hadamard for factors in self.layers.values())

    @property
    def experts(self) -> dict[str, int]:
        """Layers that are the slice of one expert, and how many experts their parameter holds."""
        return {name: factors.experts for name, factors in self.layers.items() if factors.experts}

    @property
    def as_parameters(self) -> set[str]:
        """Layers whose weight is a target, in place of the module, since PEFT would take the module for experts."""
        targets = self.config.get("target_parameters") or ()
        weights = {name.removesuffix(".weight") for name in targets if name.endswith(".weight")}
        ends = taken_for_experts(self.model_type) or {name.rpartition(".")[2] for name in weights}
        return ends_in([name for name, factors in self.layers.items() if not factors.experts], ends)

    @property
    def kind(self) -> str:
        """LoRA, DoRA or HiRA: what its factors do to a weight."""
        return "DoRA" if self.dora else "HiRA" if self.hira else "LoRA"

    def with_layers(self, layers: Mapping[str, Factors]) -> Adapter:
        """The same adapter with other factors; layers without components are left out."""
        return replace(self, layers={name: f for name, f in layers.items() if f.rank})


def save(adapter: Adapter, folder: Path, *, for_peft: bool = True) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the bytes depend on the adapter only.

    Args:
        adapter: to be written.
        folder: exists.
        for_peft: False: every layer is named in `target_modules`, also where PEFT would not find it there.
    """
    config = adapter.config
    written = lora_config(
        adapter.ranks,
        base_model=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
        task=adapter.task,
        fan_in_fan_out=adapter.fan_in_fan_out,
        modules_to_save=config.get("modules_to_save"),
        experts=adapter.experts,
        as_parameters=adapter.as_parameters if for_peft and adapter.kind == "LoRA" else (),
    )
    written["task_type"] = config.get("task_type")
    written["use_dora"] = adapter.dora
    adapted = {f"{name}.weight": f"{name}.base_layer.weight" for name in adapter.layers}
    tensors = {adapted.get(name, name): tensor for name, tensor in adapter.whole.items()}
    slices = {name: (f.a_CI, f.b_OC) for name, f in adapter.layers.items() if f.experts}
    tensors |= fuse(slices, adapter.experts)
    for name, factors in adapter.layers.items():
        if factors.experts:
            continue
        if factors.embedding:
            tensors |= {f"{name}.lora_embedding_A": factors.b_OC.T, f"{name}.lora_embedding_B": factors.a_CI.T}
        else:
            tensors |= {f"{name}.lora_A.weight": factors.a_CI, f"{name}.lora_B.weight": factors.b_OC}
        if factors.magnitude_O is not None:
            tensors[f"{name}.lora_magnitude_vector"] = factors.magnitude_O
    if adapter.hira:
        written, tensors = hira_form(written, tensors)
    write_adapter(folder, written, {PREFIX + name: tensor for name, tensor in tensors.items()})


def lora_tensors(pool: Pool) -> dict[str, Tensor]:
    """PEFT's names and tensors: lora_A.weight [C, I], lora_B.weight [O, C] with s in it; layers at rank 0 absent."""
    experts = experts_of(pool)
    tensors: dict[str, Tensor] = {}
    slices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in pool.layers.items():
        if layer.count:
            a_CI, b_OC = layer.factors()
            a_CI, b_OC = a_CI.detach(), layer.scale * b_OC.detach()
            if name in experts:
                slices[name] = a_CI, b_OC
            else:
                tensors |= {f"{name}.lora_A.weight": a_CI, f"{name}.lora_B.weight": b_OC}
    return {PREFIX + name: tensor for name, tensor in (tensors | fuse(slices, experts)).items()}


def experts_of(pool: Pool) -> dict[str, int]:
    """Layers that are the slice of one expert, and how many experts their parameter holds."""
    return {name: layer.base.experts for name, layer in pool.layers.items() if isinstance(layer.base, ExpertSlice)}


def hira_form(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a LoRA as PEFT's HIRA has them.

    All layers are filled up to the largest rank with components of zeros, since PEFT does not heed HiRA's
    `rank_pattern` at linear layers (0.21, tuners/hira/layer.py: dispatch_default).
    """
    rank, form = config["r"], {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            form[name.replace(".lora_A.weight", ".hira_A")] = F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif name.endswith(".lora_B.weight"):
            form[name.replace(".lora_B.weight", ".hira_B")] = F.pad(tensor, (0, rank - tensor.shape[1]))
        else:
            form[name] = tensor
    written = {key: value for key, value in config.items() if key not in ONLY_LORA}
    return written | {"peft_type": "HIRA", "hira_dropout": 0.0, "init_weights": True, "rank_pattern": {}}, form


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str,
    revision: str | None,
    task: str,
    fan_in_fan_out: bool = False,
    modules_to_save: list[str] | None = None,
    experts: Collection[str] = (),
    as_parameters: Collection[str] = (),
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        ranks: components per layer; layers at 0 are left out, since PEFT refuses rank 0.
        base_model: folder or hub id that PEFT may load the base from.
        revision: of the base.
        task: as in the recipe.
        fan_in_fan_out: the targets are GPT-2's transposed Conv1D.
        modules_to_save: modules stored whole, such as a classifier head.
        experts: layers that are the slice of one expert; their parameter is listed, with the largest rank of a slice.
        as_parameters: layers that are listed by their weight; see models/peft_types.py.
    """
    apart = {*experts, *as_parameters}
    alive = {name: rank for name, rank in ranks.items() if rank and name not in apart}
    parameters = {f"{name}.weight": ranks[name] for name in as_parameters if ranks[name]}
    for name in experts:
        if ranks[name]:
            parameters[parameter_of(name)] = max(ranks[name], parameters.get(parameter_of(name), 0))
    modules, alive = sorted(alive), alive | parameters
    largest = max(alive.values())
    # PEFT tries every key for every module: one key for all modules of a rank, each a full, escaped name. Where a key
    # names parameters alone, PEFT 0.21 warns that it "was ignored", and honours it all the same.
    pattern = {
        "|".join(re.escape(name) for name, r in alive.items() if r == rank): rank
        for rank in sorted(set(alive.values()) - {largest})
    }
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": pattern,
        "revision": revision,
        "target_modules": modules,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "task_type": TASK_TYPES[task],
        "use_dora": False,
        "use_rslora": False,
    }


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the bytes depend on the arguments only.

    Raises:
        MeasureError: a tensor is not finite.
    """
    on_cpu = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
    for name, tensor in on_cpu.items():
        if not tensor.isfinite().all():
            hint = "lower the learning rate, or look at the adapters that went in"
            raise MeasureError(f"{name} holds NaN or infinity; nothing was written", hint)
    # Not `save_file`, which makes files that only their owner can read.
    (folder / WEIGHTS).write_bytes(to_bytes(on_cpu, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
