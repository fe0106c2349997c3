"""library.json as data. It is checked when it is read: a library may have been made by somebody else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dynlora_cli.files import names
from dynlora_cli.files.foreign import Count, VersionOne
from dynlora_cli.files.names import A_NAME

SCHEMA_VERSION = 1
RESERVED = {"auto", "base", "library", "unrelated"}  # words of reports, and of who answers
LARGEST_DIMENSION = 1 << 16
MOST_ENTRIES = 4096
LONGEST_TAG = 64


def is_name(name: str) -> bool:
    """Whether an update may be called so: it becomes the name of a folder, and stands in reports."""
    return names.is_name(name) and name.lower() not in RESERVED


def _name(name: str) -> str:
    if not is_name(name):
        raise PydanticCustomError("name", f"Input should be a name: {A_NAME}")
    return name


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise PydanticCustomError("file_name", "Input should be the name of a file, not a path")
    return name


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_name)]
FileName = Annotated[str, AfterValidator(_file_name), Field(max_length=255)]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Tag = Annotated[str, Field(min_length=1, max_length=LONGEST_TAG)]


class Form(BaseModel):
    """Strict, since what is not known could not be written back."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class BaseOf(Form):
    """The one base model of a library.

    `fingerprint` has `sha256` and `sampled_sha256`, as models/fingerprint.py makes them.
    """

    name: str
    model_type: str
    fingerprint: dict[Literal["sha256", "sampled_sha256"], Sha256]


class EncoderOf(Form):
    """What made the keys: a name as of `--encoder`, the length of its vectors, and which weights it had."""

    name: str
    dimension: Annotated[int, Field(ge=1, le=LARGEST_DIMENSION)]
    fingerprint: Sha256


class Origin(Form):
    """Where keys come from: a file of rows or a document; no hash where it is no local file."""

    kind: Literal["rows", "documents"]
    path: str
    sha256: Sha256 | None


class Card(Form):
    """What the run measured on its held-out rows, in nats per target, before training and after."""

    rows: Count | None = None
    loss_before: Annotated[float, Field(allow_inf_nan=False)] | None = None
    loss_after: Annotated[float, Field(allow_inf_nan=False)] | None = None
    parameters: Count | None = None


class Part(Form):
    """A file of one entry with so many lines or vectors in it."""

    count: Count
    sha256: Sha256


class EntryForm(Form):
    """One update, as library.json has it; see library.py for what the fields mean."""

    name: Name
    date: Day
    tags: Annotated[list[Tag], Field(max_length=64)]
    sha256: Sha256
    data_sha256: str | None
    trained: str | None
    sources: list[Origin]
    card: Card
    files: Annotated[dict[FileName, Sha256], Field(max_length=64)]
    vectors: Part
    texts: Part
    held_out: Part


class LibraryForm(Form):
    """The whole file."""

    schema_version: VersionOne
    base: BaseOf | None
    encoder: EncoderOf | None
    entries: Annotated[list[EntryForm], Field(max_length=MOST_ENTRIES)]
    calibration: dict[str, Any] | None
