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
from dynlora_cli.errors import UsageError
from dynlora_cli.models.find import find_model
from dynlora_cli.tasks import task
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.tasks.images.prior import Prospect

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
    "prior_caption": {
        "type": "str",
        "default": None,
        "help": "Prior preservation: a class, such as `a photo of a dog`. The pipeline draws it before it learns, and "
        "a picture of these is learned beside each row, so that the class stays what it was; null: none.",
    },
    "prior_pictures": {"type": "int", "default": 100, "at_least": 1, "help": "How many it draws of prior_caption."},
    "prior_weight": {
        "type": "float",
        "default": 1.0,
        "above": 0,
        "help": "How much one of them counts in the loss; a row counts 1.",
    },
    "sample_steps": {
        "type": "int",
        "default": 30,
        "at_least": 1,
        "help": "Steps of the scheduler for pictures that are drawn: eval.samples, and those of prior_caption.",
    },
    "guidance": {
        "type": "float",
        "default": 5.0,
        "at_least": 1,
        "help": "How far these go from what is drawn without a caption towards what is drawn with it; 1: no further.",
    },
}
CONFLICTS = [
    {
        "with": "dataset.streaming",
        "why": "pictures are encoded before the first step",
        "hint": "read them whole, with `streaming: false`",
    },
    {"with": "model.load_in_4bit", "is": True, "why": "a denoiser is not quantized here"},
    {"with": "model.load_in_8bit", "is": True, "why": "a denoiser is not quantized here"},
    {"with": "model.prior_caption", "is": "", "why": "it is empty", "hint": "write the class, or leave it out"},
    {
        "with": "model.prior_pictures",
        "is_not": 100,
        "while": {"model.prior_caption": None},
        "why": "nothing is drawn without model.prior_caption",
        "hint": "write the class there, or leave this out",
    },
    {
        "with": "model.prior_weight",
        "is_not": 1.0,
        "while": {"model.prior_caption": None},
        "why": "there is no prior without model.prior_caption",
        "hint": "write the class there, or leave this out",
    },
    {
        "with": "model.prior_caption",
        "while": {"pruning.policy": "retrieval"},
        "why": "policy retrieval looks at single rows, and a prior is learned beside them",
        "hint": "choose policy fisher, or leave this out",
    },
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
        if self._option("snr_gamma") is not None and pipeline.noising.says == "flow":
            raise UsageError(
                "model.snr_gamma weighs timesteps of pipelines that learn noise or v, and this one learns the flow",
                "leave it out",
            )
        studio = Studio(pipeline, side, self._option("caption_dropout"), mirrors=self._option("flip"))
        judge = DenoisingJudge(pipeline.noising, self._option("snr_gamma"), self._option("prior_weight"))
        return PictureEncoder(tokenizer, train_on, max_length, studio, judge, self._option("caption"))

    def _option(self, key: str) -> Any:
        """A key of the recipe's section; its default for an adapter of another tool, which has no recipe."""
        return getattr(self.options, key, options("tasks", self.name)[key].default)

    def _prospect(self) -> Prospect | None:
        from dynlora_cli.tasks.images.prior import Prospect

        keys = ("prior_caption", "prior_pictures", "prior_weight", "sample_steps", "guidance")
        return Prospect(*map(self._option, keys)) if self._option("prior_caption") else None

    def prior(self, rows: int) -> tuple[dict[str, Any] | None, list[str]]:
        prospect = self._prospect()
        return (prospect.on_record(), prospect.notes(rows)) if prospect else (None, [])

    def prepare(self, given: task.Beginning) -> Iterator[tuple[str, int, int]]:
        from dynlora_cli.tasks.images.prior import prepare

        if prospect := self._prospect():
            yield from prepare(prospect, given)

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
