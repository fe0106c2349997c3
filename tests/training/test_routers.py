"""Runs that train a router over a library: the adapters stay as they are, and everything else goes as in any run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import NAMES, lines, make_library, make_recipe, router_recipe, train, write_rows_of

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import RoutedAdapter
from dynlora_cli.commands import dry_run
from dynlora_cli.errors import Interrupted, RecipeError, UsageError

from recipe_helpers import MINIMAL, problems

ROUTERS = ("phatgoose", "x-lora", "mole", "moa")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_library(folder)
    return folder


@pytest.fixture
def own(library: Path, tmp_path: Path) -> Path:
    """A folder of this test's own, with the library in it."""
    for path in library.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers that trained."""
    file = folder / "router.safetensors"
    return load_file(file if file.is_file() else folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTERS)
def test_a_router_learns_and_its_adapters_stay_as_they_are(library: Path, variant: str) -> None:
    summary, _ = train(router_recipe(library, variant, out=variant))
    assert summary["loss_after"] < summary["loss_before"]
    router = read_adapter(library / variant, routed=True)
    assert isinstance(router, RoutedAdapter)
    assert list(router.members) == list(NAMES)
    assert summary["parameters"] == router.own_parameters
    for name, member in router.members.items():
        before = read_adapter(library / name)
        assert member.layers.keys() == before.layers.keys()
        for layer, factors in before.layers.items():
            assert torch.equal(member.layers[layer].a_CI, factors.a_CI)
            assert torch.equal(member.layers[layer].b_OC, factors.b_OC)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose adapters have learned enough to differ: each reaches 2.5 to 3 nats on its own rows."""
    folder = tmp_path_factory.mktemp("apart")
    make_library(folder, "train.max_steps=60", "train.learning_rate=2e-2")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "share"), [("mole", 0.95), ("moa", 0.85), ("x-lora", 0.85)])
def test_where_rows_need_one_adapter_each_a_router_beats_an_equal_share_of_all(
    apart: Path, variant: str, share: float
) -> None:
    recipe = router_recipe(apart, variant, "train.max_steps=60", "train.learning_rate=5e-2", out=variant)
    summary, _ = train(recipe)  # the numbers of mole and moa begin at 0, so all adapters begin alike
    assert summary["loss_after"] < share * summary["loss_before"]


@pytest.mark.slow
def test_adapters_of_other_kinds_are_weighed_by_moa_alone(own: Path) -> None:
    rows = write_rows_of(own, "fours")
    for kind in ("dora", "hira"):
        train(make_recipe(own, f"dataset.train=[{rows}]", f"adapter.variant={kind}", out=kind))
    library = json.dumps([str(own / name) for name in ("ones", "dora", "hira")])
    summary, _ = train(router_recipe(own, "moa", f"adapter.library={library}", "adapter.sparse=true"))
    assert summary["loss_after"] < summary["loss_before"]
    router = read_adapter(own / "router", routed=True)
    assert isinstance(router, RoutedAdapter)
    assert [member.kind for member in router.members.values()] == ["LoRA", "DoRA", "HiRA"]
    with pytest.raises(UsageError, match="dora is a DoRA, and this router weighs plain LoRAs") as caught:
        train(router_recipe(own, "mole", f"adapter.library={library}", out="refused"))
    assert "moa" in str(caught.value.hint)


@pytest.mark.parametrize(
    "variant", ["phatgoose", *(pytest.param(v, marks=pytest.mark.slow) for v in ROUTERS if v != "phatgoose")]
)
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_it_would_have(library: Path, variant: str) -> None:
    through, broken = (router_recipe(library, variant, out=f"{variant}-{name}") for name in ("through", "broken"))
    train(through)
    with pytest.raises(Interrupted):
        train(broken, interrupt_at=6)
    train(broken, resume=True)
    folders = [Path(recipe.output_dir) for recipe in (through, broken)]
    one, two = (numbers(folder) for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[line for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in folders]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTERS)
@pytest.mark.parametrize("setting", ["train.gradient_checkpointing=true", "train.fused=false"])
def test_how_a_step_is_run_does_not_change_what_is_learned(library: Path, variant: str, setting: str) -> None:
    plain, _ = train(router_recipe(library, variant, "train.max_steps=3", out=f"{variant}-plain"), overwrite=True)
    other, _ = train(router_recipe(library, variant, "train.max_steps=3", setting, out=f"{variant}-o"), overwrite=True)
    assert other["loss_after"] == pytest.approx(plain["loss_after"], rel=1e-4)


@pytest.mark.slow
def test_the_best_is_kept_where_stopping_is_early(library: Path) -> None:
    recipe = router_recipe(
        library, "phatgoose", "eval.early_stopping_patience=1", "train.learning_rate=auto", out="best"
    )
    summary, events = train(recipe)
    assert summary["adapter"] == "best"
    best = min(event["loss"] for event in events if event["event"] == "eval" and event["step"])
    assert summary["loss_after"] == best


def test_it_does_not_go_on_with_another_adapter(own: Path) -> None:
    recipe = router_recipe(own, "phatgoose", "dataset=" + json.dumps(sources(own)))
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    shutil.rmtree(own / "ones")
    shutil.copytree(own / "twos", own / "ones")
    record = json.loads((own / "ones/dynlora.json").read_text())
    (own / "ones/dynlora.json").write_text(json.dumps(record | {"name": "ones"}))
    with pytest.raises(UsageError, match="ones is not the adapter that the run began with"):
        train(recipe, resume=True)


@pytest.mark.parametrize("names", [NAMES[::-1], (*NAMES, "fours")])
def test_a_library_that_was_reordered_or_has_grown_is_another_one(own: Path, names: tuple[str, ...]) -> None:
    """Of files, so that the rows stay the same."""
    library = own / "lib"
    for name, source in zip([*NAMES, "fours"], [*NAMES, "ones"], strict=True):
        shutil.copytree(own / source, library / "adapters" / name)
    overrides = (f"adapter.library=[{library}]", "dataset=" + json.dumps(sources(own)), "train.save_steps=3")
    (library / "library.json").write_text(json.dumps({"entries": [{"name": name} for name in NAMES]}))
    recipe = router_recipe(own, "moa", *overrides)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=7)
    (library / "library.json").write_text(json.dumps({"entries": [{"name": name} for name in names]}))
    with pytest.raises(UsageError, match="ones, twos, threes in this order; now they are"):
        train(recipe, resume=True)


def sources(folder: Path) -> dict[str, Any]:
    return {"train": [{"path": str(write_rows_of(folder, name))} for name in NAMES]}


def test_sources_belong_to_the_adapters_in_their_order(own: Path) -> None:
    recipe = router_recipe(own, "phatgoose", "dataset=" + json.dumps(sources(own)), "train.max_steps=1")
    _, events = train(recipe)
    notes = next(event for event in events if event["event"] == "start")["notes"]
    assert any("ones.jsonl for ones" in note and "threes.jsonl for threes" in note for note in notes)
    fewer = {"train": sources(own)["train"][:2]}
    with pytest.raises(UsageError, match="there are 2 sources for 3 adapters") as caught:
        train(router_recipe(own, "phatgoose", "dataset=" + json.dumps(fewer), out="fewer"))
    assert "builtin:library" in str(caught.value.hint)


def test_rows_of_own_runs_must_be_known_and_as_they_were(own: Path) -> None:
    record = json.loads((own / "ones/dynlora.json").read_text())
    record["data"]["sha256"], before = "0" * 64, record["data"]["sha256"]
    (own / "ones/dynlora.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"builtin:library: ones: .* have changed since then"):
        train(router_recipe(own, "phatgoose"))
    record["data"]["sha256"] = before
    (own / "ones/dynlora.json").write_text(json.dumps(record))
    (own / "twos/dynlora.json").unlink()
    with pytest.raises(UsageError, match=r"builtin:library: twos: .* made by another tool"):
        train(router_recipe(own, "phatgoose"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rank.budget=4"], "rank.budget"),
        (["pruning.policy=magnitude"], "pruning.policy"),
        (["adapter.target_modules=qv"], "adapter.target_modules"),
        (["adapter.dropout=0.1"], "adapter.dropout"),
        (["train.compile=true"], "train.compile"),
        (["dataset.packing=true"], "dataset.packing"),
        (["dataset.max_length=64"], "dataset.max_length"),
        (["adapter.library=null"], "adapter.library"),
        (["model.task=sequence-classification"], "model.task"),
    ],
)
def test_settings_that_mean_nothing_to_a_router_are_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        router_recipe(tmp_path, "phatgoose", *overrides)
    assert any(words in problem for problem in caught.value.problems)


def test_the_rows_of_a_library_need_one() -> None:
    found = "\n".join(problems(MINIMAL, "dataset=builtin:library"))
    assert "builtin:library stands for rows of adapters named there" in found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTERS)
def test_a_dry_run_shows_the_adapters_and_estimates_the_memory(library: Path, variant: str) -> None:
    plan = dry_run.plan(router_recipe(library, variant, out="planned"))
    assert {f"adapter {name}" for name in NAMES} <= plan["parameters"].keys()
    assert 0 < plan["memory"]["adapter"] < 1 << 20


def test_a_library_folder_stands_for_all_that_is_in_it(own: Path) -> None:
    (own / "lib/adapters").mkdir(parents=True)
    for name in NAMES:
        shutil.copytree(own / name, own / "lib/adapters" / f"the-{name}", ignore=shutil.ignore_patterns("checkpoints"))
    entries = [{"name": f"the-{name}"} for name in NAMES]
    (own / "lib/library.json").write_text(json.dumps({"entries": entries}))
    train(router_recipe(own, "moa", f"adapter.library=[{own / 'lib'}]", "train.max_steps=1"))
    router = read_adapter(own / "router", routed=True)
    assert isinstance(router, RoutedAdapter)
    assert list(router.members) == [f"the-{name}" for name in NAMES]
    (own / "lib/library.json").write_text(json.dumps({"entries": [{"name": "../../ones"}]}))
    with pytest.raises(UsageError, match="holds no adapters"):
        train(router_recipe(own, "moa", f"adapter.library=[{own / 'lib'}]", out="other"))


def test_a_router_is_no_adapter_of_another_router_nor_a_start(own: Path) -> None:
    train(router_recipe(own, "moa", "train.max_steps=1"))
    library = json.dumps([str(own / "router"), str(own / "ones")])
    with pytest.raises(UsageError, match="is a router over adapters itself"):
        train(router_recipe(own, "moa", f"adapter.library={library}", out="other"))
    with pytest.raises(UsageError, match="no sum of components"):
        train(make_recipe(own, f"adapter.from={own / 'router'}", out="on"))


def test_one_adapter_is_no_choice(library: Path) -> None:
    recipe = router_recipe(library, "phatgoose", f"adapter.library=[{library / 'ones'}]", out="one")
    with pytest.raises(UsageError, match="there is one adapter, ones, and it takes several"):
        train(recipe)
