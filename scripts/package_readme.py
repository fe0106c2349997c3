"""The README and the addresses as a package index shows them; hatchling runs this when it builds.

In the repository the README's links are relative, which an index cannot follow. Where the build knows the repository's
address (GitHub Actions tells it: GITHUB_SERVER_URL, GITHUB_REPOSITORY, and GITHUB_REF_NAME for the tag), they become
absolute, and the project gets its addresses. Elsewhere a link becomes its text, and a picture what is written beneath it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"[a-z]+:|#")  # of this page, or absolute


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in `readme` and `urls`."""
        address = address_of(os.environ)
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_index(text, address, os.environ.get("GITHUB_REF_NAME") or "main"),
        }
        if address:
            metadata["urls"] = {
                "Homepage": address,
                "Documentation": f"{address}/tree/main/docs",
                "Changelog": f"{address}/blob/main/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }


def address_of(environment: Mapping[str, str]) -> str | None:
    """Where the repository is, as GitHub Actions says; None elsewhere."""
    server, repository = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    return f"{server}/{repository}" if server and repository else None


def for_index(readme: str, address: str | None, ref: str) -> str:
    """The README with absolute links; without an address, with their texts."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if ELSEWHERE.match(target):
            return match[0]
        if not address:
            return text
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/{ref}/{target})"

    return LINK.sub(absolute, readme)
