"""What `dynlora prune` cannot do with an adapter of a diffusion pipeline, which is not put in memory."""

from __future__ import annotations

from collections.abc import Mapping

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.errors import UsageError


def refuse(adapter: Adapter, policy: str, options: Mapping[str, object], *, looks: bool) -> None:
    """Refuse what would need the pipeline or pictures.

    Args:
        adapter: of a pipeline.
        policy: by its name.
        options: those that need it, and whether they were given.
        looks: the policy looks at rows.

    Raises:
        UsageError: one was given, or the policy does.
    """
    given = next((option for option, is_given in options.items() if is_given), None)
    if looks:
        given = f"--policy {policy}"
    if given:
        raise UsageError(
            f"{given} needs the pipeline that {adapter.folder} is for, and adapters of pipelines are pruned by their "
            "own numbers",
            "use --policy magnitude --budget 0.5, say, and look at pictures of both",
        )
