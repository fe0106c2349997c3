"""What is read from files that somebody else made: JSON, names of files, regular expressions. None of it is trusted.

read_object    a JSON file that holds an object, of bounded size and depth
fits           that object, with every key that is used of the right type
inside         the path of a file that an index names, which may not leave the folder
refuse_links   nothing in a folder leads out of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from dynlora_cli import plugins
from dynlora_cli.errors import UsageError
from dynlora_cli.files.strict_json import DEEPEST, depth
from dynlora_cli.text import show

LARGEST_JSON = 1 << 28  # bytes; the largest tokenizers and indexes have a tenth of it
LARGEST_RANK = 1 << 20
LARGEST_ALPHA = 1e9
Count = Annotated[int, Field(ge=0, lt=2**63)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _whole_number(value: Any) -> Any:
    """Refuses what only equals the number of a version: `true` is 1 to Python."""
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


VersionOne = Annotated[Literal[1], BeforeValidator(_whole_number)]  # of a format
WEIGHT_FILES = (".safetensors", ".bin")
COPY_AGAIN = "copy the files again"
_Form = TypeVar("_Form", bound=BaseModel)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: the file cannot be read, is too large or too deep, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST_JSON or not path.is_file():
            raise UsageError(f"{path} is no file of JSON, or one of more than {LARGEST_JSON >> 20} MiB", COPY_AGAIN)
        data = json.loads(text := path.read_text(encoding="utf-8"))
        if "\\ud" in text or "\\uD" in text:  # half a character can stand in JSON, and nothing can write it
            json.dumps(data, ensure_ascii=False).encode()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", COPY_AGAIN) from None
    except RecursionError:
        raise UsageError(f"{path} is damaged: its values lie too deep inside each other", COPY_AGAIN) from None
    except ValueError as error:  # not UTF-8, no JSON, a number of thousands of digits
        raise UsageError(f"{path} is damaged: {str(error).partition(';')[0]}", COPY_AGAIN) from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: it holds {type(data).__name__}, not an object with keys", COPY_AGAIN)
    if depth(data) > DEEPEST:
        raise UsageError(f"{path} is damaged: its values lie too deep inside each other", COPY_AGAIN)
    return data


def fits(form: type[_Form], data: Mapping[str, Any], path: Path) -> _Form:
    """Check an object's keys; what the form does not name is let through.

    Raises:
        UsageError: a key has another type or a number out of range; the message names the first, and what was found.
    """
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}", COPY_AGAIN) from None


def first_fault(error: ValidationError) -> str:
    """The first thing that a check has found, and where, in one line."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(shown(str(step))[1:-1] for step in fault["loc"])
    key = f"{key}: " if key else ""  # of the whole object no key is named
    return f"{key}{fault['msg'][0].lower()}{fault['msg'][1:]}; found {shown(show(fault['input']))[1:-1]}"


class PeftForm(BaseModel):
    """The keys of adapter_config.json that are used; ranks and alphas of 0 are judged where the tensors are known."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    peft_type: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    r: Annotated[int, Field(ge=0, le=LARGEST_RANK)] | None = None
    lora_alpha: Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA)] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=0, le=LARGEST_RANK)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA)]] | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    trainable_token_indices: list[Token] | dict[str, list[Token]] | None = None
    token_indices: list[Token] | None = None


class IndexForm(BaseModel):
    """The index of a model's shards."""

    model_config = ConfigDict(strict=True)
    weight_map: dict[str, str]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


class LayerForm(BaseModel):
    """One layer in dynlora.json."""

    model_config = ConfigDict(strict=True)
    rank: Annotated[int, Field(ge=0, le=LARGEST_RANK)]
    d_in: Annotated[int, Field(ge=1, lt=2**40)]
    d_out: Annotated[int, Field(ge=1, lt=2**40)]
    importance: float | None = None
    born: list[Count] | None = None


class BirthForm(BaseModel):
    """One run of an adapter's lineage."""

    model_config = ConfigDict(strict=True)
    run: str
    name: str
    date: str | None
    data_sha256: str | None
    folder: str
    old: Literal["tune", "freeze", "magnitudes"] | None
    runs_before: Count | None = None


class RetiredForm(BirthForm):
    """One update that was taken out of an adapter."""

    began_with: Count


class NumbersForm(BaseModel):
    """What a run measures, in the lines of its logs and in its summary."""

    model_config = ConfigDict(strict=True)
    loss: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    accuracy: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    threshold: float | None = None
    predicted_loss_change: float | None = None
    measured_loss_change: float | None = None
    learning_rate: float | None = None
    components: Count | None = None
    components_before: Count | None = None
    components_start: Count | None = None
    parameters: Count | None = None
    parameters_before: Count | None = None
    parameters_start: Count | None = None
    target_parameters: Count | None = None
    budget_parameters: Count | None = None
    ranks: dict[str, Count] | None = None
    removed: dict[str, int] | None = None
    tokens: Count | None = None
    seconds: Length | None = None
    step_seconds: Length | None = None
    tokens_per_second: Length | None = None
    tokens_per_second_start: Length | None = None
    tokens_per_second_end: Length | None = None
    memory_bytes: Count | None = None
    peak_memory_bytes: Count | None = None
    adapter_bytes: Count | None = None
    budget_bytes: Count | None = None
    save_dtype: str | None = None


class SampleForm(BaseModel):
    """What a model answered to a prompt while it trained."""

    model_config = ConfigDict(strict=True)
    prompt: str
    expected: str
    answer: str
    right: bool


class LineForm(NumbersForm):
    """One line of a log."""

    event: str
    step: Count
    samples: list[SampleForm] | None = None


class AlsoForm(BaseModel):
    """What a run found on rows of another kind."""

    model_config = ConfigDict(strict=True)
    rows: Count
    targets: Count
    sha256: str
    before: float
    after: float
    forgetting: float


class SummaryForm(NumbersForm):
    """The end of a run."""

    steps: Count | None = None
    also: dict[str, AlsoForm] | None = None
    forgetting: float | None = None


class BudgetForm(BaseModel):
    """The size that a run may have, and what it began with."""

    model_config = ConfigDict(strict=True)
    parameters: Count | None = None
    start_components: dict[str, Count] | None = None
    start_born: dict[str, list[Count]] | None = None


class DataForm(BaseModel):
    """What dynlora.json says of the rows."""

    model_config = ConfigDict(strict=True)
    labels: list[str] | None = None
    sha256: str | None = None
    date: str | None = None
    turned: dict[str, bool] | None = None


def _known_task(name: str) -> str:
    names = [repr(known) for known in plugins.names("tasks")]
    if repr(name) not in names:
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(names[:-1])} or {names[-1]}")
    return name


class BaseForm(BaseModel):
    """What dynlora.json says of the base."""

    model_config = ConfigDict(strict=True)
    name_or_path: str | None = None
    model_type: str | None = None
    fingerprint: dict[str, Any] | None = None


class ReadForm(BaseModel):
    """A document that an adapter was written from."""

    model_config = ConfigDict(strict=True)
    name: str
    sha256: str


class DocumentForm(ReadForm):
    """A document that an adapter was made from by training."""

    characters: Count
    chunks: Count


class AdaptedForm(BaseModel):
    """What an adapter was made from."""

    model_config = ConfigDict(strict=True)
    id: str | None = None
    asked_sha256: str | None = None
    documents: list[DocumentForm] | None = None
    questions: str | None = None
    answers: str | None = None
    teacher: str | None = None
    rows: Count | None = None
    held_out: Count | None = None
    loss_with_document: float | None = None
    chunks_added: bool | None = None


class WrittenForm(BaseModel):
    """Which hypernetwork wrote an adapter, and from what."""

    model_config = ConfigDict(strict=True)
    hypernet: str | None = None
    method: str | None = None
    description: str | None = None
    documents: list[ReadForm] | None = None


class RecordForm(BaseModel):
    """The keys of dynlora.json that commands use; `recipe` is checked as a recipe where it is needed."""

    model_config = ConfigDict(strict=True)
    run_id: str | None = None
    name: str | None = None
    task: Annotated[str, AfterValidator(_known_task)] | None = None
    started: str | None = None
    births: list[BirthForm] | None = None
    dynlora_version: str | None = None
    chat_template_sha256: str | None = None
    recipe: dict[str, Any] | None = None
    data: DataForm | None = None
    base_model: BaseForm | None = None
    layers: dict[str, LayerForm] | None = None
    seeds: dict[str, Annotated[int, Field(ge=-(2**63), lt=2**64)] | None] | None = None
    summary: SummaryForm | None = None
    budget: BudgetForm | None = None
    peak_memory_bytes: Count | None = None
    versions: dict[str, Any] | None = None
    prune: dict[str, Any] | None = None
    altered: list[str] | None = None
    retired: list[RetiredForm] | None = None
    altered_births: Count | None = None
    adapted: AdaptedForm | None = None
    written: WrittenForm | None = None


class _RowsForm(BaseModel):
    sha256: str


class _WeightsForm(BaseModel):
    fingerprint: dict[str, Any]


class ResumeForm(BaseModel):
    """The keys of dynlora.json without which a run cannot go on."""

    model_config = ConfigDict(strict=True)
    recipe: dict[str, Any]
    data: _RowsForm
    base_model: _WeightsForm
    budget: BudgetForm | None


class StateForm(BaseModel):
    """What a checkpoint says of its adapter."""

    model_config = ConfigDict(strict=True)
    born: dict[str, list[Count]] | None = None


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """The file of a folder that another file names.

    Raises:
        UsageError: the name is no plain file name below the folder.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise UsageError(f"{said_by} names the file {name!r}, which lies outside its folder; it was not opened")
    return folder / name


def refuse_links(folder: Path, *, besides: tuple[str, ...] = ()) -> None:
    """Check that what lies in a folder is in it: files of it are copied to where others may read them.

    The hub's cache is made of links to its own `blobs`; these are followed.

    Args:
        folder: looked at, and nothing below it.
        besides: endings of names that may be links to anywhere, for files of numbers alone.

    Raises:
        UsageError: a link that leaves the folder, or something that is no file, such as a device or a pipe.
    """
    home = folder.resolve()
    for path in sorted(folder.iterdir()):
        target = path.resolve() if path.is_symlink() else path
        if path.is_symlink() and not path.name.endswith(besides or ("/",)):
            blob = target.parent.name == "blobs" and "--" in target.parent.parent.name
            if home not in target.parents and not blob:
                raise UsageError(
                    f"{path} is a link out of its folder, to {target}; it was not opened",
                    "if you made it yourself, put a copy of the file there",
                )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is neither a file nor a folder", "remove it, or name another folder")


def shown(text: str) -> str:
    """A text in quotes, the end of a long one left out."""
    return repr(text if len(text) <= 60 else f"{text[:56]}...")
