"""What the kinds of adapters share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dynlora_cli.adapters.adapter import PREFIX, Adapter, Factors
from dynlora_cli.adapters.expert_files import fuse
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.experts import ExpertSlice

Parts = Mapping[str, Mapping[str, Tensor]]  # the tensors of every layer


COPY_AGAIN = "copy the files again"


def some(layers: dict[str, Factors], adapter: Adapter) -> dict[str, Factors]:
    if not any(factors.rank for factors in layers.values()):
        raise UsageError(f"{adapter.folder / WEIGHTS} holds zeros only", "train it first")
    return layers


# Keys of `lora_config` that PEFT's other configurations do not have.
ONLY_LORA = (
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora",
    "use_rslora",
)  # fmt: skip


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
