"""What a denoiser draws while it trains: PNGs in the run's folder, from the same captions and noise each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.tasks.images.example import Pictured
from dynlora_cli.tasks.images.picture import write_picture
from dynlora_cli.tasks.images.sampling import drawn

FOLDER = "samples"


def draw(
    model: Any, examples: Sequence[Pictured], step: int, folder: Path, *, steps: int, guidance: float, seed: int
) -> list[dict[str, Any]]:
    """Draw a picture for the caption of each row, and write them to `folder`/samples.

    Args:
        model: the denoiser, as it is now.
        examples: of a run, whose conditions are known.
        step: optimizer steps done; part of the files' names.
        folder: of the run.
        steps, guidance, seed: as of `sampling.sample`.

    Returns:
        Of each the caption and the path of the picture from the run's folder, as the event `samples` has them.
    """
    studio = examples[0].studio
    studio.prepare()
    with studio.pipeline.in_use() as pipeline:
        given, none = studio.known([one.caption for one in examples])
        options = {"steps": steps, "guidance": guidance, "seed": seed, "side": studio.side}
        pictures = pipeline.pictures(drawn(pipeline, model, given, none, **options))  # type: ignore[arg-type]
    (folder / FOLDER).mkdir(exist_ok=True)
    found = []
    for number, (example, pixels) in enumerate(zip(examples, pictures, strict=True), 1):
        name = f"{FOLDER}/step-{step:06d}-{number}.png"
        write_picture(folder / name, pixels)
        found.append({"prompt": example.caption, "expected": "", "answer": name, "right": False, "picture": name})
    return found
