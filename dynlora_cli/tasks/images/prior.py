"""Prior preservation: what a pipeline draws of a class before it learns is learned beside the rows, so that it stays.

Ruiz et al., DreamBooth, arXiv 2208.12242. The pictures lie in the run's folder as PNGs, and the rows take them from
there: a run that goes on sees the same ones, and draws none.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.place import refuse_full_disk
from dynlora_cli.files.whole import sync_all, write_json
from dynlora_cli.runs.folder import PRIOR
from dynlora_cli.tasks.images.example import Pictured, Prior
from dynlora_cli.tasks.images.picture import Picture, write_picture
from dynlora_cli.tasks.images.sampling import drawn
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.tasks.images.studio import Studio
    from dynlora_cli.tasks.task import Beginning

LIST = "prior.json"  # the last file that is written: how the pictures were drawn, and their hashes
PASSES = 2.5  # forward passes that a picture costs which is learned, by its gradient


@dataclass(frozen=True)
class Prospect:
    """What is to be drawn.

    Args:
        caption: of all pictures.
        count: of the pictures.
        weight: of one in the loss, beside that of a row.
        steps, guidance: as of `sampling.drawn`.
    """

    caption: str
    count: int
    weight: float
    steps: int
    guidance: float

    def on_record(self) -> dict[str, Any]:
        """As dynlora.json has it."""
        return {"caption": self.caption, "pictures": self.count, "weight": self.weight}

    def notes(self, rows: int) -> list[str]:
        """What a person should know before it begins; `rows` are those of an optimizer step."""
        passes = self.count * self.steps * (1 if self.guidance == 1 else 2)
        as_steps = max(1, round(passes / (PASSES * 2 * rows)))
        return [
            f"prior: {counted(self.count, 'picture')} of {self.caption!r}, {counted(self.steps, 'step')} each, drawn "
            f"before the first step into {PRIOR}/: about as long as {counted(as_steps, 'step')} of training",
            f"prior: one of them is learned beside each row, weight {self.weight:g}: a step takes twice the time, and "
            "a micro-batch the memory of twice its rows",
        ]


def prepare(prospect: Prospect, given: Beginning) -> Iterator[tuple[str, int, int]]:
    """Draw the pictures, or find those of a run that goes on, and let the rows have them as their prior.

    Yields:
        What is made, how much of it is there, and of how many: between batches, in all processes as often.

    Raises:
        UsageError: the caption is too long; or a run goes on, and a picture is not what it was.
        DataError: it is gone, or cannot be read.
        MachineError: the disk has no room.
    """
    studio: Studio = given.examples[0].studio
    home, ids = given.folder / PRIOR, given.tokenizer(prospect.caption)["input_ids"]
    if len(ids) > (most := given.tokenizer.model_max_length):
        raise UsageError(
            f"model.prior_caption: {len(ids)} tokens, and the pipeline reads {most}", "write a shorter one"
        )
    if not (home / LIST).is_file():
        if given.goes_on:
            raise _lost(home / LIST, "is gone")
        yield from _draw(prospect, given, studio, home)
    pictures = _pictures(home)
    prior = Prior(prospect.caption, array("i", ids), pictures)
    studio.expect([(prospect.caption, picture) for picture in pictures])
    for example in given.examples:
        assert isinstance(example, Pictured)
        example.prior = prior


def _draw(prospect: Prospect, given: Beginning, studio: Studio, home: Path) -> Iterator[tuple[str, int, int]]:
    what, (process, processes) = "prior pictures drawn", given.part
    yield what, 0, prospect.count  # the folder of the run is there for everybody
    refuse_full_disk(given.folder, 3 * studio.side**2 * prospect.count, "what the pipeline draws", "--output-dir")
    home.mkdir(exist_ok=True)
    options = {"steps": prospect.steps, "guidance": prospect.guidance, "seed": given.seed, "side": studio.side}
    with studio.pipeline.in_use() as pipeline:
        given_B, none = pipeline.conditions([prospect.caption])
    with studio.pipeline.in_use() as pipeline:  # its text encoders are gone
        for at in range(0, prospect.count, given.rows * processes):
            first = at + given.rows * process
            count = min(given.rows, prospect.count - first)
            if count > 0:
                rows = {name: row.expand(count, *row.shape[1:]) for name, row in given_B.items()}
                latents = drawn(pipeline, given.model, rows, none, first=first, **options)  # type: ignore[arg-type]
                for place, pixels in enumerate(pipeline.pictures(latents), first):
                    write_picture(home / f"{place:06d}.png", pixels)
            yield what, min(prospect.count, at + given.rows * processes), prospect.count
    if process == 0:
        files = [home / f"{place:06d}.png" for place in range(prospect.count)]
        hashes = {file.name: Picture.find(file.name, home, file.name).digest.hex() for file in files}
        sync_all(home)
        write_json(home / LIST, {**options, "caption": prospect.caption, "pictures": hashes})
    yield what, prospect.count, prospect.count  # the list is there for everybody


def _pictures(home: Path) -> list[Picture]:
    """Those of the list, each as it was drawn."""
    listed = read_object(home / LIST).get("pictures")
    if not isinstance(listed, dict) or not listed:
        raise _lost(home / LIST, "is damaged")
    found = [Picture.find(name, home, f"{PRIOR}/{LIST}") for name in listed]
    for picture, (name, digest) in zip(found, listed.items(), strict=True):
        if picture.digest.hex() != digest:
            raise _lost(home / name, "is not as the pipeline drew it")
    return found


def _lost(file: Path, how: str) -> UsageError:
    return UsageError(f"{file} {how}, and the run began with it", "bring it back, or start anew with --overwrite")
