"""`dynlora train`: from a recipe to an adapter. `run` is the table of contents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynlora_cli import plugins
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import load_base
from dynlora_cli.models.quiet import quiet
from dynlora_cli.runs.events import Emit
from dynlora_cli.runs.folder import RECIPE
from dynlora_cli.training.before.prepare import prepare
from dynlora_cli.training.components import begin
from dynlora_cli.training.loop import fit
from dynlora_cli.training.session import NOTHING, Finished, Given, Session
from dynlora_cli.training.setup import make_run, read_also, read_base, read_data

if TYPE_CHECKING:
    from dynlora_cli.lora.variant import Variant
    from dynlora_cli.training.lanes.turns import Lane


@quiet
def run(
    recipe: Recipe,
    *,
    listener: Emit | None = None,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: Path | None = None,
    recipe_text: str | None = None,
    given: Given = NOTHING,
    load: Callable[..., Data] = load_data,
    lane: Lane | None = None,
) -> dict[str, Any]:
    """Train as the recipe says and leave a complete run folder.

    Args:
        recipe: checked already.
        listener: takes every event of the run, see runs/events.py.
        overwrite: replace an earlier run in the output folder.
        resume: go on with the newest valid checkpoint of the output folder.
        resume_from: go on with this checkpoint folder.
        recipe_text: of a recipe file that the run folder is to hold, since there is none elsewhere.
        given: what else it is to hold.
        load: reads the rows, as `load_data` does.
        lane: the run's place among others on one base; None: it trains alone.

    Returns:
        The summary, as data.

    Raises:
        DynloraError: with the exit code that fits.
    """
    with Session.open(recipe, listener, overwrite=overwrite, resume=resume, resume_from=resume_from) as session:
        if isinstance(session, Finished):
            return session.summary
        texts = {RECIPE: recipe_text} if recipe_text else {}
        session.given = Given({**texts, **given.texts}, given.adapted)
        modes, files = session.modes, BaseFiles.find(recipe.model)
        data = read_data(recipe, files, session.writing, session.before, load, session.tell)
        session.refuse_other_inputs(data, files)
        also = read_also(recipe, files, data)
        load_weights = lane.load_base if lane else load_base
        base = read_base(recipe, files, data, session.accelerator.device, modes, load_weights)
        variant = cast("Variant", plugins.load("variants", recipe.adapter.variant))
        trained, start = begin(recipe, variant, base, data, session.accelerator, session.begun)
        modes.apply(base.model, trained)
        training = make_run(
            recipe, session.accelerator, base, data, trained, start, modes, save=session.save, also=also
        )
        if lane:
            lane.join(training)
        with session.recording(training):
            prepare(training)
            fit(training)
            for text in modes.report():
                training.note(text)
            return session.finish(training)
