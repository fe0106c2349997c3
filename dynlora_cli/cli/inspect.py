"""`dynlora inspect`."""

from __future__ import annotations

from dynlora_cli.cli.options import Adapters
from dynlora_cli.cli.reporting import AsJson, console, reporting
from dynlora_cli.errors import UsageError


def inspect(adapter: Adapters, as_json: AsJson = False) -> None:
    """Show what an adapter is made of; two are put side by side."""
    with reporting(as_json) as result:
        if len(adapter) > 2:
            raise UsageError("--adapter: one or two can be looked at together", "leave some out")
        from dynlora_cli.commands import preflight

        preflight.adapters(adapter)
        from dynlora_cli.cli.views.adapters import AdapterView
        from dynlora_cli.commands import inspect as command

        found = command.run(adapter)
        result.update(found)
        AdapterView(console()).show_inspected(found)
