"""What stands in the root of a run's folder: an adapter, a router with adapters, a hypernetwork, or a whole model."""

from __future__ import annotations

from pathlib import Path

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN, TokenRows
from dynlora_cli.adapters.find import CONFIG, HYPERNET, HYPERNET_WEIGHTS, ROUTER
from dynlora_cli.adapters.images.beside import write_beside
from dynlora_cli.adapters.images.names import PARTS
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import MEMBERS, write_routed
from dynlora_cli.adapters.write import write_pool
from dynlora_cli.adapters.xlora import METHOD as XLORA
from dynlora_cli.adapters.xlora import write_xlora
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.files.whole import remove, sync, sync_all, whole_folder
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.routers.trained import Routed
from dynlora_cli.rounding.floats import changed, rounded
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.training.batches import chose_passes
from dynlora_cli.training.checkpoint import fault_in, read_state, restore
from dynlora_cli.training.hypernets import write_hypernet_of
from dynlora_cli.training.routers import options_of
from dynlora_cli.training.run import Run


def round_off(training: Run, pool: Pool) -> float:
    """Give the components the values that `adapter.save_dtype` has for them; how much of the update that changes.

    Returns:
        ‖ΔW' - ΔW‖ / ‖ΔW‖ over all layers.
    """
    dtype = training.recipe.adapter.save_dtype
    before, after = [], []
    values_P = pool.values.detach().clone()
    for layer, (a_CI, b_OC) in zip(pool.layers.values(), pool.views(values_P), strict=True):
        assert layer.plain
        if layer.count:
            before.append((a_CI.clone(), layer.scale * b_OC))
            after.append(rounded(*before[-1], dtype))
            a_CI.copy_(after[-1][0])
            b_OC.copy_(after[-1][1] / layer.scale)
    pool.adopt(values_P, pool.counts)
    return changed(before, after)


def write_adapter_of(training: Run, pool: Pool, folder: Path, dtype: str = FULL) -> None:
    """Write the adapter as it is now, in PEFT's layout, and the modules that train whole, such as a new head."""
    base, part = training.base, training.base.model.config.model_type
    write_pool(
        pool,
        folder,
        kind=getattr(plugins.load("variants", training.recipe.adapter.variant), "saved_as", PLAIN),
        model_type=part,
        base_model=base.files.reference,
        revision=training.recipe.model.revision,
        task=training.recipe.model.task,
        whole={name: base.model.get_submodule(name) for name in base.whole},
        token_rows={table: TokenRows(own.tokens, own().detach()) for table, own in base.rows.items()},
        dtype=dtype,
    )
    if part in PARTS:
        write_beside(read_adapter(folder), folder, part, dtype)


def settle_root(folder: Path, training: Run) -> str:
    """Bring the run to what its root is to hold: the best state where early stopping is on or the run chose its length.

    Returns:
        "best" or "last".
    """
    several = chose_passes(training.recipe.train) and training.total_steps > training.batches.steps_per_epoch
    keeps = several or training.recipe.eval.early_stopping_patience is not None
    best = run_folder.pointed(folder, "best") if keeps else None
    if best is not None and (fault := fault_in(best, run_folder.read_record(folder))):
        training.note(f"{best} {fault}; the adapter is that of the last step instead")
        best = None
    if best is not None:
        position, tensors = read_state(best)
        with training.random:  # a checkpoint holds random states, too
            restore(tensors, training.parameters, training.optimizer)
        training.trained.stand_after(position["progress"]["step"], training.total_steps)
    return "last" if best is None else "best"


def write_root(folder: Path, training: Run) -> None:
    """Adapter (or model) and tokenizer in the root of the run folder."""
    if training.accelerator.is_main_process:
        training.base.tokenizer.save_pretrained(folder)
        limits = training.recipe.dataset.max_length, training.base.files.context_length
        training.task.beside(folder, training.model, min(limit for limit in limits if limit))
        if isinstance(training.trained, Pool):
            _put_adapter(training, training.trained, folder)
        elif isinstance(training.trained, Routed):
            _put_router(training, training.trained, folder)
        elif isinstance(training.trained, Generated):
            _put_hypernet(training, training.trained, folder)
        else:
            training.model.save_pretrained(folder)
        for path in folder.iterdir():
            if path.is_file():
                sync(path)
        sync(folder)


def _put_adapter(training: Run, pool: Pool, folder: Path) -> None:
    """Write the adapter beside a run's root and move it there, its config last."""
    with whole_folder(folder / "adapter") as temporary:
        write_adapter_of(training, pool, temporary, training.recipe.adapter.save_dtype)
    (folder / CONFIG).unlink(missing_ok=True)  # so that no old one stands beside new weights
    for path in sorted((folder / "adapter").iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(folder / path.name)
    (folder / "adapter").rmdir()


def _put_hypernet(training: Run, generated: Generated, folder: Path) -> None:
    """Write the network beside a run's root and move its files there, the one that names the other last."""
    with whole_folder(folder / "hypernet") as temporary:
        write_hypernet_of(temporary, training, generated)
    (folder / HYPERNET).unlink(missing_ok=True)
    for name in (HYPERNET_WEIGHTS, HYPERNET):
        (folder / "hypernet" / name).replace(folder / name)
    (folder / "hypernet").rmdir()


def _put_router(training: Run, routed: Routed, folder: Path) -> None:
    """Write the router and its adapters beside a run's root and move them there, what names them all last."""
    with whole_folder(folder / "router") as temporary:
        method, tensors, values = training.recipe.adapter.variant, routed.gates.tensors(), options_of(training.recipe)
        if method == XLORA:
            write_xlora(temporary, folder, values, routed.members, tensors, routed.gates.hidden)
        else:
            write_routed(temporary, method, values, routed.members, tensors)
    for name in (ROUTER, CONFIG, MEMBERS):
        remove(folder / name)
    for path in sorted((folder / "router").iterdir(), key=lambda path: path.name in (ROUTER, CONFIG)):
        path.replace(folder / path.name)
    (folder / "router").rmdir()
    sync_all(folder / MEMBERS)
