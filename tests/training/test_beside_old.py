"""Options for going on from an adapter without disturbing it: O-LoRA's penalty, and InfLoRA's start."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny_run import assembled, make_recipe, train, write_rows

from dynlora_cli import plugins
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import RecipeError, UsageError
from dynlora_cli.execution.mode import plan
from dynlora_cli.lora.orthogonality import overlap
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training import components
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.setup import make_accelerator, read_base, read_data

INFLORA = ("adapter.init_weights=inflora", "adapter.freeze_a=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with v1, which stands for what was learned earlier. Not to be changed."""
    made = tmp_path_factory.mktemp("beside")
    train(make_recipe(made, "train.learning_rate=2e-2", out="v1"))
    return made


def second(folder: Path, *overrides: str, out: str):
    """A recipe that goes on from v1, with other rows."""
    rows = folder / "other.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} + {i} = ", "completion": str(2 * i)}) + "\n" for i in range(40))
    )
    where = f"adapter.from={folder / 'v1'}", f"dataset.train=[{{path: {rows}}}]"
    return make_recipe(folder, *where, "adapter.old=freeze", "rank.budget=6", *overrides, out=out)


def overlaps(path: Path) -> float:
    """Σ |cos| between old and new rows of A, over all layers."""
    adapter = read_adapter(path)
    return sum(overlap(factors.a_CI, factors.born[0]).item() for factors in adapter.layers.values())


@pytest.mark.slow
def test_the_penalty_keeps_new_directions_away_from_old_ones(folder: Path):
    found = {}
    for weight in (0, 0.5):
        recipe = second(folder, f"adapter.orthogonality={weight}", "train.learning_rate=2e-2", out=f"o{weight}")
        summary, _ = train(recipe)
        found[weight] = overlaps(Path(recipe.output_dir))
        assert summary["loss_after"] < summary["loss_before"]
    assert found[0.5] < 0.3 * found[0]


def test_the_penalty_is_no_part_of_what_components_are_scored_by(folder: Path):
    """Along a row the penalty does not change, so it adds nothing to a component's gate gradient."""
    pool = begun(second(folder, "adapter.orthogonality=0.5", out="scores"))[1]
    with torch.no_grad():
        pool.values.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    pool.penalty().backward()
    assert pool.values.grad.abs().max() > 0.01
    assert pool.gate_gradient_K().abs().max() < 1e-5


@pytest.mark.parametrize("old", ["tune", "freeze", "magnitudes"])
def test_the_penalty_is_of_directions_whatever_becomes_of_the_old_components(old: str, folder: Path):
    pool = begun(second(folder, "adapter.orthogonality=0.5", f"adapter.old={old}", out="old"))[1]
    with torch.no_grad():
        for layer in pool.layers.values():
            layer.a_CI[layer.old :, : layer.in_features] += 0.1
    rows = [(layer.a_CI[:, : layer.in_features], layer.old) for layer in pool.layers.values()]
    assert pool.penalty().item() == pytest.approx(0.5 * sum(overlap(*each).item() for each in rows), rel=1e-5) != 0


def test_without_old_components_there_is_no_penalty(folder: Path):
    assert assembled(make_recipe(folder, out="alone")).trained.penalty() is None


def begun(recipe):
    """The data, and the components that a run begins with."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # as a run does; pytest puts the filters back
    modes = plan(recipe.train).for_short_runs()
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, accelerator.device, modes)
    pool, _ = components.begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    return data, pool, base, recipe


def heard(begun_run, rows) -> float:
    """What new components hear of rows, as a share of what the layers are sent: Σ‖A x‖² / Σ‖x‖², of unit rows of A."""
    _, pool, base, recipe = begun_run
    sums = torch.zeros(2, dtype=torch.float64)

    def look(layer, inputs):
        x = inputs[0].detach().double().flatten(0, -2)
        a_CI = layer.a_CI.detach().double()[layer.old :]
        unit_CI = a_CI / a_CI.norm(dim=1, keepdim=True)
        sums.add_(torch.stack([(x @ unit_CI.T).square().sum() / len(unit_CI), x.square().sum()]))

    handles = [layer.register_forward_pre_hook(look) for layer in pool.layers.values()]
    batches = make_batches(recipe, rows, base, shuffle=False)
    with torch.no_grad():
        for index in range(batches.steps_per_epoch):
            for batch in batches.step(0, index):
                length = int(batch.inputs["attention_mask"].sum(1).min())  # no padding
                base.model(input_ids=batch.inputs["input_ids"][:, :length])
    for handle in handles:
        handle.remove()
    return (sums[0] / sums[1]).item()


@pytest.mark.slow
def test_new_components_are_silent_on_earlier_rows(folder: Path):
    earlier = read_data(make_recipe(folder, out="v1"), BaseFiles.find(make_recipe(folder, out="v1").model)).train
    plain, silent = begun(second(folder, out="plain")), begun(second(folder, *INFLORA, out="silent"))
    assert any("inflora: what earlier rows send into a layer spans" in note for note in silent[0].notes)
    assert heard(silent, earlier) < 0.25 * heard(plain, earlier)
    assert heard(silent, silent[0].train) > 1.5 * heard(silent, earlier)


@pytest.mark.slow
def test_a_whole_run_with_inflora_leaves_a_where_it_began_and_the_old_ones_as_they_were(folder: Path):
    recipe = second(folder, *INFLORA, "train.learning_rate=2e-2", out="inflora")
    summary, _ = train(recipe)
    assert summary["loss_after"] < summary["loss_before"]
    before, after = read_adapter(folder / "v1"), read_adapter(Path(recipe.output_dir))
    start = begun(recipe)[1]
    for name, factors in after.layers.items():
        old = factors.born[0]
        if old == before.ranks.get(name):
            assert torch.equal(factors.a_CI[:old], before.layers[name].a_CI)
            assert torch.equal(factors.b_OC[:, :old], before.layers[name].b_OC)
        layer = start.layers[name]
        directions = torch.linalg.qr(layer.a_CI.detach()[layer.old :].T)[0]
        new = factors.a_CI[old:]
        assert (new - new @ directions @ directions.T).norm() <= 1e-4 * new.norm(), "turned among themselves alone"


def test_changed_rows_of_the_earlier_run_are_refused(tmp_path: Path):
    train(make_recipe(tmp_path, out="v1"))
    recipe = second(tmp_path, *INFLORA, out="v2")
    write_rows(tmp_path / "llama.jsonl", 20)
    with pytest.raises(UsageError, match="v1 cannot be used again"):
        begun(recipe)


REFUSED = [
    (["adapter.orthogonality=0.5"], "adapter.from"),
    (["adapter.init_weights=inflora", "adapter.freeze_a=true"], "adapter.from"),
    (["adapter.init_weights=inflora", "adapter.from=v1"], "freeze_a: true"),
    (["adapter.orthogonality=0.5", "adapter.freeze_a=true", "adapter.from=v1"], "turns A, which does not train"),
    (["adapter.orthogonality=-1", "adapter.from=v1"], "orthogonality"),
    (["adapter.variant=dora", *INFLORA, "adapter.from=v1"], "dora"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_does_not_go_together(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(RecipeError) as error:
        make_recipe(tmp_path, *overrides)
    assert message in error.value.message
