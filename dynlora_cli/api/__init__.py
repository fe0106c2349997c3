"""The Python face of dynlora: what the commands do, as functions with types.

    from dynlora_cli import api

    run = api.train({"model": "builtin:tiny", "dataset": "rows.jsonl", "output_dir": "out/mine"})
    api.prune(run, budget=0.5, out="out/smaller")
    with api.load(run) as model:
        print(model.generate("def count_words("))

Keyword arguments are the options of the commands, and a recipe may be a file or a dict. What is wrong is raised as the
command reports it: an error of `dynlora_cli.errors`, with `message`, `hint` and `exit_code`. Notebooks show what is
returned with its rank map, and a run while it goes on.

Nothing here keeps state of the process. Calls may come from any thread, and while an event loop runs. Work that trains
or loads a model is done one call at a time: torch has one source of random numbers for the whole process, and
transformers changes settings of it while it loads. A second call waits for the first. What `load` returns may answer
while another thread trains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynlora_cli.api.adapting import adapt
from dynlora_cli.api.calls import as_path, as_text, checked, done
from dynlora_cli.errors import DynloraError, Interrupted

if TYPE_CHECKING:
    from dynlora_cli.adapters.images.pipeline import rank_by_timestep
    from dynlora_cli.api.loaded import Loaded
    from dynlora_cli.api.results import Evaluation, Exported, Inspection, Merged, Run, Written
    from dynlora_cli.cli.asked import Work
    from dynlora_cli.trainers import DynamicRankCallback, attach

    PathLike = str | os.PathLike[str]
    Adapter = PathLike | Written
    Progress = Literal["auto"] | Callable[[dict[str, Any]], None] | None
    Settings = Mapping[str, Any] | Sequence[str] | None

__all__ = [
    "DynamicRankCallback", "DynloraError", "Interrupted", "adapt", "attach", "evaluate", "export", "inspect", "load",
    "merge", "prune", "rank_by_timestep", "train",
]  # fmt: skip


@checked
def train(
    recipe: PathLike | Mapping[str, Any],
    *,
    set: Settings = None,
    output_dir: PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: PathLike | None = None,
    progress: Progress = "auto",
) -> Run:
    """Train an adapter, and leave a complete run folder.

    Ctrl-C, or the stop button of a notebook, finishes the step in hand, saves, and raises `Interrupted`; the same call
    with `resume=True` goes on. To train on several GPUs, or several recipes side by side, use the command: `dynlora
    train --devices N`, `dynlora train a.yaml b.yaml`.

    Args:
        recipe: a YAML file; or the same as a dict, which is checked as strictly.
        set: keys to change, such as `{"rank.budget": 4}`, or `["rank.budget=4"]`.
        output_dir: where the run goes, in place of the recipe's; that is `out/` and the file's name where the recipe
            says nothing, and `out/run` for a dict.
        overwrite: replace an earlier run in that folder.
        resume: go on with the newest valid checkpoint. A finished run is returned as it is.
        resume_from: go on with this checkpoint folder.
        progress: what shows the run while it goes on. "auto": a picture that is redrawn in a notebook and in a
            terminal, and nothing anywhere else. A function takes every event, see `dynlora_cli/runs/events.py`. None:
            nothing.

    Raises:
        RecipeError: the recipe has problems; all of them are in the message.
        UsageError, DataError, MachineError, MeasureError: as the command.
        Interrupted: Ctrl-C, after a clean checkpoint.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked, faults
    from dynlora_cli.cli.views.watching import watched

    with faults.translated():
        again = as_path(resume_from)
        asked.refuse_both_ways(overwrite, resume, again)
        checked = asked.recipe_of(recipe, asked.settings(set), as_text(output_dir))
        with asked.training(checked, overwrite=overwrite, resume=resume, resume_from=again):
            from dynlora_cli.commands import train as command
            from dynlora_cli.models.alone import one_at_a_time

            with one_at_a_time, watched(progress) as heard:
                summary = command.run(checked, listener=heard, overwrite=overwrite, resume=resume, resume_from=again)
    return results.Run(summary, tuple(heard.notes), Path(summary["output_dir"]))


@checked
def prune(
    adapter: Adapter,
    *,
    out: PathLike,
    budget: str | float | None = None,
    born: Adapter | Sequence[Adapter] = (),
    policy: str = "auto",
    set: Settings = None,
    data: PathLike | None = None,
    tolerance: str | float = "0.5%",
    heal: int = 0,
    teacher: float = 0.0,
    dtype: str | None = None,
    base: PathLike | None = None,
    trust_remote_code: bool = False,
    max_samples: int | None = None,
    measure: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = "auto",
) -> Run:
    """Make a trained adapter smaller, or take one of its updates out again; the input stays as it is.

    Args:
        adapter: a run, or its folder, or any PEFT LoRA folder.
        out: a new folder.
        budget: an average rank (8), a share of the parameters (0.5), a number of them ("2M"), bytes of the file
            ("200kB"), or "auto": as few as `tolerance` allows.
        born: instead of a budget: take out what this run put in; the run itself, its name, its id or its folder.
        policy: what chooses; "auto" is "activation" where rows are known, and "magnitude", which needs none, elsewhere.
        set: options of the policy.
        data: rows to look at and to measure on, a file or a recipe; by default the run's own held-out rows.
        tolerance: with budget "auto", the share by which the held-out loss may rise.
        heal: training steps after the cut.
        teacher: with `heal`, the share that is learned from the adapter before the cut, such as 0.7; the rest from the
            rows.
        dtype: number format of the saved factors: "float32", "bf16" or "fp8".
        base: the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        max_samples: rows at most.
        measure: measure the loss against the size, where rows are known.
        seed: of policies that draw lots.
        overwrite: replace what dynlora made there before.
        progress: as of `train`.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked

    how: dict[str, Any] = {"budget": budget, "born": results.births_of(born)}
    how |= {
        "policy": policy,
        "options": asked.settings(set),
        "data": as_path(data),
        "tolerance": tolerance,
        "heal": heal,
    }
    how |= {"base": as_text(base), "trust_remote_code": trust_remote_code, "max_samples": max_samples}
    how |= {"measure": measure, "seed": seed, "overwrite": overwrite, "dtype": dtype, "teacher": teacher}
    summary, notes = done(lambda: asked.prune(results.folder_of(adapter), Path(out), **how), progress)
    return results.Run(summary, notes, Path(out))


@checked
def merge(
    adapter: Adapter | Sequence[Adapter],
    *,
    into: Literal["base", "adapter"] | None = None,
    out: PathLike | None = None,
    method: str = "exact",
    set: Settings = None,
    weights: Sequence[float] | str | None = None,
    budget: str | float | None = None,
    density: float = 0.5,
    seed: int = 0,
    at_step: float | None = None,
    base: PathLike | None = None,
    trust_remote_code: bool = False,
    base_weights: str = "original",
    dtype: str = "keep",
    max_kl: float = 0.01,
    max_changed: str | float = "1%",
    overwrite: bool = False,
    progress: Progress = "auto",
) -> Merged:
    """Fold an adapter into its base, or several adapters into one. The result is compared with base + adapter.

    Args:
        adapter: a run, or a folder; or several of them.
        into: "base" or "adapter"; by default one adapter goes into its base, several into one adapter.
        out: a new folder; by default `merged` inside the run, for one adapter.
        method: how several adapters are combined: "exact", "linear", "ties", "dare" or "svd".
        set: options of the method.
        weights: one for each adapter; by default 1 each.
        budget: size of the combined adapter.
        density: share of the entries that "ties" and "dare" keep.
        seed: of "dare".
        at_step: of a T-LoRA: the timestep at which it is merged.
        base, trust_remote_code: as of `prune`.
        base_weights: of an adapter trained on a quantized base: add to its weights as they were ("original") or as
            training saw them ("dequantized").
        dtype: of the merged model: "keep", "float32", "bfloat16" or "float16".
        max_kl: nats per token by which the merged model may differ from base + adapter.
        max_changed: share of choices that may change, beyond what rounding to the stored type explains.
        overwrite, progress: as of `prune`.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked

    how: dict[str, Any] = {"into": into, "out": as_path(out), "method": method, "options": asked.settings(set)}
    how |= {"weights": weights, "budget": budget, "density": density, "seed": seed, "at_step": at_step}
    how |= {"base": as_text(base), "trust_remote_code": trust_remote_code, "base_weights": base_weights, "dtype": dtype}
    how |= {"max_kl": max_kl, "max_changed": max_changed, "overwrite": overwrite}
    folders = results.folders_of(adapter)
    summary, notes = done(lambda: asked.merge(folders, **how), progress)
    return results.Merged(summary, notes, Path(summary["output_dir"]))


@checked
def export(
    adapter: Adapter | None = None,
    *,
    to: str,
    out: PathLike,
    library: PathLike | None = None,
    set: Settings = None,
    base: PathLike | None = None,
    trust_remote_code: bool = False,
    outtype: str = "f16",
    dtype: str | None = None,
    max_kl: float | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    overwrite: bool = False,
    progress: Progress = "auto",
) -> Exported:
    """Write an adapter in the form that another tool reads, and check it there.

    Args:
        adapter: a run, or a folder.
        to: "peft", "uniform", "vllm", "sglang", "tgi", "lorax", "mlx", "gguf", "ollama", "merged", "merged-gguf"
            or "packed"; of a library "vllm-library".
        out: a new folder.
        library: all adapters of a library, in place of one adapter.
        set: options of the form.
        outtype: number format of a GGUF model: "f32", "f16" or "q8_0", or one that llama.cpp's own quantizer writes,
            such as "q4_k_m".
        dtype: number format of the factors, where the form's reader takes it: "float32", "bf16" or "fp8".
        max_kl: nats per token by which the export may differ; by default 0.01, 0.1 for "q8_0", 0.5 for 4 bits.
        push_to_hub: ORG/NAME of a repository of the hub to which the files and a card are sent.
        public: everybody may see it there; else it is private.
        base, trust_remote_code, overwrite, progress: as of `prune`.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked

    how: dict[str, Any] = {"library": as_path(library), "options": asked.settings(set), "base": as_text(base)}
    how |= {"trust_remote_code": trust_remote_code, "outtype": outtype, "max_kl": max_kl, "overwrite": overwrite}
    how |= {"push_to_hub": push_to_hub, "public": public, "dtype": dtype}
    folder = None if adapter is None else results.folder_of(adapter)
    summary, notes = done(lambda: asked.export(to, Path(out), adapter=folder, **how), progress)
    return results.Exported(summary, notes, Path(out))


@checked
def evaluate(
    adapter: Adapter | Sequence[Adapter] | None = None,
    *,
    recipe: PathLike | None = None,
    data: PathLike | None = None,
    also: Mapping[str, PathLike] | None = None,
    base: PathLike | None = None,
    trust_remote_code: bool = False,
    no_base: bool = False,
    max_samples: int | None = None,
    generate: int | None = None,
    samples: int = 0,
    tasks: Sequence[str] | str = (),
    limit: int | None = None,
    allow_template_mismatch: bool = False,
    progress: Progress = "auto",
) -> Evaluation:
    """Measure adapters and their base on held-out rows.

    Args:
        adapter: a run, or a folder; or several of them; or a recipe file, which means the run that it made. None: the
            newest run below `./out`.
        recipe: measure on its held-out rows.
        data: other rows: all of a file, or a recipe's held-out ones. By default the first run's own held-out rows.
        also: further files by name: what was forgotten of them, against the base.
        no_base: do not measure the base model.
        max_samples: rows at most.
        generate: prompts to answer for BLEU and others; 0: none; by default 32, where the packages are there.
        samples: answers to show side by side.
        tasks: of lm-eval-harness: names or .yaml files; `limit` documents of each at most.
        allow_template_mismatch: measure with another chat template than in training.
        base, trust_remote_code, progress: as of `prune`.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked_eval
    from dynlora_cli.config.arguments import place
    from dynlora_cli.config.load import RECIPES
    from dynlora_cli.evaluation.thresholds import Thresholds

    folders = [] if adapter is None else results.folders_of(adapter)
    rows = None if recipe is None else Path(place("recipe", recipe))
    if rows is None and len(folders) == 1 and folders[0].suffix.lower() in RECIPES:
        rows = folders.pop()
    how: dict[str, Any] = {
        "data": as_path(data),
        "also": {name: Path(file) for name, file in (also or {}).items()},
    }
    how |= {"base": as_text(base), "trust_remote_code": trust_remote_code, "with_base": not no_base}
    how |= {"max_samples": max_samples, "generate": generate, "samples": samples, "limit": limit}
    how |= {"tasks": ",".join(tasks) or None}
    how |= {"allow_template_mismatch": allow_template_mismatch, "thresholds": Thresholds()}

    def work() -> Work:
        measure = asked_eval.evaluate(rows, folders, **how)
        return lambda emit: measure(lambda text: emit({"event": "progress", "text": text}))

    return results.Evaluation(*done(work, progress))


@checked
def inspect(adapter: Adapter | Sequence[Adapter]) -> Inspection:
    """What an adapter is made of: ranks, sizes, spectra, where it comes from. Two are put side by side."""
    from dynlora_cli.api import results
    from dynlora_cli.cli import asked

    return results.Inspection(*done(lambda: asked.inspect(results.folders_of(adapter)), None))


@checked
def load(adapter: Adapter, *, base: PathLike | None = None, trust_remote_code: bool = False) -> Loaded:
    """A base with an adapter in memory, to be asked; a context manager, or `close()` it.

    Args:
        adapter: a run, or a folder, or any PEFT LoRA folder.
        base, trust_remote_code: as of `prune`.
    """
    from dynlora_cli.api import results
    from dynlora_cli.cli import faults
    from dynlora_cli.commands import preflight

    with faults.translated():
        folder, name = results.folder_of(adapter), as_text(base)
        preflight.adapters([folder], name)
        from dynlora_cli.api.loaded import Loaded

        return Loaded.open(folder, name, trust_remote_code)


def __getattr__(name: str) -> Any:
    if name in ("attach", "DynamicRankCallback"):  # they need torch
        from dynlora_cli import trainers

        return getattr(trainers, name)
    if name == "rank_by_timestep":
        from dynlora_cli.adapters.images.pipeline import rank_by_timestep

        return rank_by_timestep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
