"""The denoiser of a pipeline: a model that the rest takes for one of transformers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.models.alone import making_a_model

PROBE_TOKENS = 4


class Settings(FrozenDict):
    """A denoiser's config, with what is asked of one of transformers."""

    is_encoder_decoder = False
    num_labels = 0

    @property
    def model_type(self) -> str:
        """What its pipeline calls it, unet or transformer; transformers knows no such type."""
        return "unet" if str(self["_class_name"]).startswith("UNet") else "transformer"

    def get_text_config(self, decoder: bool = False) -> Settings:  # noqa: ARG002
        """The config itself: no part of the model is a language model."""
        return self


class Denoises:
    """What is asked of a model beside what diffusers' own classes have.

    Attributes:
        usual_targets: in the name of a layer that gets components where a recipe does not say which: those of attention
            and feed-forward; embeddings of time and caption, and layers between blocks, do not.
        noise_timestep: the timestep at which all is noise, as it is told.
    """

    noise_timestep: float
    usual_targets = (".attn", ".ff.", ".ff_context.")

    def get_input_embeddings(self) -> nn.Module | None:
        """None: it reads no tokens."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """None: it writes no tokens."""
        return None

    @torch.no_grad()
    def probe(self) -> Tensor:
        """What it says of two mixtures that are always the same, fp32 on the CPU, [2, numbers]."""
        model: Any = self
        config, chance = model.config, torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=chance).to(model.device, model.dtype)

        t_B = torch.tensor([100, 700], device=model.device)
        more: dict[str, Any] = {"return_dict": False, "timestep": t_B}
        if "joint_attention_dim" in config:  # Stable Diffusion 3
            x, states = drawn(config.in_channels, 8, 8), drawn(PROBE_TOKENS, config.joint_attention_dim)
            more |= {"hidden_states": x, "pooled_projections": drawn(config.pooled_projection_dim)}
        else:
            side = 4 * 2 ** (len(config.block_out_channels) - 1)
            states = drawn(PROBE_TOKENS, config.cross_attention_dim)
            more["sample"] = drawn(config.in_channels, side, side)
            if config.get("addition_embed_type") == "text_time":  # SDXL
                pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                more["added_cond_kwargs"] = {"text_embeds": drawn(pooled), "time_ids": 100 * drawn(6).abs()}
        found: Tensor = model(encoder_hidden_states=states, **more)[0]
        return found.float().cpu().flatten(1)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """As of transformers."""
        cast("Any", self).enable_gradient_checkpointing(partial(checkpoint, **gradient_checkpointing_kwargs))


def load_denoiser(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The denoiser in a folder, with its weights.

    Raises:
        UsageError: it does not load, or its files lack weights.
    """
    kind = _class_in(folder)
    try:
        with making_a_model():
            model, info = kind.from_pretrained(
                str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the library makes of somebody else's files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the model in {folder} does not load: {reason}", "copy the files again") from None
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"the weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]}",
            "the files are incomplete or of another architecture",
        )
    return cast("PreTrainedModel", _settled(model, folder).to(device))


def denoiser_structure(folder: Path, device: str | None = "meta") -> PreTrainedModel:
    """The same without weights; `device` None: wherever the caller says.

    Raises:
        UsageError: its config makes no model.
    """
    kind = _class_in(folder)
    config = {key: value for key, value in read_object(folder / "config.json").items() if key != "_name_or_path"}
    try:
        with making_a_model(), torch.device(device) if device else nullcontext():
            model = kind.from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library makes of somebody else's numbers
        raise UsageError(f"{folder / 'config.json'} makes no model: {error}") from None
    return cast("PreTrainedModel", _settled(model, folder))


def _settled(model: Any, folder: Path) -> Any:
    model._internal_dict = Settings(model._internal_dict)
    model.noise_timestep = _noise_timestep(folder.parent / "scheduler")
    return model


def _noise_timestep(scheduler: Path) -> float:
    """The number of timesteps of a pipeline's scheduler; diffusers' own default where its files do not say."""
    file = scheduler / "scheduler_config.json"
    found = read_object(file).get("num_train_timesteps") if file.is_file() else None
    return float(found) if isinstance(found, (int, float)) and found > 0 else 1000.0


def _class_in(folder: Path) -> Any:
    """The class that a denoiser's config names.

    Raises:
        UsageError: it is no model of diffusers.
    """
    import diffusers

    name = read_object(folder / "config.json").get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise UsageError(f"{folder / 'config.json'} names the class {name!r}, which is no model of diffusers")
    return _denoising(kind)


@cache
def _denoising(kind: type) -> type:
    return type(kind.__name__, (Denoises, kind), {"__module__": kind.__module__})
