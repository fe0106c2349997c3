"""What an exporter is: a file in export/targets/ with these names; `dynlora export --to` takes its file's name.

    needs_base: bool
        Whether it needs the base model. Exporters that do not also work where the base is not on this machine.

    for_peft = True
        Optional: the files are for PEFT. Where PEFT is installed, it is asked whether it finds every layer in them.

    write(job, folder) -> dict
        Put the files into an empty folder. What it returns goes into export.json.

    read_back(job, folder) -> Adapter | Read | Path
        Read these files as the consumer does, or by the consumer's rules: an adapter, the model's parameters by their
        names in the base, or the folder of a whole model. The command computes logits with it and compares them with
        those of the source.

    MAX_KL = 0.5, ROUNDING = 0.25
        Optional: nats per token by which it may differ where nobody says otherwise, and by how much it rounds.

    OUTTYPE = True
        Optional: it writes a GGUF model, and `--outtype` says in which number format.

    DTYPES = ("bf16", "fp8")
        Optional: formats besides float32 in which its reader takes the factors; `--dtype` names one (`job.dtype`).

    OF_LIBRARY = True, write_library(shelf, folder) -> dict
        Optional: it takes a whole library. `write` and `read_back` are called for each adapter, in a folder
        `adapters/NAME` of its own, then `write_library` once, for what stands beside them.

    of_pipelines = True, prepared(adapter, options) -> Adapter
        Optional: it takes adapters of diffusion pipelines. `prepared` gives the adapter as its file names it, or
        refuses it; it is asked before numbers are rounded.

    OPTIONS
        Optional: what `--set KEY=VALUE` may be, see config/options.py. They come as attributes of `job.options`.

Dimensions: C components of a layer, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.config.types import Section
from dynlora_cli.errors import UsageError
from dynlora_cli.text import counted

Read = Callable[[str], Tensor]


@dataclass
class Merged:
    """Base and adapter as one model, tensor by tensor.

    Attributes:
        config: config.json of it.
        names: of its parameters in memory.
        read: one of them by its name.
        write: all of it, as a folder.
        untied: the base's input table and output head share a weight, and here they do not.
    """

    config: dict[str, Any]
    names: Iterable[str]
    read: Read
    write: Callable[[Path], None]
    untied: bool


@dataclass
class Job:
    """What an exporter works with.

    Attributes:
        adapter: to be exported; its scale is 1.
        tokenizer_folder: where the tokenizer of the training run lies; None where neither it nor the base is here.
        base_folder, base_config: the base and its config.json; None where it is not here.
        linear_layers: names and (I, O) of all linear layers of the base, in order; None likewise.
        merged: base and adapter as one model, made when asked for.
        options: those that the exporter itself brings.
        outtype: number format of a GGUF model, see export/gguf/outtypes.py.
        dtype: number format of the factors, to whose values those of `adapter` are rounded already.
        notes: for the person; exporters add to them.
    """

    adapter: Adapter
    tokenizer_folder: Path | None
    base_folder: Path | None
    base_config: dict[str, Any] | None
    linear_layers: dict[str, tuple[int, int]] | None
    merged: Callable[[], Merged]
    options: Section = field(default_factory=Section)
    outtype: str = "f16"
    dtype: str = FULL
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shelf:
    """The adapters of a library that were written.

    Attributes:
        root: the library's folder.
        base: of all of them: a folder or a hub id.
        adapters: what `write` returned, and `parameters`, by name.
        left_out: adapters that the consumer cannot read, and why.
    """

    root: Path
    base: str
    adapters: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]


class Exporter(Protocol):
    """The shape of an exporter's module."""

    needs_base: bool

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """Put the files into an empty folder."""

    def read_back(self, job: Job, folder: Path) -> Adapter | Read | Path:
        """Read these files as the consumer does."""


def plain_lora(adapter: Adapter, consumer: str, *, heads: bool = False) -> Adapter:
    """The adapter as it is; refused if it is more than factors of linear layers.

    Args:
        adapter: to be exported.
        consumer: who reads it, for the message.
        heads: whether it takes what replaces the base's own: tensors, rows of tables, biases.

    Raises:
        UsageError: it has something that the consumer does not read; the message says what would work.
    """
    hint = "fold it into the base instead: --to merged, or `dynlora merge`"
    if adapter.kind != "LoRA":
        raise UsageError(f"{adapter.folder} is a {adapter.kind}, which {consumer} does not read", hint)
    tables = [name for name, factors in adapter.layers.items() if factors.embedding]
    if tables:
        raise UsageError(f"{adapter.folder} adapts the embedding {tables[0]}, which {consumer} does not read", hint)
    if adapter.experts:
        raise UsageError(f"{adapter.folder} has components for each expert, which {consumer} does not read", hint)
    what = "" if heads else _beside_components(adapter)
    if what:
        raise UsageError(f"{adapter.folder} holds {what}, which {consumer} does not read", hint)
    return adapter


def _beside_components(adapter: Adapter) -> str:
    """What an adapter has beside its components, in words; nothing where it has nothing."""
    if adapter.token_rows:
        tokens = counted(sum(len(rows.indices) for rows in adapter.token_rows.values()), "trained row")
        return f"{tokens} of {' and '.join(adapter.token_rows)}"
    if whole := [name for name in adapter.whole if name not in adapter.biases]:
        return f"whole tensors ({', '.join(whole)})"
    if adapter.biases:
        return f"{counted(len(adapter.biases), 'trained bias', 'trained biases')}, such as {adapter.biases[0]}"
    return "biases of its layers (lora_bias)" if adapter.has_lora_bias else ""


def padded(adapter: Adapter, empty: dict[str, tuple[int, int]] | None = None, rank: int | None = None) -> Adapter:
    """Every layer at one rank: components of zeros are added, which change nothing.

    Args:
        adapter: with ranks that differ.
        empty: names and (I, O) of layers to have as well, at zeros alone.
        rank: at least the largest; None: the largest.
    """
    largest = rank or max(adapter.ranks.values())
    layers = {
        name: Factors(torch.zeros(largest, d_in), torch.zeros(d_out, largest))
        for name, (d_in, d_out) in (empty or {}).items()
    }
    for name, factors in adapter.layers.items():
        a_CI = torch.zeros(largest, factors.a_CI.shape[1])
        b_OC = torch.zeros(factors.b_OC.shape[0], largest)
        a_CI[: factors.rank], b_OC[:, : factors.rank] = factors.a_CI, factors.b_OC
        layers[name] = replace(factors, a_CI=a_CI, b_OC=b_OC, born=())
    return adapter.with_layers(layers)
