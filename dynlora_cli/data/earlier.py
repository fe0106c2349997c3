"""The rows of an earlier run, read again as that run read them: by what its dynlora.json says, and checked by its hash.

A run that goes on from another replays some of them, and measures on those that were held out what it has forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dynlora_cli.config.plug_in_keys import recipe_form
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.splits import sizing_rows
from dynlora_cli.data.vocabulary import sha256_of_text, tokenizer_sha256
from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, first_fault
from dynlora_cli.runs.folder import CHECKPOINTS, RECORD, read_record, run_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Dataset
    from dynlora_cli.data.rows.fitting import TaskOfRows

BRING_BACK = "bring the rows back as they were, or do without them: leave dataset.replay out"


def earlier_data(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskOfRows,
    *,
    table: int | None = None,
    context: int | None = None,
) -> Data:
    """The rows that an earlier run trained on and held out, by its own dataset settings, for its own objective.

    The tokenizer is left as it is: a chat template of the earlier run is on it only while its rows are read.

    Args:
        folder: of the run.
        tokenizer: of the base model, which must be the earlier run's.
        task: of the earlier run, whatever its objective was.
        table: tokens that the model has rows for; None: nobody knows.
        context: the longest text that the model knows, in tokens.

    Raises:
        UsageError: it is no run of ours, it was for another task, or its rows are not what they were; the message
            names the run.
        MachineError: its rows are the hub's, and out of reach.
    """
    record = read_record(folder) if (folder / RECORD).exists() else _refuse_unrecorded(folder)
    recipe, data = _recipe_in(folder, record), record.get("data") or {}
    if recipe.model.task != task.name:
        raise UsageError(f"{folder} was trained for {recipe.model.task}, and this is {task.name}", "name another run")
    own = tokenizer.chat_template
    try:
        dataset = _with_template(recipe.dataset, tokenizer, folder, record)
        found = load_data(
            dataset,
            tokenizer,
            task=task.like(recipe.train),
            seed=recipe.seed,
            max_length=context,
            sizing=sizing_rows(recipe),
            writing=Writing.of(record),
            table=table,
        )
        if found.sha256 != data.get("sha256"):
            raise UsageError(_difference(tokenizer, record), BRING_BACK)
    except DynloraError as error:
        text = f"the rows of the run in {folder} cannot be used again: {error.message}"
        if isinstance(error, MachineError):
            raise MachineError(text, error.hint) from error
        raise UsageError(text, BRING_BACK) from error
    finally:
        tokenizer.chat_template = own
    return found


def lineage(folder: Path, missing: dict[str, str] | None = None) -> list[Path]:
    """Folders of a run and of the runs that it came from, oldest first; adapters of other tools have none.

    Args:
        folder: of the run.
        missing: told, by the name of a run that it came from, why that one is left out; None: it may not be.

    Raises:
        UsageError: one of them is no longer there, or another run is.
    """
    record = read_record(folder) if (folder / RECORD).exists() else _refuse_unrecorded(folder)
    births = record.get("births")
    before = births[:-1] if isinstance(births, list) else []
    found = []
    for birth in before:
        if isinstance(birth, dict) and birth.get("data_sha256"):
            try:
                found.append(_found(birth, folder))
            except UsageError as error:
                if missing is None:
                    raise
                missing[str(birth.get("name"))] = error.message
    return [*found, folder]


def run_folder(path: Path) -> Path:
    """The folder of the run that a path names, which may also be that of one of its checkpoints."""
    return run_of(path) if path.resolve().parent.name == CHECKPOINTS else path


def _found(birth: Mapping[str, Any], child: Path) -> Path:
    """Where a run is that another one came from: where it was, or beside it, if they were moved together."""
    named = Path(str(birth.get("folder")))
    for place in (named, child.parent / named.name):
        if (place / RECORD).is_file():
            data = read_record(place).get("data") or {}
            if data.get("sha256") == birth["data_sha256"]:
                return place
    here = "another run is there now" if (named / RECORD).is_file() else "it is not there"
    raise UsageError(f"{child} came from the run in {named}, and {here}", f"put it back there; or {BRING_BACK}")


def _refuse_unrecorded(folder: Path) -> dict[str, Any]:
    """Say why a folder has no rows that can be read again.

    Raises:
        UsageError: always.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "name the folder of a run")
    if (folder / "adapter_config.json").is_file():
        raise _unknown_rows(folder, "it was made by another tool")
    raise UsageError(f"{folder} holds no run ({RECORD} is missing)", "name the folder of a run")


def _unknown_rows(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"nobody knows the rows that the adapter in {folder} was trained on: {why}",
        "leave dataset.replay out, or name its rows under dataset.train, with a small `weight`",
    )


def _recipe_in(folder: Path, record: Mapping[str, Any]) -> Recipe:
    """The recipe that a run was made by."""
    recorded = record.get("recipe")
    if not recorded:
        raise _unknown_rows(folder, f"its {RECORD} holds no recipe")
    try:
        return recipe_form(recorded).model_validate(recorded)
    except ValidationError as error:
        text = f"{folder}: the recipe in {RECORD} is damaged: {first_fault(error)}"
        raise UsageError(text, COPY_AGAIN) from None


def _with_template(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, record: Mapping[str, Any]
) -> Dataset:
    """The settings to read by, once the tokenizer has the chat template that the run began with.

    The run keeps its template. The one on the tokenizer may be of a recipe that came later, and the file that a recipe
    names may have changed.
    """
    wanted, kept = record.get("chat_template_sha256"), folder / "chat_template.jinja"
    if "chat_template_sha256" in record and wanted is None:
        tokenizer.chat_template = None
    elif wanted and kept.is_file():
        template = kept.read_text(encoding="utf-8", errors="replace")
        if sha256_of_text(template) == wanted:
            tokenizer.chat_template = template
            return dataset.model_copy(update={"chat_template": None})
    return dataset


def _difference(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> str:
    """What is not as it was, in words."""
    before = record.get("tokenizer_sha256")
    if before and before != tokenizer_sha256(tokenizer):
        return "the tokenizer is another one than the run's"
    wanted, template = record.get("chat_template_sha256"), tokenizer.chat_template
    if wanted != (sha256_of_text(str(template)) if template else None):
        return "the chat template is another one than the run's"
    return "the rows, or how they are read, have changed since then"
