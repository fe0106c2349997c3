"""What a retired update leaves behind, for updates.py: three updates in a chain, and the second one is taken out again.

The loss on the test rows of the second update, with: the first update alone (before), the first two (with), all three,
all three less the second (retired), the same after `--heal` steps on the rows of the third, and the first and third where
the second was never trained (never). A retirement that left nothing behind would come to `never`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from updates_runs import METHODS, STREAMS, Record, Stream, later_settings, measure, ranks, run_settings, trained

CHAIN = 3
HEAL = 20
KINDS = ("growth, freeze, unpruned", "growth, freeze", "growth, tune")


def chain(method: str, seed: int, rate: float, work: Path, stages: tuple[int, ...] = (0, 1, 2)) -> list[Path]:
    """The folders of the first updates of the stream of domains, or of some of them."""
    stream, folders = STREAMS["domains"], []
    for number, stage in enumerate(stages):
        settings = run_settings(stream, [stream.tasks[stage]], rate, seed, work)
        settings |= ranks(METHODS[method], stream, number)
        if folders:
            settings |= later_settings(METHODS[method], folders[-1])
        folders.append(trained(settings, work))
    return folders


def retire(adapter: Path, update: Path, out: Path, heal: int = 0) -> Record:
    """`dynlora prune --born`; its summary."""
    command = [sys.executable, "-m", "dynlora_cli", "prune", "--adapter", adapter, "--born", update, "--out", out]
    command += ["--overwrite", "--no-measure", "--json", *(["--heal", heal] if heal else [])]
    done = subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return dict(json.loads(done.stdout))


def leaves_behind(method: str, seed: int, rate: float, work: Path) -> Record:
    """The losses by state and task, and whether taking the last update out gives the one before it to the bit."""
    stream = STREAMS["domains"]
    first, second, third = chain(method, seed, rate, work)
    never = chain(method, seed, rate, work, (0, 2))[-1]
    folders = {"before": first, "with": second, "all": third, "never": never}
    said = {}
    for name, adapter, heal in (("undone", second, 0), ("retired", third, 0), ("healed", third, HEAL)):
        folders[name] = third.with_name(f"{third.name}-{name}")
        said[name] = retire(adapter, second, folders[name], heal)["exact"]
    losses = {name: measure(stream, folder, stream.tasks[:CHAIN], work)["loss"] for name, folder in folders.items()}
    return {"loss": losses, "said_exact": said, "same_to_the_bit": _equal(stream, first, folders["undone"], work)}


def _equal(stream: Stream, one: Path, other: Path, work: Path) -> bool:
    """Whether two adapters give the same logits on test rows, bit for bit."""
    import torch
    from updates_runs import base_of, rows_of

    from dynlora_cli.adapters.attach import attached
    from dynlora_cli.adapters.read import read_adapter

    model, found = base_of(stream, work).model, []
    for folder in (one, other):
        with attached(model, read_adapter(folder)), torch.no_grad():
            found.append([model(**batch.inputs).logits for batch in rows_of(stream, stream.tasks[1], "test", work)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
