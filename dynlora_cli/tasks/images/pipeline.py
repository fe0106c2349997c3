"""A pipeline without its denoiser: what makes latents of pictures, pictures of latents, and conditions of captions.

Its parts are loaded when they are asked for, and let go when nobody asks any more. Captions are encoded by the
pipeline's own code in diffusers, so a model is trained with exactly what it will be given when it draws.

A pipeline may lack a VAE: its latents then are the pixels, from -1 to 1.

Dimensions: B rows, C channels, H lines and W columns of latents; of pixels R lines of R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.models.alone import making_a_model
from dynlora_cli.models.pipelines.denoiser import denoiser_structure
from dynlora_cli.models.pipelines.find import DENOISERS, INDEX, read_index
from dynlora_cli.tasks.images.noising import Noising

Conditions = dict[str, Tensor]  # by the name of the denoiser's argument, a row each
XL, THREE = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
AT_ONCE = 16  # captions, or pictures of 256 pixels a line


class Pipeline:
    """A pipeline on disk.

    Args:
        folder: as diffusers saves it.
        device: where its parts compute.
        dtype: of its text encoders; a VAE computes in fp32, as some give NaN in fewer bits.

    Attributes:
        kind: the class that its files name.

    Raises:
        UsageError: it is none that is trained.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.index = read_index(folder)
        self.kind: str = self.index["_class_name"]
        self._parts: dict[str, Any] = {}

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The config of its denoiser."""
        return read_object(self.folder / DENOISERS[self.kind] / "config.json")

    @cached_property
    def noising(self) -> Noising:
        """How it mixes pictures with noise."""
        file = self.folder / "scheduler" / "scheduler_config.json"
        return Noising.of(read_object(file), str(file))

    @property
    def has_vae(self) -> bool:
        """Whether it draws in the latents of a VAE, and not in pixels."""
        return self._names("vae")

    @cached_property
    def scale(self) -> int:
        """Pixels of a line for each latent of a line."""
        if not self.has_vae:
            return 1
        blocks = read_object(self.folder / "vae" / "config.json").get("block_out_channels")
        return int(2 ** (len(blocks) - 1)) if isinstance(blocks, list) and blocks else 8

    @cached_property
    def side(self) -> int:
        """Pixels of a line of what it draws, by its config.

        Raises:
            UsageError: that does not say.
        """
        latents = self.denoiser_config.get("sample_size")
        latents = latents[0] if isinstance(latents, list) and latents else latents
        if type(latents) is not int or latents < 1:
            raise UsageError(f"{self.folder}: its denoiser does not say what it draws", "set model.resolution")
        return latents * self.scale

    def shape(self, side: int) -> tuple[int, int, int]:
        """Of the latents of a picture with so many pixels a line, [C, H, W]."""
        return int(self.denoiser_config["in_channels"]), side // self.scale, side // self.scale

    def check_side(self, side: int) -> None:
        """Refuse a number of pixels that the parts cannot halve as often as they do.

        Raises:
            UsageError: it is such a number.
        """
        config = self.denoiser_config
        blocks, patch = config.get("block_out_channels"), config.get("patch_size")
        fold = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else patch if type(patch) is int else 1
        if side % (self.scale * fold):
            raise UsageError(
                f"model.resolution: {side} is no multiple of {self.scale * fold}, as the layers of {self.folder} need",
                f"write {max(1, round(side / (self.scale * fold))) * self.scale * fold}",
            )

    # -- parts ---------------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Free the memory of all parts."""
        self._parts.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def in_use(self) -> Iterator[Pipeline]:
        """Its parts are let go at the end."""
        try:
            yield self
        finally:
            self.let_go()

    def _names(self, part: str) -> bool:
        return isinstance(self.index.get(part), list) and bool(self.index[part]) and self.index[part][0] is not None

    def part(self, name: str) -> Any:
        """A part, loaded when it is first asked for; None where the pipeline has none.

        Raises:
            UsageError: it does not load.
        """
        if name not in self._parts:
            self._parts[name] = self._load(name) if self._names(name) else None
        return self._parts[name]

    def _load(self, name: str) -> Any:
        import diffusers

        library, kind_name = self.index[name]
        modules = {"diffusers": diffusers, "transformers": transformers}
        kind: Any = getattr(modules[library], str(kind_name), None)
        folder, more = self.folder / name, {}
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            dtype = torch.float32 if name == "vae" else self.dtype
            more = {"use_safetensors": True, "torch_dtype" if library == "diffusers" else "dtype": dtype}
        if not hasattr(kind, "from_pretrained") or not folder.is_dir():
            raise UsageError(f"{self.folder / INDEX} names {name} as {library}'s {kind_name}, which is not there")
        try:
            with making_a_model():
                part = kind.from_pretrained(str(folder), local_files_only=True, **more)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the library makes of somebody else's files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{folder} does not load as a {kind_name}: {reason}", "copy the files again") from None
        return part.to(self.device).eval().requires_grad_(False) if isinstance(part, torch.nn.Module) else part

    # -- pictures ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pictures_BRR3: NDArray[np.uint8]) -> Tensor:
        """Of pictures, fp32 on the CPU, [B, C, H, W]; a VAE's mean, without the little noise that it would add."""
        pixels = torch.from_numpy(pictures_BRR3).permute(0, 3, 1, 2).float() / 127.5 - 1
        if not self.has_vae:
            return pixels.contiguous()
        vae = self.part("vae")
        few = max(1, AT_ONCE * 256 * 256 // (pixels.shape[2] * pixels.shape[3]))
        found = [vae.encode(part.to(self.device)).latent_dist.mean.float().cpu() for part in pixels.split(few)]
        return (torch.cat(found) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def pictures(self, latents_BCHW: Tensor) -> NDArray[np.uint8]:
        """Of latents, [B, R, R, 3]."""
        pixels = latents_BCHW.float()
        if self.has_vae:
            vae = self.part("vae")
            plain = pixels / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
            pixels = torch.cat([vae.decode(part.to(self.device)).sample for part in plain.split(1)])
        levels = (pixels.clamp(-1, 1) + 1) * 127.5
        found: NDArray[np.uint8] = levels.round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return found

    # -- captions ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def conditions(self, captions: Sequence[str]) -> tuple[Conditions, Conditions]:
        """What the denoiser is given for captions, a row each, and for none, one row; on the CPU."""
        front, found, none = self._front(), list[Conditions](), Conditions()
        for at in range(0, len(captions), AT_ONCE):
            given, empty = self._encoded(front, list(captions[at : at + AT_ONCE]))
            found.append({name: rows.cpu() for name, rows in given.items()})
            none = {name: rows[:1].cpu() for name, rows in empty.items()}
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}, none

    def _front(self) -> Any:
        """Diffusers' own pipeline around the text encoders; without the scheduler, whose config it would change."""
        import diffusers

        names = ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"]
        count = {XL: 4, THREE: 6}.get(self.kind, 2)
        parts = {name: self.part(name) for name in names[:count]}
        more: dict[str, Any] = {}
        if self.kind == XL:
            more = {"force_zeros_for_empty_prompt": bool(self.index.get("force_zeros_for_empty_prompt", True))}
        elif self.kind == THREE:  # without a T5, its config says how wide the zeros are in place of its states
            more = {"transformer": denoiser_structure(self.folder / DENOISERS[self.kind])}
        else:
            more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        more.setdefault(DENOISERS[self.kind], None)
        return getattr(diffusers, self.kind)(**parts, vae=None, scheduler=None, **more)

    def _encoded(self, front: Any, captions: list[str]) -> tuple[Conditions, Conditions]:
        if self.kind == "StableDiffusionPipeline":
            states, empty = front.encode_prompt(captions, self.device, 1, True)
            return {"encoder_hidden_states": states}, {"encoder_hidden_states": empty}
        more = {"prompt_3": None} if self.kind == THREE else {}
        found = front.encode_prompt(
            prompt=captions, prompt_2=None, device=self.device, do_classifier_free_guidance=True, **more
        )
        pooled = "text_embeds" if self.kind == XL else "pooled_projections"
        states, empty, pooled_B, pooled_none = found
        return (
            {"encoder_hidden_states": states, pooled: pooled_B},
            {"encoder_hidden_states": empty, pooled: pooled_none},
        )


def denoised(model: Any, x: Tensor, t_B: Tensor, given: Conditions) -> Tensor:
    """What a denoiser says of mixtures, as large as they are. [B, C, H, W]

    Args:
        model: of a pipeline, with or without components.
        x: the mixtures.
        t_B: timesteps, as `Noising.told` gives them; the model gets them by the name `timestep`.
        given: conditions, a row for each of x.
    """
    states = {"encoder_hidden_states": given["encoder_hidden_states"].to(x.dtype), "return_dict": False}
    if "pooled_projections" in given:
        states["pooled_projections"] = given["pooled_projections"].to(x.dtype)
        return model(hidden_states=x, timestep=t_B, **states)[0]
    if "text_embeds" in given:
        states["added_cond_kwargs"] = {name: given[name].to(x.dtype) for name in ("text_embeds", "time_ids")}
    return model(sample=x, timestep=t_B, **states)[0]
