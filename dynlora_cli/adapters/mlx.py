"""The adapters of mlx-lm, as the LoRA (or DoRA) in PEFT's form that they are.

mlx-lm adds scale · (x a) b, with a [inputs, rank] and b [rank, outputs]: PEFT's factors, transposed, without a division
by the rank. Its DoRA keeps the magnitude as `m`.

Source: mlx-lm, mlx_lm/tuner/lora.py, lora/dora.py and utils.py: linear_to_lora_layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.errors import UsageError

FILE = "adapters.safetensors"
KINDS = ("lora", "dora")
_FACTORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm wrote an adapter_config.json."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def peft_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What PEFT's adapter_config.json would say.

    Raises:
        UsageError: it is no LoRA, or does not say how its factors are scaled.
    """
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in KINDS:
        raise UsageError(f"{path}: mlx-lm's fine_tune_type {kind!r} is no LoRA", "fuse it: python -m mlx_lm fuse")
    known = settings if isinstance(settings, dict) else {}
    rank, scale, alpha = known.get("rank"), known.get("scale"), known.get("alpha")
    # Releases of 2024 that had an alpha multiplied by alpha / rank as well, others only wrote it down.
    if not isinstance(rank, int) or rank < 1 or not isinstance(scale, (int, float)) or alpha not in (None, rank):
        raise UsageError(
            f"{path} is mlx-lm's, and its lora_parameters {settings!r} do not say how its factors are scaled",
            "write its rank and scale there, and no alpha; or fuse it: python -m mlx_lm fuse",
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": kind == "dora",
    }


def peft_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by PEFT's names and in its layout.

    Raises:
        UsageError: a tensor is of another kind, such as the factors of many experts.
    """
    found = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in _FACTORS or tensor.ndim != (1 if leaf == "m" else 2):
            raise UsageError(
                f"{path} is mlx-lm's, and its tensor {key} {tuple(tensor.shape)} is not understood",
                "fuse it with mlx-lm: python -m mlx_lm fuse",
            )
        found[f"{PREFIX}{module}.{_FACTORS[leaf]}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return found
