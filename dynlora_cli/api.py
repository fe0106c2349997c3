"""The Python face of dynlora: what the commands do, as functions with types."""

from __future__ import annotations
