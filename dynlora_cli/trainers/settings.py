"""What `attach` and `DynamicRankCallback` are given, checked as the sections of a recipe are, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynlora_cli import plugins
from dynlora_cli.config.load import check
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.text import did_you_mean

# Keys of the sections `adapter` and `rank` that a trainer of others cannot serve, and why.
REFUSED = {
    "from": "going on from an adapter is done by `dynlora train` alone",
    "old": "going on from an adapter is done by `dynlora train` alone",
    "orthogonality": "it is a penalty on the loss, which the trainer computes",
    "penalty": "it is added to the loss, which the trainer computes",
    "library": "routers are trained by `dynlora train` alone",
    "allocation": "it is measured on the rows, which are not known yet when components are attached",
    "elastic": "every first part of the components is trained by `dynlora train` alone",
    "tolerance": "it is for `budget: auto`, which needs held-out rows",
    "loss": "the loss is the trainer's own",
}
STARTS = ("default", "orthogonal")  # the others need the rows, the model's files or a gradient before it is clipped


def refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """
    Raises:
        UsageError: there is a key that is none of `known`; the message says why, or what was meant.
    """
    for key in given:
        if key in REFUSED:
            raise UsageError(f"{where}: {key}: {REFUSED[key]}", "leave it out, or train with `dynlora train`")
        raise UsageError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}", f"it takes: {', '.join(known)}")


def checked(sections: Mapping[str, Mapping[str, Any]], *, task: str | None, seed: int, where: str) -> Recipe:
    """The sections `adapter`, `rank` and `pruning` as a recipe's, which has the model and the rows of nobody.

    Args:
        sections: plain values by key, by section.
        task: of the model, as in a recipe; None: of no task that recipes know.
        seed: of the components' values, and of policies that draw lots.
        where: what messages name as the place.

    Raises:
        UsageError: a value is wrong, two do not go together, or a trainer of others cannot serve one.
    """
    recipe = check(
        {"model": {"name_or_path": "model", "task": task or "causal-lm"}, "dataset": "rows", "seed": seed, **sections},
        where,
    )
    adapter, policy = recipe.adapter, recipe.pruning.policy
    if recipe.rank.parsed_budget().kind == "bytes":
        raise UsageError(
            f"{where}: budget: bytes of a file are for `dynlora train` and `dynlora prune`",
            'write an average rank (8) or a count ("2M"), then `dynlora prune --budget 200kB` what is saved',
        )
    if recipe.rank.parsed_budget().kind == "auto":
        raise UsageError(
            f"{where}: budget: auto is found on held-out rows, which a callback does not have",
            "write a number, such as 8, 0.5 or 2M, or train with `dynlora train`",
        )
    if not plugins.declared("variants", adapter.variant, "has_components"):
        raise UsageError(f"{where}: variant {adapter.variant} has no components", "write `variant: lora`")
    if adapter.init_weights not in STARTS:
        raise UsageError(
            f"{where}: init_weights: {adapter.init_weights} needs the rows or the files of a run",
            f"write one of {', '.join(STARTS)}, or train with `dynlora train`",
        )
    if policy == "retrieval":
        raise UsageError(
            f"{where}: policy retrieval looks at single rows and their confidence, which a callback does not see",
            "write `policy: fisher`, or train with `dynlora train`",
        )
    return recipe
