"""The adapter as data: a plain PEFT LoRA, or one of its relatives, whose scale is exactly 1 for every module.

s is folded into B, and `lora_alpha = r` globally and per module. So every consumer computes the same update, whichever
of PEFT's patterns it honours: PEFT divides alpha by rank per module, vLLM knows one global ratio, llama.cpp divides by
each tensor's own rank.

    Factors    one layer: a_CI, b_OC, and what its kind has beside them, such as DoRA's magnitude
    TokenRows  trained rows of a table of tokens
    Adapter    all of them, with what is known of where they came from

adapters/read.py makes it from files, adapters/write.py writes it; adapters/kinds/ says what is special of each kind.

Dimensions: C components of a layer, I inputs, O outputs, T trained tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlora_cli import plugins
from dynlora_cli.adapters.births import births_of
from dynlora_cli.adapters.find import IMAGE_STEM
from dynlora_cli.adapters.images.kohya_names import Style
from dynlora_cli.lora.timesteps.schedule import Schedule
from dynlora_cli.models.peft_types import ends_in, taken_for_experts
from dynlora_cli.rounding.floats import rounded
from dynlora_cli.runs.record import Birth

PREFIX = "base_model.model."
IMAGE_TASK = "text-to-image"
PLAIN = "lora"  # the kind of a layer whose ΔW is added, and which has nothing else


def tasks_by_type() -> dict[str, str]:
    """For PEFT's types of tasks, the task that adapters of other tools with that type are read as."""
    owners = [name for name in plugins.names("tasks") if plugins.declared("tasks", name, "OWNS_TASK_TYPE")]
    return {plugins.declared("tasks", name, "TASK_TYPE"): name for name in owners}


@dataclass(frozen=True)
class Factors:
    """The components of one layer: ΔW = b_OC @ a_CI. Its kind says what ΔW does to W; a LoRA adds it.

    What is said of ΔW, such as its energy, is of ΔW as it is here, not of W'.

    Attributes:
        a_CI: fp32.
        b_OC: fp32, with the scale in it.
        scale: s that training used; in `b_OC` already.
        embedding: the layer is a table, O its tokens and I its width.
        experts: the layer is the slice of one expert, in a parameter that holds so many; 0 for others.
        kind: the file of adapters/kinds/ that knows this layer.
        own: tensors that the kind has beside the factors, fp32. Names end in their shape: `magnitude_O` has a number
            for each output.
        born: components by birth, in the order of `Adapter.births` and of the rows of A. (): all of the last birth.
        schedule: by which a T-LoRA uses its first components, the same for all layers; None: always all.
        bias_O: fp32, added to what the layer gives, with the scale in it (PEFT's `lora_bias`); None: there is none.
        kernel: height and width of a convolution's kernel; I is inputs x height x width then, in this order, and B is a
            convolution of 1 x 1. (): the layer is no convolution.
    """

    a_CI: Tensor
    b_OC: Tensor
    scale: float = 1.0
    embedding: bool = False
    experts: int = 0
    kind: str = PLAIN
    own: Mapping[str, Tensor] = field(default_factory=dict)
    born: tuple[int, ...] = ()
    bias_O: Tensor | None = None
    schedule: Schedule | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.a_CI.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs, inputs, and the kernel of a convolution: two layers of other shapes are never the same."""
        return self.b_OC.shape[0], self.a_CI.shape[1], *self.kernel

    @property
    def cost(self) -> int:
        """Numbers that one component holds."""
        return self.a_CI.shape[1] + self.b_OC.shape[0]

    @property
    def parameters(self) -> int:
        return self.rank * self.cost

    def keep(self, keep_C: Tensor) -> Factors:
        """The same with only these components. [C], boolean"""
        born = tuple(int(part.sum()) for part in keep_C.split(list(self.born))) if self.born else ()
        return replace(self, a_CI=self.a_CI[keep_C], b_OC=self.b_OC[:, keep_C], born=born)

    def of_zeros(self) -> Factors:
        """The same with one component, which does nothing."""
        a_CI, b_OC = torch.zeros(1, self.a_CI.shape[1]), torch.zeros(self.b_OC.shape[0], 1)
        return replace(self, a_CI=a_CI, b_OC=b_OC, born=())

    def turned(self, turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Factors:
        """The same update in other components, those of each birth by themselves.

        Args:
            turn: makes other factors of a_CI and b_OC; perhaps fewer of them.
        """
        counts = list(self.born or (self.rank,))
        parts = [
            turn(a, b) if len(a) else (a, b)
            for a, b in zip(self.a_CI.split(counts), self.b_OC.split(counts, 1), strict=True)
        ]
        born = tuple(len(a) for a, _ in parts) if self.born else ()
        return replace(self, a_CI=torch.cat([a for a, _ in parts]), b_OC=torch.cat([b for _, b in parts], 1), born=born)

    def rounded(self, dtype: str, scale: float = 1.0) -> Factors:
        """The same with factors that a file in this format holds as they are; see rounding/floats.py.

        Args:
            dtype: of config/dtypes.py.
            scale: alpha / rank in the file, whose B is multiplied by it when it is read.
        """
        a_CI, b_OC = rounded(self.a_CI, self.b_OC / scale, dtype)
        return replace(self, a_CI=a_CI, b_OC=scale * b_OC)

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
class TokenRows:
    """Rows of a table that take the place of the base's own: PEFT's `trainable_token_indices`.

    They are the rows themselves, not what is added to the base's. The table may be the output head as well.

    Attributes:
        indices: of the tokens, each once; rows behind the base's table make it longer.
        rows_TI: fp32, in the order of `indices`.
    """

    indices: tuple[int, ...]
    rows_TI: Tensor


@dataclass(frozen=True)
class ImageFile:
    """The file of an adapter for a diffusion pipeline, see adapters/images/.

    Attributes:
        form: diffusers | kohya.
        stem: its name, without the ending.
        dtype: number format of its factors, of config/dtypes.py.
        metadata: the texts in its header.
        style: which of kohya's names it has; see adapters/images/kohya_names.py.
    """

    form: str
    stem: str
    dtype: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    style: Style = field(default_factory=Style)

    def alphas(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """What the file says as alpha of each layer: the rank, or in kohya's form one number for all.

        diffusers 0.42 looks up kohya's alphas of attention layers by names that no layer has, and takes the most
        frequent one for them; with one number it is right, as everybody else is.
        """
        if self.form != "kohya" or not ranks:
            return dict(ranks)
        usual = Counter(ranks.values()).most_common(1)[0][0]
        return dict.fromkeys(ranks, usual)


@dataclass(frozen=True)
class Adapter:
    """A LoRA read from a folder, dynlora's own or another tool's, or from an image adapter's file.

    Attributes:
        folder: it was read from; of an image adapter the file.
        layers: by module name, in the order of the model's blocks.
        config: adapter_config.json.
        record: dynlora.json, or {} where another tool made it.
        whole: tensors that replace the base model's own, by their name there: a classifier head, new embeddings,
            trained biases.
        token_rows: by name of the table's module. Where the base ties its output head to its input table, the rows of
            the input table are the head's, too, unless the head has rows or a tensor of its own.
        note: how the folder was found, for the person; None where they named it themselves.
        model_type: of the base's config; empty where nobody says.
        image: of an adapter for a diffusion pipeline, how its file was; None: it is in PEFT's files. Its layers are
            named PART.path.in.module, such as `unet.mid_block.attentions.0.proj_in`.
    """

    folder: Path
    layers: dict[str, Factors]
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    note: str | None = None
    model_type: str = ""
    image: ImageFile | None = None

    @property
    def name(self) -> str:
        if self.record.get("name") or self.image is None:
            return self.record.get("name") or self.folder.resolve().name
        return self.folder.resolve().parent.name if self.image.stem == IMAGE_STEM else self.image.stem

    @property
    def file_form(self) -> str:
        """In which form it is on disk: peft | diffusers | kohya."""
        return self.image.form if self.image else "peft"

    @cached_property
    def births(self) -> tuple[Birth, ...]:
        """The runs that its components began in, oldest first; never empty."""
        return births_of(self.folder, self.record, self.name)

    @property
    def base_name(self) -> str:
        """Folder or hub id of the base model; empty where nobody says."""
        model = (self.record.get("recipe") or {}).get("model")  # whoever needs more of it checks it as a recipe
        recorded = str(model.get("name_or_path") or "") if isinstance(model, dict) else ""
        # A built-in model lies elsewhere on every machine.
        return recorded if recorded.startswith("builtin:") else self.config.get("base_model_name_or_path") or recorded

    @property
    def task(self) -> str:
        if self.image:
            return IMAGE_TASK
        return self.record.get("task") or tasks_by_type().get(self.config.get("task_type") or "", "causal-lm")

    @property
    def ranks(self) -> dict[str, int]:
        return {name: factors.rank for name, factors in self.layers.items()}

    @property
    def parameters(self) -> int:
        """Numbers in all components; heads, magnitudes, biases and rows of tokens do not count."""
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
    def has_lora_bias(self) -> bool:
        """Whether a layer adds a bias of its own, PEFT's `lora_bias`."""
        return any(factors.bias_O is not None for factors in self.layers.values())

    @property
    def biases(self) -> list[str]:
        """Biases that replace the base's own, by name; those of a head that is there whole are not among them."""
        names = [name for name in self.whole if name == "bias" or name.endswith(".bias")]
        return [name for name in names if f"{name.removesuffix('bias')}weight" not in self.whole]

    def own_numbers(self) -> str | None:
        """What it has in the place of the base's own numbers, or adds to them beside its components, in words."""
        if self.token_rows:
            return f"it has its own rows of {next(iter(self.token_rows))}, in place of the base's"
        if heads := [name for name in self.whole if name not in self.biases]:
            return f"it has its own {heads[0].rpartition('.')[0] or heads[0]}, in place of the base's"
        if self.biases:
            return f"it has biases of its own, such as {self.biases[0]}, in place of the base's"
        biased = next((name for name, factors in self.layers.items() if factors.bias_O is not None), None)
        return None if biased is None else f"it adds a bias to {biased}"

    @property
    def form(self) -> str:
        """The file of adapters/kinds/ that knows its layers; LoRA where nothing is special."""
        special = {factors.kind for factors in self.layers.values()} - {PLAIN}
        return min(special, default=PLAIN)

    @property
    def schedule(self) -> Schedule | None:
        """How many of its components are used at a timestep; None: always all."""
        return next((factors.schedule for factors in self.layers.values() if factors.schedule), None)

    @property
    def multiplies(self) -> bool:
        """Whether ΔW is no update that is added to W."""
        return bool(getattr(plugins.load("kinds", self.form), "multiplies", False))

    @property
    def keeps_one(self) -> bool:
        """Whether each layer must keep a component, since its files could not hold the rest of it alone."""
        return self.has_lora_bias or bool(getattr(plugins.load("kinds", self.form), "keeps_one", False))

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
        """Its kind in words, such as DoRA: what its factors do to a weight."""
        return str(plugins.load("kinds", self.form).title)

    def born(self, name: str) -> tuple[int, ...]:
        """Components of a layer by birth: all of the last where nothing is said, 0 of each where there is no layer."""
        factors = self.layers.get(name)
        known = factors.born if factors else ()
        return known or (*[0] * (len(self.births) - 1), factors.rank if factors else 0)

    def rounded(self, dtype: str) -> Adapter:
        """The adapter as it is in files whose factors have this format, of config/dtypes.py.

        Raises:
            MeasureError: a component is too large for it.
        """
        alphas = self.image.alphas(self.ranks) if self.image else {}
        scales = {name: alpha / self.layers[name].rank for name, alpha in alphas.items()}
        return self.with_layers({name: f.rounded(dtype, scales.get(name, 1.0)) for name, f in self.layers.items()})

    def with_layers(self, layers: Mapping[str, Factors]) -> Adapter:
        """The same adapter with other factors; layers without components are left out.

        One that adds a bias keeps a component of zeros: no file could hold the bias alone.
        """
        kept = {name: f if f.rank or f.bias_O is None else f.of_zeros() for name, f in layers.items()}
        return replace(self, layers={name: f for name, f in kept.items() if f.rank})
