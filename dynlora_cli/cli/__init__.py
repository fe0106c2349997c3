"""The command line: options, messages and exit codes. Thin: commands do the work."""

from dynlora_cli.cli.app import main

__all__ = ["main"]
