"""A whole library for vLLM: every adapter, and the command that serves them all.

What it does
    Writes each adapter as `vllm` does, with all its layers filled up to one rank, into `adapters/NAME`. `start.sh`
    serves them under their names on one base, with the smallest `--max-lora-rank` that vLLM allows and all of them
    take. README.md says how, and how to put `dynlora serve --upstream` in front, which chooses the adapter.

    An adapter that vLLM does not read (DoRA, HiRA, a trained head, an adapted embedding) is left out, and named.

When to use it
    To serve a library with vLLM: `dynlora export --library LIB --to vllm-library --out FOLDER`.

Reference
    vLLM's docs/features/lora.md; entrypoints/openai/cli_args.py (LoRAParserAction: NAME=PATH), config/lora.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.export.exporter import Job, Read, Shelf, padded, plain_lora

needs_base = False
OF_LIBRARY = True
MOST_AT_ONCE = 8  # adapters of one batch: vLLM reserves memory for each, at the largest rank


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write one adapter of the library, all its layers at one rank."""
    even = replace(job, adapter=padded(plain_lora(job.adapter, "vLLM")), notes=[])  # the rank to serve with is for all
    facts: dict[str, Any] = plugins.load("exporters", "vllm").write(even, folder)
    return facts


def read_back(job: Job, folder: Path) -> Adapter | Read | Path:
    """One adapter by vLLM's rules."""
    found: Adapter | Read | Path = plugins.load("exporters", "vllm").read_back(job, folder)
    return found


def write_library(shelf: Shelf, folder: Path) -> dict[str, Any]:
    """Write the start script and README.md beside the adapters."""
    rank = max(facts["max_lora_rank"] for facts in shelf.adapters.values())
    script = folder / "start.sh"
    script.write_text(_start(shelf.base, list(shelf.adapters), rank), encoding="utf-8")
    script.chmod(0o755)
    (folder / "README.md").write_text(_readme(shelf, rank), encoding="utf-8")
    return {"max_lora_rank": rank, "start": script.name}


def _start(base: str, names: list[str], rank: int) -> str:
    """The script. It may lie anywhere: paths in it are relative to it, but for the base's."""
    modules = " \\\n    ".join(f"{name}=adapters/{name}" for name in names)
    at_once = min(len(names), MOST_AT_ONCE)
    return f"""#!/usr/bin/env bash
# Serve the base and its adapters with vLLM:  ./start.sh [more options of `vllm serve`]
# Another base than the one below:            BASE=FOLDER_OR_NAME ./start.sh
set -euo pipefail
unset CDPATH

base=${{BASE:-}}
if [[ -z $base ]]; then
    base={shlex.quote(base)}
fi
if [[ -d $base ]]; then
    base=$(cd -- "$base" && pwd)
fi
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
exec vllm serve "$base" --enable-lora --lora-modules \\
    {modules} \\
    --max-lora-rank {rank} --max-loras {at_once} --max-cpu-loras {len(names)} "$@"
"""


def _readme(shelf: Shelf, rank: int) -> str:
    rows = "\n".join(
        f"| `{name}` | {facts['largest_rank']} | {facts['parameters']:,} |" for name, facts in shelf.adapters.items()
    )
    left_out = _left_out(shelf.left_out)
    proxy = shlex.join(["dynlora", "serve", "--upstream", "http://127.0.0.1:8000", "--library", str(shelf.root)])
    return f"""# Adapters for vLLM

```bash
./start.sh
```

serves the base under its own name and each adapter under its name: `model` of a request chooses. Options behind it go
to `vllm serve`; `BASE=FOLDER ./start.sh` takes the base from elsewhere. The largest rank is served with
`--max-lora-rank {rank}`.

| `model` | rank | parameters |
|---|---|---|
{rows}
{left_out}
## The adapter that fits the request

```bash
{proxy} --port 9000
```

answers at `http://127.0.0.1:9000/v1` as vLLM does, and sends a request for the model `auto` to the adapter that it is
about, or to the base.
"""


def _left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    lines = "\n".join(f"- `{name}`: {' '.join(why.split())}" for name, why in left_out.items())
    return f"\nNot here, since vLLM cannot read them:\n\n{lines}\n"
