"""A pipeline of diffusers draws what a caption says.

What it does
    The denoiser of the pipeline gets components. Pictures are made latents and captions conditions once, before the
    first step; the rest of the pipeline is let go then. Noise is mixed into the latents, and the denoiser learns to say
    the noise (epsilon), v, or the way from picture to noise (flow): as the pipeline's scheduler does. What is saved
    also loads by `pipe.load_lora_weights(FOLDER)`.

When to use it
    For a style, a thing or a person that Stable Diffusion, SDXL, Stable Diffusion 3 or a pipeline of your own in their
    form is to draw.

Reference
    Ho et al. (arXiv 2006.11239); the training scripts of diffusers for LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli.config.options import options
from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Example
from dynlora_cli.models.find import find_model
from dynlora_cli.tasks import task
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_MODEL = "DiffusionPipeline"
TASK_TYPE = None
FORMS = ("Captioned",)
TARGET = "picture"
LOSS_IN = "squared error"
SILENT = "it draws pictures"
DRAWS = True
OPTIONS = {
    "resolution": {
        "type": "int",
        "default": None,
        "at_least": 8,
        "help": "Pixels of a line of what the model is shown; null: as the pipeline draws.",
    },
    "flip": {"type": "bool", "default": False, "help": "Show pictures mirrored in half of the passes."},
    "caption": {"type": "str", "default": None, "help": "Caption of rows that have none."},
    "caption_dropout": {
        "type": "float",
        "default": 0.1,
        "at_least": 0,
        "at_most": 1,
        "help": "Share of the rows learned without their caption, for guidance when it draws.",
    },
    "snr_gamma": {
        "type": "float",
        "default": None,
        "above": 0,
        "help": "Min-SNR weighting of timesteps, usually 5; null: every timestep counts alike.",
    },
    "sample_steps": {
        "type": "int",
        "default": 30,
        "at_least": 1,
        "help": "Steps of the scheduler for pictures that are drawn while training (eval.samples).",
    },
    "guidance": {
        "type": "float",
        "default": 5.0,
        "at_least": 1,
        "help": "How far these go from what is drawn without a caption towards what is drawn with it; 1: no further.",
    },
}
CONFLICTS = [
    {"with": "model.load_in_4bit", "is": True, "why": "a denoiser is not quantized here"},
    {"with": "model.load_in_8bit", "is": True, "why": "a denoiser is not quantized here"},
]


class Task(task.Task):
    """Each picture is one target."""

    measured = frozenset({"loss", *(f"loss_band_{number}" for number in range(4))})
    why_measured = "the rows are pictures"

    def encoder(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> Encoder:
        from dynlora_cli.tasks.images.encoder import PictureEncoder
        from dynlora_cli.tasks.images.judge import DenoisingJudge
        from dynlora_cli.tasks.images.pipeline import Pipeline
        from dynlora_cli.tasks.images.studio import Studio

        denoiser, _ = find_model(self.options)
        pipeline = Pipeline(denoiser.parent, "cuda" if torch.cuda.is_available() else "cpu")
        side = self._option("resolution") or pipeline.side
        pipeline.check_side(side)
        studio = Studio(pipeline, side, self._option("caption_dropout"), mirrors=self._option("flip"))
        judge = DenoisingJudge(pipeline.noising, self._option("snr_gamma"))
        return PictureEncoder(tokenizer, train_on, max_length, studio, judge, self._option("caption"))

    def _option(self, key: str) -> Any:
        """A key of the recipe's section; its default for an adapter of another tool, which has no recipe."""
        return getattr(self.options, key, options("tasks", self.name)[key].default)

    def draw(
        self, model: PreTrainedModel, examples: Sequence[Any], step: int, folder: Path, seed: int
    ) -> list[dict[str, Any]]:
        from dynlora_cli.tasks.images.shown import draw

        steps, guidance = self._option("sample_steps"), self._option("guidance")
        return draw(model, examples, step, folder, steps=steps, guidance=guidance, seed=seed)

    def held_out(self, loss: float, accuracy: float) -> dict[str, float]:  # noqa: ARG002
        return {}

    def metrics(self, sums: RowSums, examples: Sequence[Example], classes: int) -> dict[str, Any]:  # noqa: ARG002
        return task.means_of(sums.numbers)
