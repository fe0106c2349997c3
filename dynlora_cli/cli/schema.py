"""`dynlora schema`."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other tools."""
    from dynlora_cli.config.load import json_schema

    typer.echo(json.dumps(json_schema(plug_ins=True), indent=2))
