"""What a person asks `dynlora eval` for, on the command line or in Python: checked before anything heavy loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.commands import preflight
from dynlora_cli.config.load import RECIPES, load_recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.text import to_type

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model
    from dynlora_cli.evaluation.thresholds import Thresholds

Tell = Callable[[str], None]
NEWEST_BELOW = Path("out")


def evaluate(
    recipe: Path | None,
    adapters: Sequence[Path],
    *,
    thresholds: Thresholds,
    data: Path | None = None,
    also: Mapping[str, Path] | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    with_base: bool = True,
    max_samples: int | None = None,
    generate: int | None = None,
    samples: int = 0,
    tasks: str | None = None,
    limit: int | None = None,
    allow_template_mismatch: bool = False,
) -> Callable[[Tell], dict[str, Any]]:
    """Adapters and their base, measured on held-out rows; the work takes a listener of lines."""
    if also and not with_base:
        raise UsageError("--also compares with the base model, which --no-base leaves out", "leave one of them out")
    names = _task_names(tasks, limit)
    folders, rows = _what_is_meant(recipe, list(adapters), data)
    preflight.adapters(folders, base, rows, also)
    trusted: bool | Model = trust_remote_code or (load_recipe(recipe).model if recipe else False)

    def work(tell: Tell) -> dict[str, Any]:
        from dynlora_cli.commands import evaluate as command
        from dynlora_cli.evaluation.options import Options

        options = Options(
            base=base,
            trust_remote_code=trusted,
            with_base=with_base,
            max_samples=max_samples,
            also=also or {},
            generate=generate,
            samples=samples,
            tasks=names,
            limit=limit,
            allow_template_mismatch=allow_template_mismatch,
            thresholds=thresholds,
        )
        return command.run(folders, rows, options, tell)

    return work


def _what_is_meant(recipe: Path | None, adapters: list[Path], data: Path | None) -> tuple[list[Path], Path | None]:
    """The adapters' folders, and where the rows come from where that is not the first adapter's own run.

    Raises:
        UsageError: the arguments contradict each other, or what they name is not there.
    """
    if recipe is None:
        if not adapters and not NEWEST_BELOW.is_dir():
            raise UsageError("there is no run below ./out", "train one first, or name one with --adapter FOLDER")
        if data is not None and data.suffix.lower() in RECIPES:
            load_recipe(data)
        return adapters or [NEWEST_BELOW], data
    if recipe.is_dir():
        raise UsageError(f"{recipe} is a folder, not a recipe", to_type("eval", "--adapter", recipe))
    if adapters and data is not None:
        raise UsageError(f"{recipe} and --data {data} both say which rows to take", "leave one of them out")
    made = Path(load_recipe(recipe).output_dir)
    if not adapters and not made.is_dir():
        raise UsageError(
            f"{recipe}: there is no run in {made} yet", f"{to_type('train', recipe)}, or name an adapter with --adapter"
        )
    return adapters or [made], data or recipe


def named_rows(texts: Sequence[str]) -> dict[str, Path]:
    """The files of `--also` by their names.

    Raises:
        UsageError: one is not written NAME=FILE, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = (part.strip() for part in text.partition("="))
        if not (name and equals and file):
            raise UsageError(f"--also {text} must be written NAME=FILE", "for example --also general=general.jsonl")
        if name in found:
            raise UsageError(f"--also: two sets are called {name}", "give each a name of its own")
        found[name] = Path(file)
    return found


def _task_names(tasks: str | None, limit: int | None) -> list[str]:
    from dynlora_cli.evaluation.lm_eval import require, split_tasks

    if tasks is None:
        if limit is not None:
            raise UsageError("--limit is of tasks, and there are none", "add --tasks, or use --max-samples for rows")
        return []
    require()
    return split_tasks(tasks)
