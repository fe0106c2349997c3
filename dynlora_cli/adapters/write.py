"""Writing an adapter as PEFT reads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN, PREFIX, Adapter, TokenRows
from dynlora_cli.adapters.expert_files import fuse, parameter_of
from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.adapters.images import write as images
from dynlora_cli.adapters.images.beside import write_beside
from dynlora_cli.adapters.keys import BIAS
from dynlora_cli.adapters.kind import experts_of, saved
from dynlora_cli.adapters.token_rows import indices_of, tensors_of
from dynlora_cli.config.dtypes import FULL, IN_FILES
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.files.tensor_file import file_bytes, in_order
from dynlora_cli.files.whole import write_json
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.timesteps.layer import schedule_of
from dynlora_cli.lora.timesteps.schedule import Schedule
from dynlora_cli.models.linear import is_transposed
from dynlora_cli.models.peft_types import ends_in, taken_for_experts
from dynlora_cli.rounding.floats import TORCH

# The tensors that are factors of components; all others stay in fp32, whatever the format of a file.
_FACTOR = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB]|hira_[AB])")
NEAR = 2.0**-22  # a run's B is kept without its scale s, and (b / s) · s may miss b by the last bit of fp32


def save(adapter: Adapter, folder: Path, *, for_peft: bool = True, dtype: str = FULL) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; the bytes depend on the adapter only.

    An adapter of a diffusion pipeline goes into one file of its own form; see adapters/images/.

    Args:
        adapter: to be written.
        folder: exists.
        for_peft: False: every layer is named in `target_modules`, also where PEFT would not find it there.
        dtype: of the factors, of config/dtypes.py; they are rounded to it.

    Returns:
        The file of the tensors.
    """
    if adapter.image:
        return images.save(adapter.rounded(dtype), folder, dtype)
    if not adapter.layers:
        _save_rows(adapter, folder)
        return folder / WEIGHTS
    rounded = adapter.rounded(dtype)
    written, tensors = files_of(rounded, for_peft=for_peft)
    write_adapter(folder, written, tensors, dtype, adapter.schedule)
    write_beside(rounded, folder, adapter.model_type, dtype)
    return folder / WEIGHTS


def bytes_of(adapter: Adapter, dtype: str) -> int:
    """Bytes of the file of tensors that `save` writes; factors may be on the device "meta"."""
    if adapter.image:
        return images.bytes_of(adapter, dtype)
    return file_bytes(shapes_of(adapter, dtype))


def shapes_of(adapter: Adapter, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of every tensor of that file."""
    _, tensors = files_of(adapter)
    kinds = {name: IN_FILES[dtype if is_factor(name) else FULL] for name in tensors}
    return {name: (kinds[name], tuple(tensor.shape)) for name, tensor in tensors.items()}


def is_factor(name: str) -> bool:
    """Whether a tensor of the file is a factor of components."""
    return _FACTOR.fullmatch(name) is not None


def files_of(adapter: Adapter, *, for_peft: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors, of an adapter that has layers."""
    config = adapter.config
    written = lora_config(
        adapter.ranks,
        base_model=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
        task=adapter.task,
        fan_in_fan_out=adapter.fan_in_fan_out,
        modules_to_save=config.get("modules_to_save"),
        experts=adapter.experts,
        as_parameters=adapter.as_parameters if for_peft and adapter.form == PLAIN else (),
        token_rows=adapter.token_rows,
        bias=_bias_of(adapter),
        lora_bias=adapter.has_lora_bias,
    )
    written["task_type"] = config.get("task_type")
    leaves = ("weight", "bias")
    adapted = {f"{name}.{leaf}": f"{name}.base_layer.{leaf}" for name in adapter.layers for leaf in leaves}
    adapted |= {f"{name}.weight": f"{name}.token_adapter.base_layer.weight" for name in adapter.token_rows}
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
            if adapter.has_lora_bias:
                bias_O = factors.bias_O
                tensors[f"{name}.{BIAS}"] = torch.zeros(len(factors.b_OC)) if bias_O is None else bias_O
    tensors |= tensors_of(adapter.token_rows)
    own = {name: factors.own for name, factors in adapter.layers.items()}
    written, tensors = plugins.load("kinds", adapter.form).written(written, tensors, own)
    return written, {PREFIX + name: tensor for name, tensor in tensors.items()}


def write_pool(
    pool: Pool,
    folder: Path,
    *,
    kind: str,
    model_type: str,
    base_model: str,
    revision: str | None,
    task: str | None,
    whole: Mapping[str, nn.Module],
    token_rows: Mapping[str, TokenRows] | None = None,
    dtype: str = FULL,
) -> None:
    """Write the components of a pool as they are now, and the modules that train whole, such as a new head.

    Args:
        pool: the components, on a model.
        folder: exists.
        kind: a file of adapters/kinds/, in whose form they are saved.
        model_type: of the base's config.
        base_model: folder or hub id that PEFT may load the base from.
        revision: of the base.
        task: as in a recipe; None: of no task that PEFT knows.
        whole: modules that train whole, by name.
        token_rows: trained rows of tables.
        dtype: of the factors, which have been rounded to it.
    """
    experts = experts_of(pool)
    taken = taken_for_experts(model_type) if kind == PLAIN else frozenset()  # others stay
    config = lora_config(
        {name: layer.terms * layer.count for name, layer in pool.layers.items()},
        base_model=base_model,
        revision=revision,
        task=task,
        fan_in_fan_out=any(is_transposed(layer.base) for layer in pool.layers.values()),
        modules_to_save=list(whole) or None,
        experts=experts,
        as_parameters=ends_in(pool.layers.keys() - experts, taken),
        token_rows=token_rows,
    )
    config, tensors = saved(kind, pool, config)
    tensors |= {PREFIX + name: tensor for name, tensor in tensors_of(token_rows or {}).items()}
    for name, module in whole.items():
        # Copies: modules may share weights, which safetensors would refuse.
        tensors |= {f"{PREFIX}{name}.{key}": tensor.clone() for key, tensor in module.state_dict().items()}
    write_adapter(folder, config, tensors, dtype, schedule_of(pool))


def _save_rows(adapter: Adapter, folder: Path) -> None:
    """An adapter without layers, as PEFT's TRAINABLE_TOKENS.

    Raises:
        UsageError: its tables have rows of different tokens, for which that has no form.
    """
    rows = list(adapter.token_rows.values())
    if not rows or any(other.indices != rows[0].indices for other in rows):
        what = "rows of different tokens in its tables" if rows else "nothing left in it"
        raise UsageError(
            f"{adapter.folder} has {what} and no layers, and PEFT has no form for that", "merge it instead"
        )
    config, keys = adapter.config, ("base_model_name_or_path", "revision", "task_type")
    written = {
        **{key: config.get(key) for key in keys},
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "TRAINABLE_TOKENS",
        # As it was: a tied head has rows in the file, and PEFT fails where it is named.
        "target_modules": config.get("target_modules") or list(adapter.token_rows),
        "token_indices": list(rows[0].indices),
    }
    tables = {f"{name}.weight": f"{name}.base_layer.weight" for name in adapter.token_rows}
    tensors = {tables.get(name, name): tensor for name, tensor in adapter.whole.items()}
    tensors |= {f"{name}.trainable_tokens_delta": own.rows_TI for name, own in adapter.token_rows.items()}
    write_adapter(folder, written, {PREFIX + name: tensor for name, tensor in tensors.items()})


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str,
    revision: str | None,
    task: str | None,
    fan_in_fan_out: bool = False,
    modules_to_save: list[str] | None = None,
    experts: Collection[str] = (),
    as_parameters: Collection[str] = (),
    token_rows: Mapping[str, TokenRows] | None = None,
    bias: str = "none",
    lora_bias: bool = False,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        ranks: components per layer; layers at 0 are left out, since PEFT refuses rank 0.
        base_model: folder or hub id that PEFT may load the base from.
        revision: of the base.
        task: as in the recipe; None: of no task that PEFT knows.
        fan_in_fan_out: the targets are GPT-2's transposed Conv1D.
        modules_to_save: modules stored whole, such as a classifier head.
        experts: layers that are the slice of one expert; their parameter is listed, with the largest rank of a slice.
        as_parameters: layers that are listed by their weight; see models/peft_types.py.
        token_rows: trained rows of tables.
        bias: which biases are in the files, in PEFT's words.
        lora_bias: layers add a bias of their own.
    """
    modules, parameters = _targets(ranks, experts, as_parameters)
    alive = modules | parameters
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
        "bias": bias,
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
        "target_modules": sorted(modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **({"lora_bias": True} if lora_bias else {}),
        **({"trainable_token_indices": indices_of(token_rows)} if token_rows else {}),
        "task_type": plugins.declared("tasks", task, "TASK_TYPE") if task else None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(
    ranks: Mapping[str, int], experts: Collection[str], as_parameters: Collection[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks of the modules that are targets, and of the parameters."""
    apart = {*experts, *as_parameters}
    modules = {name: rank for name, rank in ranks.items() if rank and name not in apart}
    parameters = {f"{name}.weight": ranks[name] for name in as_parameters if ranks[name]}
    for name in experts:
        if ranks[name]:
            parameters[parameter_of(name)] = max(ranks[name], parameters.get(parameter_of(name), 0))
    return modules, parameters


def _bias_of(adapter: Adapter) -> str:
    """PEFT's word for the biases that the adapter has."""
    if not adapter.biases:
        return "none"
    own = {f"{name}.bias" for name in adapter.layers}
    return "lora_only" if own.issuperset(adapter.biases) else "all"


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: str = FULL,
    schedule: Schedule | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the bytes depend on the arguments only.

    Args:
        folder: exists.
        config: of adapter_config.json.
        tensors: by their names in the file.
        dtype: of the factors, which have only values that it has, up to `NEAR`; everything else is fp32.
        schedule: by which components are used; None: always all.

    Raises:
        MeasureError: a tensor is not finite, or comes back from the file as another one.
    """
    on_cpu = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
    for name, tensor in on_cpu.items():
        if not tensor.isfinite().all():
            hint = "lower the learning rate, or look at the adapters that went in"
            raise MeasureError(f"{name} holds NaN or infinity; nothing was written", hint)
    stored = {name: tensor.to(TORCH[dtype]) if is_factor(name) else tensor for name, tensor in on_cpu.items()}
    # Not `save_file`, which makes files that only their owner can read.
    whole = in_order(to_bytes(stored, metadata={"format": "pt"} | (schedule.as_metadata() if schedule else {})))
    if dtype != FULL:
        _check(from_bytes(whole), on_cpu, dtype)
    (folder / WEIGHTS).write_bytes(whole)
    write_json(folder / CONFIG, config)


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: str) -> None:
    """Check that a file holds what it was to hold.

    Raises:
        MeasureError: it does not.
    """
    same = {name: torch.allclose(found[name].float(), tensor, rtol=NEAR, atol=0) for name, tensor in wanted.items()}
    if other := [name for name, is_same in same.items() if not is_same]:
        raise MeasureError(f"{other[0]} does not come back from {dtype} as it went in", "please report this")
