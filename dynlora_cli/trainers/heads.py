"""What a model in memory is for, and which of its modules train whole beside the components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from dynlora_cli.errors import UsageError
from dynlora_cli.models.load import trains_whole
from dynlora_cli.models.targets import inside

# Output layers of classifiers and of extractive answers, as transformers and PEFT call them.
HEADS = ("classifier", "score", "qa_outputs")
# By the end of a model's class name, its task in a recipe.
TASKS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "sequence-classification",
}


def task_of(model: PreTrainedModel) -> str | None:
    """A model's task as in a recipe; None for one that recipes do not know."""
    name = type(model).__name__
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def sharing(model: PreTrainedModel, whole: Sequence[str]) -> tuple[str, ...]:
    """Other modules that hold weights of these, such as a head that is tied to its table.

    They are saved as well. PEFT loads a module of its own for each name, and leaves the others with the base's weights.
    """
    ids = {id(parameter) for name in whole for parameter in model.get_submodule(name).parameters()}
    return tuple(
        name
        for name, module in model.named_modules()
        if not inside(name, whole) and ids.intersection(map(id, module.parameters(recurse=False)))
    )


def whole_modules(model: PreTrainedModel, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """The modules that train whole.

    Raises:
        UsageError: the model has no module of a name, or it shares its weights with another one.
    """
    names = dict(model.named_modules())
    if wanted is None:
        heads = [name for name in names if name.endswith(HEADS)]
        heads = [name for name in heads if not inside(name, [other for other in heads if other != name])]
        folder = _checkpoint_of(model) if heads else None
        return tuple(dict.fromkeys([*heads, *(trains_whole(model, folder) if folder else ())]))
    found: dict[str, None] = {}
    own = [name for name, _ in model.named_parameters()]  # of weights that are shared, the first name
    for each in [wanted] if isinstance(wanted, str) else wanted:
        matching = [name for name in names if name and (name == each or name.endswith(f".{each}"))]
        if not matching:
            raise UsageError(f"attach: modules_to_save: the model has no module {each!r}", "see model.named_modules()")
        for name in matching:
            if not any(inside(parameter, [name]) for parameter in own):
                raise UsageError(
                    f"attach: modules_to_save: {name} has no weights of its own; it shares those of another module",
                    "leave it out",
                )
        found |= dict.fromkeys(matching)
    return tuple(found)


def _checkpoint_of(model: PreTrainedModel) -> Path | None:
    """The local folder that a model was loaded from, if it is there and holds safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = getattr(model.config, "_name_or_path", "") or ""
    folder = Path(name)
    if name and not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    return folder if name and any(folder.glob("*.safetensors")) else None
