"""What a person asks for, on the command line or in Python: checked here, before anything heavy loads.

Each function takes what its command takes, refuses what is wrong with it, and returns the work itself: a function that
takes a listener of events and returns the command's summary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli import plugins
from dynlora_cli.adapters.find import is_for_pipeline, is_image
from dynlora_cli.cli.values import METHODS, choice, numbers, saved_dtype, share, size
from dynlora_cli.commands import preflight
from dynlora_cli.config.arguments import place, several
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.config.options import given
from dynlora_cli.errors import UsageError
from dynlora_cli.execution.launch import is_main_process
from dynlora_cli.export.gguf.outtypes import DEFAULT, NAMES, QUANTIZED
from dynlora_cli.export.gguf.quantizer import find_quantizer
from dynlora_cli.export.hub.login import Address
from dynlora_cli.runs.events import Emit
from dynlora_cli.runs.folder import place_of, refuse_occupied

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.resume import Standing
    from dynlora_cli.config.sweep import Grid

Work = Callable[[Emit], dict[str, Any]]
POLICY, TOLERANCE = "auto", "0.5%"  # of prune, where nobody says
MAX_KL, MAX_CHANGED = 0.01, "1%"  # of merge
SETTINGS = "a dict such as {'rank.budget': 4}, or texts such as 'rank.budget=4'"


def recipe_of(recipe: str | os.PathLike[str] | Mapping[str, Any], changes: Sequence[str], out: str | None) -> Recipe:
    """A recipe, checked: of a file, or what a program has made.

    Raises:
        UsageError: it is neither, or it has problems.
    """
    from dynlora_cli.config.load import check_recipe, load_recipe

    if isinstance(recipe, Mapping):
        return check_recipe(recipe, changes, out)
    if isinstance(recipe, (str, os.PathLike)):
        return load_recipe(Path(place("recipe", recipe)), changes, out)
    raise UsageError(f"a recipe is a file or a dict, and no {type(recipe).__name__}", "give its path, or its sections")


def settings(given: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Settings as `--set` takes them, of a dict or a list.

    Raises:
        UsageError: they are something else, or hold what no recipe can.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        found = [given] if isinstance(given, str) else several("set", given, SETTINGS)
        if wrong := [one for one in found if not isinstance(one, str)]:
            raise UsageError(f"set: got a {type(wrong[0]).__name__} in a list, must be {SETTINGS}")
        return found
    from dynlora_cli.config.strict_yaml import from_plain

    tree, problems = from_plain(given, "set")
    if tree is None or problems:
        raise UsageError("\n".join(map(str, problems)))
    # JSON is YAML.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in tree.plain().items()]


@contextmanager
def training(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, resume_from: Path | None = None
) -> Iterator[None]:
    """Hold the output folder as its only writer, and check what a run needs of the disk.

    Raises:
        UsageError, MachineError, DataError: as the run itself would.
    """
    if not is_main_process():
        yield
        return
    with place_of(Path(recipe.output_dir)):
        preflight.training(recipe, writes=True, overwrite=overwrite, resume=resume, resume_from=resume_from)
        yield


@contextmanager
def sweeping(grid: Grid, *, overwrite: bool = False, resume: bool = False) -> Iterator[Mapping[str, Standing]]:
    """Hold the folder of a sweep as its only writer, and check what its runs need of the disk.

    Yields:
        How each run stands, by its name.

    Raises:
        UsageError, MachineError, DataError: every problem of any run.
    """
    from dynlora_cli.commands import sweep as command

    with place_of(grid.folder):
        yield command.check(grid, preflight.training, writes=True, overwrite=overwrite, resume=resume)


def refuse_both_ways(overwrite: bool, resume: bool, resume_from: Path | None) -> None:
    """Refuse to replace a run and to go on with it.

    Raises:
        UsageError: both are asked for.
    """
    if overwrite and (resume or resume_from):
        raise UsageError("--overwrite and --resume exclude each other", "choose one of them")


def prune(
    adapter: Path,
    out: Path,
    *,
    budget: str | float | None,
    born: Sequence[str] = (),
    policy: str = POLICY,
    options: Sequence[str] = (),
    data: Path | None = None,
    tolerance: str | float = TOLERANCE,
    heal: int = 0,
    teacher: float = 0.0,
    dtype: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    max_samples: int | None = None,
    measure: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> Work:
    """A smaller adapter; or one without an update that it holds."""
    choosing = {"--policy": policy != POLICY, "--set": options, "--tolerance": tolerance != TOLERANCE, "--seed": seed}
    choosing |= {"--dtype": dtype is not None, "--teacher": teacher}
    _refuse_cut_and_birth(budget, born, [option for option, is_given in choosing.items() if is_given])
    _refuse_teacher(teacher, heal)
    cut: dict[str, Any] = {}
    if budget is not None:
        cut["teacher"] = teacher
        choice(policy, [POLICY, *plugins.names("policies")], "--policy")
        if policy == POLICY and options:
            raise UsageError("--set is of a policy, and none is named", "name it with --policy")
        cut |= {"budget": size(budget, "--budget"), "tolerance": share(tolerance, "--tolerance"), "policy": policy}
        cut["options"] = None if policy == POLICY else given("policies", policy, options)
        cut["dtype"] = saved_dtype(dtype, images=True) if dtype else ""
    preflight.adapters([adapter], base, data)
    refuse_occupied(out, overwrite=overwrite, option="--out")
    common: dict[str, Any] = {"data": data, "heal_steps": heal, "base_name": base, "measure": measure}
    common |= {"trust_remote_code": trust_remote_code, "max_samples": max_samples, "overwrite": overwrite}

    def work(emit: Emit) -> dict[str, Any]:
        if born:
            from dynlora_cli.commands import retire

            return retire.run(retire.Request(adapter, list(born), out, **common), emit)
        from dynlora_cli.commands import prune as command

        return command.run(command.Request(adapter, out=out, seed=seed, **cut, **common), emit)

    return work


def _refuse_teacher(share: float, heal: int) -> None:
    """Refuse a teacher of nothing, and a share that is none."""
    if not 0 <= share <= 1:
        raise UsageError(f"--teacher {share} is no share", "give a number from 0 to 1")
    if share and not heal:
        raise UsageError("--teacher is for healing, and no steps are given", "add --heal 60, say, or leave it out")


def _refuse_cut_and_birth(budget: str | float | None, born: Sequence[str], choosing: list[str]) -> None:
    """Refuse a command that says neither what goes nor how much, or both."""
    if not budget and not born:
        raise UsageError(
            "prune needs to know how much may stay, or whose components go", "give --budget 0.5, say, or --born RUN"
        )
    if budget and born:
        raise UsageError(
            "--born and --budget are two steps: one takes an update out, the other makes the adapter smaller",
            "retire first, then prune the folder that --out named",
        )
    if born and choosing:
        raise UsageError(
            f"{choosing[0]} is for --budget; --born takes out all that a run brought in, and leaves the rest as it is",
            f"leave {choosing[0]} out",
        )


def merge(
    adapters: Sequence[Path],
    *,
    into: str | None = None,
    out: Path | None = None,
    method: str = "exact",
    options: Sequence[str] = (),
    weights: str | Sequence[float] | None = None,
    budget: str | float | None = None,
    density: float = 0.5,
    seed: int = 0,
    at_step: float | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    base_weights: str = "original",
    dtype: str = "keep",
    max_kl: float = MAX_KL,
    max_changed: str | float = MAX_CHANGED,
    overwrite: bool = False,
) -> Work:
    """One adapter in its base, or several as one adapter."""
    wanted = into or ("base" if len(adapters) == 1 else "adapter")
    changed = share(max_changed, "--max-changed")
    choice(wanted, ("base", "adapter"), "--into")
    choice(base_weights, ("original", "dequantized"), "--base-weights")
    choice(dtype, ("keep", "float32", "bfloat16", "float16"), "--dtype")
    others = [name for name in plugins.names("methods") if name not in METHODS]
    choice(method, (*METHODS, *others), "--method")
    way: dict[str, Any] = {"method": method, "density": density, "seed": seed}
    way["weights"] = numbers(weights, "--weights") if weights else None
    way["budget"] = size(budget, "--budget", auto=False, in_bytes=False) if budget else None
    if not 0 < density <= 1:
        raise UsageError(f"--density {density} is no share above 0", "for example --density 0.5")
    if options and len(adapters) == 1:
        raise UsageError("--set is for how several adapters are combined, and there is one", "leave --set out")
    way["options"] = given("methods", method, options)
    if len(adapters) == 1 and wanted == "adapter":
        raise UsageError("--into adapter combines several adapters", "add --adapter, or use `dynlora prune`")
    if len(adapters) > 1 and out is None:
        raise UsageError("several adapters have no folder of their own for the result", "name one with --out")
    found = preflight.adapters(adapters, base, images=True)
    if wanted == "base" and is_for_pipeline(found[0]):
        _check_pipeline(found[0], out, base_weights, dtype, max_kl, max_changed)
    refuse_occupied(out or found[0] / "merged", overwrite=overwrite, option="--out")
    common: dict[str, Any] = {"base_name": base, "trust_remote_code": trust_remote_code, "overwrite": overwrite}
    common["at_step"] = at_step

    def work(emit: Emit) -> dict[str, Any]:
        from dynlora_cli.commands import merge as command

        model = command.Wanted(base_weights, dtype, max_kl, changed)
        return command.run(adapters, wanted, out, command.Way(**way), model, **common, emit=emit)

    return work


def _check_pipeline(
    found: Path, out: Path | None, base_weights: str, dtype: str, max_kl: float, max_changed: str | float
) -> None:
    """Refuse what merging into a diffusion pipeline does not take."""
    if out is None and is_image(found):
        raise UsageError(f"{found} has no folder of its own for the result", "name one with --out")
    others = {"--base-weights": base_weights != "original", "--dtype": dtype != "keep"}
    others |= {"--max-kl": max_kl != MAX_KL, "--max-changed": max_changed != MAX_CHANGED}
    if given := [option for option, is_set in others.items() if is_set]:
        raise UsageError(
            f"{given[0]} is for language models; a pipeline's weights keep their number format, and each is read again",
            f"leave {given[0]} out",
        )


def export(
    to: str,
    out: Path,
    *,
    adapter: Path | None = None,
    library: Path | None = None,
    options: Sequence[str] = (),
    base: str | None = None,
    trust_remote_code: bool = False,
    outtype: str = "f16",
    dtype: str | None = None,
    max_kl: float | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
) -> Work:
    """An adapter in the form of another tool, or all of a library's."""
    from dynlora_cli.library.library import Library

    choice(to, plugins.names("exporters"), "--to")
    outtype = outtype.lower()
    _check_outtype(to, outtype)
    saved = _export_dtype(to, dtype)
    own = given("exporters", to, options)
    _refuse_other_source(to, adapter, library)
    address = _address(push_to_hub, public, library)
    if library is not None:
        Library.open(library)
    preflight.adapters([adapter] if adapter else [], base)
    refuse_occupied(out, overwrite=overwrite, option="--out")
    common: dict[str, Any] = {"base_name": base, "trust_remote_code": trust_remote_code, "options": own}
    common |= {"max_kl": max_kl, "overwrite": overwrite}

    def work(emit: Emit) -> dict[str, Any]:
        from dynlora_cli.commands import export as command

        if library is not None:
            return command.run_library(library, to, out, **common, emit=emit)
        assert adapter is not None
        return command.run(adapter, to, out, **common, outtype=outtype, dtype=saved, address=address, emit=emit)

    return work


def _export_dtype(to: str, dtype: str | None) -> str:
    """The number format of the factors; refused where the form's reader does not take it."""
    saved, taken = saved_dtype(dtype, images=True), plugins.declared("exporters", to, "DTYPES", ())
    if dtype is None:
        return ""
    if saved not in (*taken, *((FULL,) if taken else ())):
        how = f"writes float32, {' or '.join(taken)}" if taken else "writes what its reader takes"
        raise UsageError(f"--to {to} {how}, and --dtype {dtype} is not for it", "leave --dtype out, or use --to peft")
    return saved


def _address(repo: str | None, public: bool, library: Path | None) -> Address | None:
    """Where on a hub the export goes, if it goes there and may."""
    if repo is None:
        if public:
            raise UsageError("--public is for what --push-to-hub sends", "add --push-to-hub ORG/NAME")
        return None
    if library is not None:
        raise UsageError("--push-to-hub sends one adapter, not a library", "export and send each by itself")
    address = Address(repo, public)
    address.check()
    return address


def _check_outtype(to: str, outtype: str) -> None:
    """Check that there is such a number format, that the form has one, and that the machine can write it."""
    choice(outtype, NAMES, "--outtype")
    if outtype != DEFAULT and not plugins.declared("exporters", to, "OUTTYPE", False):
        raise UsageError(f"--to {to} writes no GGUF model, which --outtype is for", "leave --outtype out")
    if outtype in QUANTIZED:
        find_quantizer(outtype)


def _refuse_other_source(to: str, adapter: Path | None, library: Path | None) -> None:
    """Check that there is what the form is of: one adapter, or a library.

    Raises:
        UsageError: there is not, or there are both.
    """
    of_library = plugins.declared("exporters", to, "OF_LIBRARY", False)
    if of_library and library is None:
        raise UsageError(f"--to {to} writes all adapters of a library", "name one: --library LIB")
    if not of_library and adapter is None:
        raise UsageError(f"--to {to} writes one adapter", "name it: --adapter FOLDER")
    if adapter is not None and library is not None:
        raise UsageError("--adapter and --library do not go together", f"leave out the one that --to {to} is not of")


def inspect(adapters: Sequence[Path]) -> Work:
    """What an adapter is made of, or two."""
    if len(adapters) > 2:
        raise UsageError("--adapter: one or two can be looked at together", "leave some out")
    preflight.adapters(adapters)

    def work(_: Emit) -> dict[str, Any]:
        from dynlora_cli.commands import inspect as command

        return command.run(adapters)

    return work
