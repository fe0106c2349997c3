"""What `dynlora merge --into adapter` leaves beside the adapter: its record, and the summary in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dynlora_cli import __version__
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.merging.combine import Combined
from dynlora_cli.merging.method import Way
from dynlora_cli.runs import record as records


def summary_of(adapters: Sequence[Adapter], combined: Combined, out: Path, way: Way) -> dict[str, Any]:
    """The summary of several adapters that became one."""
    options = way.options.model_dump() if way.options else {}
    return {
        "ok": True,
        "command": "merge",
        "into": "adapter",
        "output_dir": str(out),
        "adapters": [str(each.folder) for each in adapters],
        "method": way.method,
        **({"options": options} if options else {}),
        "weights": list(way.weights or [1.0] * len(adapters)),
        "parameters_start": sum(each.parameters for each in adapters),
        "parameters": combined.adapter.parameters,
        "components": combined.adapter.components,
        "energy_kept": combined.energy_kept,
        "ranks": combined.adapter.ranks,
        "births": [birth["name"] for birth in combined.adapter.record.get("births") or []],
    }


def record_of(
    adapters: Sequence[Adapter], merged: Adapter, out: Path, summary: dict[str, Any], file: Path
) -> records.Record:
    """dynlora.json of an adapter that several were merged into; its tensors are in `file` already."""
    first = adapters[0].record
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return records.Record(
        **({"file": file.name} if merged.image else {}),
        schema_version=records.SCHEMA_VERSION,
        dynlora_version=__version__,
        name=out.name,
        task=merged.task,
        variant="lora",
        base_model=first.get("base_model")
        or records.BaseModel(name_or_path=merged.config.get("base_model_name_or_path")),
        **({"births": merged.record["births"]} if "births" in merged.record else {}),
        **({"tokens": first["tokens"]} if "tokens" in first else {}),  # whose tokenizer it gets
        chat_template_sha256=first.get("chat_template_sha256"),
        data=cast("records.Data", asdict(Writing.of(first))),
        layers={
            name: records.Layer(
                rank=factors.rank,
                importance=factors.energy(),
                d_in=factors.a_CI.shape[1],
                d_out=factors.b_OC.shape[0],
                born=list(factors.born) or [factors.rank],
            )
            for name, factors in merged.layers.items()
        },
        sha256=digest,
        finished=records.now(),
        summary=summary,
    )
