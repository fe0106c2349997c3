"""`dynlora doctor`."""

from __future__ import annotations

import typer

from dynlora_cli.cli.reporting import AsJson, console, reporting
from dynlora_cli.errors import MachineError


def doctor(as_json: AsJson = False) -> None:
    """Look for faults in what is installed and in the machine."""
    with reporting(as_json) as result:
        from dynlora_cli.cli.views.start import show_findings
        from dynlora_cli.commands import doctor as command

        result.update(command.run())
        show_findings(console(), result["findings"])
    if not result["ok"]:  # not an exception: the findings are the result, faults included
        raise typer.Exit(MachineError.exit_code)
