"""`dynlora train --dry-run`: what a run would do, found without loading weights and without writing anything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.config.load import to_yaml
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data
from dynlora_cli.data.mix import each_once, mix_on_record
from dynlora_cli.data.rows.sequences import joined, longest_of
from dynlora_cli.decoding import prefix
from dynlora_cli.execution import mode as execution
from dynlora_cli.lora.start import Start
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.load import Base, quantized_to, resolve_dtype
from dynlora_cli.models.pipelines.find import needs_pipeline
from dynlora_cli.models.quiet import quiet
from dynlora_cli.pruning.bytes_budget import room_of
from dynlora_cli.pruning.schedule import Schedule
from dynlora_cli.tasks import objective as objectives
from dynlora_cli.tasks.distillation import Distilled
from dynlora_cli.training.batches import passes_note, total_steps, training_batches
from dynlora_cli.training.before.lessons import Reading, largest_reading
from dynlora_cli.training.components import attach, left_out, plan_ranks
from dynlora_cli.training.hypernets import plan_layers, plan_net
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.memory_estimate import measure
from dynlora_cli.training.origin import Begun, read_origin, tell
from dynlora_cli.training.routers import begin_router, read_members
from dynlora_cli.training.setup import make_schedule, read_base, read_data, why_unpruned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.lora.whole import Trained


@quiet
def plan(recipe: Recipe) -> dict[str, Any]:
    """What `train.run` would do.

    Returns:
        recipe_yaml, example, modules, parameters, file, schedule, steps, data, memory and notes; see cli/views/plan.py.
    """
    modes = execution.plan(recipe.train).for_short_runs()
    files = BaseFiles.find(recipe.model, planning=True)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("meta"), modes)
    batches = training_batches(recipe, data, base)
    steps = total_steps(recipe, batches)
    data.notes += passes_note(recipe.train, batches, watched=bool(data.val))
    found: dict[str, Any] = {
        "recipe_yaml": to_yaml(recipe),
        "example": show_example(data.train[0], files.tokenizer, data.labels),
        "parameters": {"base": base.model.num_parameters()},
        "modules": [],
        "schedule": [],
        "steps": steps,
        "data": {"counts": data.counts, "sha256": data.sha256, **_mix(data)},
        "notes": data.notes,
    }
    if plugins.declared("variants", recipe.adapter.variant, "routes"):
        members = read_members(recipe, base)
        found["parameters"].update({f"adapter {name}": member.parameters for name, member in members.items()})
        return found | _memory(recipe, base, data, modes, members=members)
    if plugins.declared("variants", recipe.adapter.variant, "hypernet"):
        return found | _hypernet(recipe, base, data)
    if not plugins.load("variants", recipe.adapter.variant).has_components:
        return found | _memory(recipe, base, data, modes)
    data.notes += left_out(base, recipe.adapter)
    begun = read_origin(recipe, base, data)
    targets, start = plan_ranks(recipe.adapter, recipe.rank, base, begun)
    data.notes += tell(begun, start, recipe) if begun else []
    if recipe.rank.allocation != "uniform":
        data.notes.append(f"rank.allocation: {recipe.rank.allocation} needs the model's data; shown is uniform")
    found["modules"] = [
        dict(
            zip(("name", "d_in", "d_out", "components"), (name, *linear_shape(module), start.counts[name]), strict=True)
        )
        for name, module in targets.items()
    ]
    found["parameters"].update(start=start.parameters, budget=start.limit)
    found |= _file(recipe, base, targets, start)
    if base.rows:
        new = found["parameters"]["new token"] = sum(rows.own_TI.numel() for rows in base.rows.values())
        found["parameters"]["base"] -= new
    data.notes += why_unpruned(steps, start)
    found["schedule"] = _planned_events(recipe, steps, start, make_schedule(recipe, steps, start))
    return found | _memory(recipe, base, data, modes, begun)


def _hypernet(recipe: Recipe, base: Base, data: Data) -> dict[str, Any]:
    """What a run would train that learns to write adapters, and how large one of these may be."""
    data.notes += left_out(base, recipe.adapter)
    start, net = plan_layers(recipe, base), plan_net(recipe, base)
    layers = [dict(zip(("name", "d_in", "d_out", "components"), place[:4], strict=True)) for place in net.places]
    numbers = {"base": base.model.num_parameters(), "network": net.parameter_count, "written adapter": start.budget}
    data.notes.append("memory was not estimated: it is not known yet what the network needs beside the base")
    return {"modules": layers, "parameters": numbers, "notes": data.notes}


def _file(recipe: Recipe, base: Base, targets: Mapping[str, nn.Module], start: Start) -> dict[str, Any]:
    """The adapter's file at the budget, at most; nothing where its size is no function of the parameters."""
    options, dtype = recipe.adapter, recipe.adapter.save_dtype
    if start.limit is None or options.names_experts or not plugins.declared("variants", options.variant, "rounds"):
        return {}
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    form = getattr(plugins.load("variants", options.variant), "saved_as", PLAIN)
    room = room_of(start, base, shapes, form, dtype)
    return {"file": {"dtype": dtype, "bytes": room.at_most(min(start.limit, start.parameters))}}


def _mix(data: Data) -> dict[str, Any]:
    """What an epoch is made of, where it has not every row once."""
    found: dict[str, Any] = {} if each_once(data.spans) else {"mix": mix_on_record(data.spans)}
    return found | ({"replay": data.replay} if data.replay else {})


def _memory(
    recipe: Recipe,
    base: Base,
    data: Data,
    modes: execution.Modes,
    begun: Begun | None = None,
    members: Mapping[str, Adapter] | None = None,
) -> dict[str, Any]:
    """The memory that the run will need, or a note why nobody knows; `base` is used up.

    Args:
        recipe, base, data, modes: of the run.
        begun: components that are there already.
        members: the adapters that a router learns to choose from.
    """
    if needs_pipeline(recipe.model):
        text = "memory was not estimated: of a pipeline it is not known what its denoiser needs"
        return {"notes": [*data.notes, text]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = replace(base, dtype=resolve_dtype(recipe.model.dtype, device))
    length = recipe.dataset.max_length if recipe.dataset.packing else longest_of(joined(data.train, data.replayed))
    lines = 1 if data.kind.packs else max(len(example.lines) for example in data.train)  # of a row
    part = getattr(recipe.model, "mini_batch_size", None)  # lines that a task has in memory at a time
    rows = recipe.train.micro_batch_size * lines
    ids = (min(rows, part or rows), length)

    def trained() -> Trained:
        if members is not None:
            what: Trained = begin_router(recipe, base, data, device, members)
        else:
            what, _ = attach(base, recipe.adapter, recipe.rank, recipe.seed, begun)
        modes.apply(base.model, what)
        return what

    try:
        need = measure(base, trained, recipe.model, device, ids, recipe.train.optimizer, _reading(recipe, base, data))
    except (RuntimeError, NotImplementedError) as error:  # an operation of the model that needs numbers
        return {"notes": [*data.notes, f"memory was not estimated: {str(error).strip().splitlines()[0]}"]}
    found: dict[str, Any] = {"memory": need.as_dict()}
    if recipe.train.shard_base:
        data.notes.append("train.shard_base: the memory is that of a base which nobody shares; --devices N divide it")
    if not need.teacher_fits:
        data.notes.append("what the teacher reads at once may not fit into memory: give rows with shorter contexts")
    if need.rows > need.most_rows:
        most = need.most_rows if part else need.most_rows // lines
        size = "model.mini_batch_size" if part else "train.micro_batch_size"
        steps = [f"lower {size} to {most}"] if most else []
        if not recipe.train.gradient_checkpointing:
            steps.append("set train.gradient_checkpointing: true")
        if not quantized_to(recipe.model) and not base.files.quantization:
            steps.append("set model.load_in_4bit: true")
        advice = ", ".join([*steps, "lower dataset.max_length"])
        found["notes"] = [*data.notes, f"this may not fit into memory: {advice}"]
    return found


def _reading(recipe: Recipe, base: Base, data: Data) -> Reading | None:
    """What a teacher reads at once before the first step; None: the run has none."""
    objective = objectives.of(recipe.train)
    if not isinstance(objective, Distilled) or not objective.share:
        return None
    lessons = list(objective.lessons([*data.train, *data.replayed]))
    return largest_reading(lessons, share=prefix.can_share(base.model)) if lessons else None


def _planned_events(recipe: Recipe, steps: int, start: Start, schedule: Schedule) -> list[dict[str, Any]]:
    """The parameters and the average rank alive after each event, and the learning rate that follows them."""
    highest = None if recipe.train.learning_rate == "auto" else recipe.train.learning_rate
    alive = [(0, start.parameters), *zip(schedule.steps, schedule.targets, strict=True)]
    return [
        {
            "step": step,
            "parameters": parameters,
            "rank": start.rank_of(parameters),
            "learning_rate": highest
            and highest
            * rate_share(step + 1, steps, recipe.train)
            * (start.parameters / parameters) ** recipe.pruning.lr_coupling,
        }
        for step, parameters in alive
    ]
