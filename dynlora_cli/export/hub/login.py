"""Where an export goes, and whether anybody may send it: asked before any work, and without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynlora_cli.errors import MachineError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class Address:
    """A repository of models on the hub.

    Args:
        repo: ORG/NAME.
        public: everybody may see it.
    """

    repo: str
    public: bool = False

    def check(self) -> None:
        """Check what can be known before the export.

        Raises:
            UsageError: it is no name of a repository.
            MachineError: nothing may be sent from here, or nobody is logged in.
        """
        if not _NAME.fullmatch(self.repo) or ".." in self.repo or "--" in self.repo:
            raise UsageError(f"--push-to-hub {self.repo}: a repository is called ORG/NAME", "such as acme/support-bot")
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise MachineError(
                "HF_HUB_OFFLINE is set, so nothing is sent to a hub", "unset it, or leave --push-to-hub out"
            )
        if not get_token():
            raise MachineError("--push-to-hub needs a login on the hub", "`hf auth login` with a token that may write")
