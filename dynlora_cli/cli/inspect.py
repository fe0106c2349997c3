"""`dynlora inspect`."""

from __future__ import annotations

from dynlora_cli.cli.options import Adapters
from dynlora_cli.cli.reporting import AsJson, console, reporting


def inspect(adapter: Adapters, as_json: AsJson = False) -> None:
    """Show what an adapter is made of; two are put side by side."""
    with reporting(as_json) as result:
        from dynlora_cli.cli import asked

        work = asked.inspect(adapter)
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console())
        found = work(view)
        result.update(found)
        view.show_inspected(found)
