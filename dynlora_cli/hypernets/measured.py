"""A hypernetwork where adapters are measured: each row is answered under the adapter that its own text is written to.

read_measured   what `--adapter` names, an adapter or a hypernetwork
put_on          either of them on a base in memory
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.find import find_adapter, is_hypernet
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.errors import UsageError
from dynlora_cli.hypernets.conditions import Descriptions
from dynlora_cli.hypernets.files import Hypernetwork, read_hypernet
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.hypernets.layer import lent
from dynlora_cli.hypernets.writing import conditions_of, empty_adapter
from dynlora_cli.runs.folder import RECORD, read_record
from dynlora_cli.text import to_type

if TYPE_CHECKING:
    from dynlora_cli.evaluation.options import Options
    from dynlora_cli.evaluation.rows import Rows
    from dynlora_cli.models.load import Base


@dataclass(frozen=True)
class NetworkAdapter(Adapter):
    """A hypernetwork in the place of an adapter. `layers` is empty: each row has an update of its own.

    Attributes:
        hypernetwork: as it was read.
    """

    hypernetwork: Hypernetwork = field(kw_only=True)

    @property
    def reads_documents(self) -> bool:
        """It writes from the contexts of rows, and not from their descriptions."""
        return bool(plugins.declared("hypernets", self.hypernetwork.form.method, "READS") == "document")

    @property
    def parameters(self) -> int:
        """Numbers of the network."""
        return self.hypernetwork.net.parameter_count

    def refuse_without_texts(self, rows: Rows) -> None:
        """Check that every row comes with what its adapter is to be written from.

        Raises:
            UsageError: one does not.
        """
        if self.reads_documents:
            what, source = "contexts", "--document FILE"
            key = "name rows with the columns context, prompt and completion"
            bare = not all(isinstance(row, GroundedText) for row in rows.examples)
        else:
            what, source = "descriptions", "--description TEXT"
            key = "give them such in a recipe (`dataset.val[].descriptions`) and name that: --data RECIPE.yaml"
            bare = not all(row.description for row in rows.examples)
        if bare:
            written = to_type("adapt", "--hypernet", self.folder, *source.split(), "--out", "FOLDER")
            raise UsageError(
                f"{rows.source}: these rows come without {what}, from which {self.name} writes an adapter for each",
                f"{key}; or write one for all of them and measure that: {written}",
            )


def read_measured(path: Path, base: str | None = None) -> Adapter:
    """The adapter that `path` names, or the hypernetwork.

    Args:
        path, base: as of `read_adapter`.

    Raises:
        UsageError, MeasureError: as of `read_adapter` and `read_hypernet`.
    """
    folder, note = find_adapter(path)
    if not is_hypernet(folder):
        return read_adapter(path, base, routed=True)
    network = read_hypernet(folder)
    empty = empty_adapter(network)
    own = read_record(folder) if (folder / RECORD).is_file() else {}
    kept = {**own, **empty.record, "recipe": own.get("recipe")}
    written, budget = sum(layer.rank * (layer.d_in + layer.d_out) for layer in network.form.layers), network.form.budget
    cut = f"each row is measured under all that is written for it; of {written:,} numbers `adapt` keeps {budget:,}"
    notes = "; ".join(filter(None, [note, cut if budget < written else None])) or None
    parts = {name: getattr(empty, name) for name in ("folder", "layers", "config", "model_type")}
    return NetworkAdapter(**parts, record=kept, note=notes, hypernetwork=network)


def refuse_without_texts(adapters: Sequence[Adapter], rows: Rows, options: Options) -> None:
    """Check that rows come with what hypernetworks write from, and that nothing is asked for that has no rows.

    Args:
        adapters: to be measured.
        rows: that they are measured on.
        options: may ask for rows of other kinds.

    Raises:
        UsageError: they do not, or there is.
    """
    others = [name for name, given in (("--tasks", options.tasks), ("--also", options.also)) if given]
    for network in adapters:
        if isinstance(network, NetworkAdapter):
            if others:
                raise UsageError(
                    f"{others[0]}: {network.name} writes an adapter from the text of each row, and these have none",
                    "write one adapter with it (dynlora adapt --hypernet), and measure that",
                )
            network.refuse_without_texts(rows)


@contextmanager
def put_on(base: Base, adapter: Adapter, rows: Rows) -> Iterator[Generated | None]:
    """The base with an adapter inside the block, and as it was after it.

    Args:
        base: in memory.
        adapter: or a hypernetwork.
        rows: that will be measured on.

    Yields:
        what writes the adapters of rows, of a hypernetwork; None of an adapter.

    Raises:
        UsageError: it does not fit the base, or its encoder of descriptions is another one.
    """
    if not isinstance(adapter, NetworkAdapter):
        with attached(base.model, adapter):
            yield None
        return
    network, device = adapter.hypernetwork, base.model.device
    conditions = conditions_of(network, lambda: base, device)
    if isinstance(conditions, Descriptions):  # the base may make their vectors, and must be alone then
        conditions.learn(sorted({row.description for row in rows.examples}))
    with lent(base.model, [layer.name for layer in network.form.layers]) as written:
        yield Generated(network.net.to(device), written, conditions, network.form.budget)
