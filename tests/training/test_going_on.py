"""Going on from an adapter: what the run begins with, what stays, what is pruned, and what is on record."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import make
from tiny_run import lines, make_recipe, model_folder, train
from transformers import AutoModelForCausalLM

from dynlora_cli import plugins
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands.dry_run import plan as dry_run
from dynlora_cli.data.vocabulary import sha256_of_text
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.execution.mode import plan
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.components import begin
from dynlora_cli.training.origin import read_origin, template_notes
from dynlora_cli.training.setup import make_accelerator, read_base, read_data

# PEFT's forms of a scale and of ranks.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 10, r"layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"r": 3, "target_modules": "all-linear", "use_dora": True},
}


def foreign(folder: Path, form: str) -> Path:
    """An adapter of PEFT's on tiny_run's Llama, with a B that is not zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder(folder)), LoraConfig(**FORMS[form]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / form)
    return folder / form


def second(folder: Path, *overrides: str, origin: str = "v1", out: str = "v2", **options: Any):
    return make_recipe(folder, f"adapter.from={folder / origin}", *overrides, out=out, **options)


def begun(recipe: Any):
    """Base, data, components and start of a run."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # as a run does; pytest puts the filters back
    modes = plan(recipe.train).for_short_runs()
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, accelerator.device, modes)
    pool, start = begin(recipe, plugins.load("variants", "lora"), base, data, accelerator)
    return base, data, pool, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with v1, which has 2 components a layer on average. Not to be changed."""
    made = tmp_path_factory.mktemp("going-on")
    train(make_recipe(made, out="v1"))
    return made


# -- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("old", ["tune", "freeze", "magnitudes"])
@pytest.mark.parametrize("form", ["plain", "rslora", "patterns"])
@torch.no_grad()
def test_the_start_computes_what_peft_computes(tmp_path: Path, form: str, old: str) -> None:
    origin = foreign(tmp_path, form)
    base, _, pool, start = begun(second(tmp_path, f"adapter.old={old}", "rank.init=4", origin=form))
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), origin).double()(ids)
    assert_close_to_truth(base.model(ids).logits, truth.logits, terms=4 * 2 * (32 + 64))
    ranks = read_adapter(origin).ranks
    targets = dict.fromkeys(pool.layers, 4)
    assert start.counts == {name: max(4, ranks.get(name, 0)) for name in targets}
    assert {name: layer.old for name, layer in pool.layers.items()} == {**dict.fromkeys(targets, 0), **ranks}


@torch.no_grad()
def test_old_components_are_in_their_svd_basis_or_untouched(folder: Path) -> None:
    adapter = read_adapter(folder / "v1")
    for old in ("tune", "freeze"):
        _, _, pool, _ = begun(second(folder, f"adapter.old={old}"))
        for name, factors in adapter.layers.items():
            layer, count = pool.layers[name], factors.rank
            a, b = layer.a_CI[:count], layer.b_OC[:, :count]
            if old == "freeze":
                assert torch.equal(a, factors.a_CI)
                assert torch.equal(layer.scale * b, factors.b_OC)
            gram = (a @ a.T).double()
            if old == "tune":
                wanted = gram.diagonal().mean() * torch.eye(count).double()
                assert_close_to_truth(gram, wanted, terms=4 * 64, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["default", "orthogonal", "eva"])
@torch.no_grad()
def test_new_rows_are_orthogonal_to_the_old_ones(folder: Path, start: str) -> None:
    _, _, pool, _ = begun(second(folder, f"adapter.init_weights={start}"))
    _, _, anew, _ = begun(make_recipe(folder, f"adapter.init_weights={start}"))
    for name, layer in pool.layers.items():
        old, new = layer.a_CI[: layer.old].double(), layer.a_CI[layer.old :].double()
        assert not layer.b_OC[:, layer.old :].any()
        if not layer.old:
            continue
        lengths = old.norm(dim=1)[:, None] * new.norm(dim=1)
        cosines = old @ new.T / lengths
        assert_close_to_truth(cosines + 1, torch.ones_like(cosines), terms=32, dtype=torch.float32)
        usual = anew.layers[name].a_CI.norm(dim=1).double()
        if start == "default":
            assert 0.5 * usual.min() < new.norm(dim=1).min() <= new.norm(dim=1).max() < 1.5 * usual.max()
        else:
            gram = new @ new.T
            wanted = usual.mean() ** 2 * torch.eye(len(new)).double()
            assert_close_to_truth(gram, wanted, terms=4 * 64, dtype=torch.float32)


def test_old_layers_outside_the_targets_join_without_new_components(folder: Path) -> None:
    _, data, pool, start = begun(second(folder, "adapter.target_modules=qv", "rank.init=4"))
    old = read_adapter(folder / "v1").ranks
    for name, count in start.counts.items():
        grows = name.endswith(("q_proj", "v_proj"))
        assert count == (max(4, old.get(name, 0)) if grows else old[name])
    assert any("get no new ones" in note for note in data.notes)
    assert list(pool.layers) == [name for name in begun(make_recipe(folder))[2].layers if name in pool.layers]


# -- the run ---------------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> dict[str, list[bytes]]:
    """Every component of an adapter's folder, as bytes, by layer."""
    found = {}
    for name, factors in read_adapter(folder).layers.items():
        pairs = zip(factors.a_CI, factors.b_OC.T, strict=True)
        found[name] = [a.numpy().tobytes() + b.contiguous().numpy().tobytes() for a, b in pairs]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_frozen_components_stay_bit_for_bit(folder: Path, optimizer: str) -> None:
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    out = f"frozen-{optimizer}"
    recipe = second(
        folder, "adapter.old=freeze", "train.weight_decay=0.1", "train.lora_plus_ratio=4",
        f"train.optimizer={optimizer}", out=out,
    )  # fmt: skip
    summary, _ = train(recipe)
    before, after = rows_of(folder / "v1"), rows_of(folder / out)
    left = read_adapter(folder / out).layers
    kept = gone = moved = 0
    for name, factors in left.items():
        count = factors.born[0]
        assert set(after[name][:count]) <= set(before.get(name, ())), name
        kept += count
        gone += len(before.get(name, ())) - count
        moved += factors.born[1]
    assert kept > 0, "the test needs old components that stay"
    assert gone > 0, "and some that go: the budget is for both"
    assert moved > 0
    assert summary["parameters"] <= summary["budget_parameters"]
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["peft_check"]["checked"]


@pytest.mark.slow
def test_of_old_components_the_magnitude_alone_trains(folder: Path) -> None:
    recipe = second(folder, "adapter.old=magnitudes", "train.weight_decay=0.1", out="sized")
    summary, _ = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"]
    before, after = read_adapter(folder / "v1").layers, read_adapter(folder / "sized").layers
    sizes = []
    for name, factors in after.items():
        count = factors.born[0]
        for a, b in zip(factors.a_CI[:count], factors.b_OC.T[:count], strict=True):
            (place,) = (before[name].a_CI == a).all(1).nonzero().flatten()  # A is bit for bit what it was
            was = before[name].b_OC[:, place].double()
            sizes.append((was @ b.double() / (was @ was)).item())
            assert_close_to_truth(b, sizes[-1] * was, terms=8)
    assert sizes
    assert all(size != 1 for size in sizes)
    assert summary["peft_check"]["checked"]


def test_the_first_loss_is_the_old_adapters(folder: Path) -> None:
    before = json.loads((folder / "v1" / "dynlora.json").read_text())["summary"]
    summary, _ = train(second(folder, "train.max_steps=2", out="loss"))
    assert summary["loss_before"] == pytest.approx(before["loss_after"], rel=1e-5)


@pytest.mark.slow
def test_tuned_components_move_and_keep_their_birth(folder: Path) -> None:
    train(second(folder, out="tuned"))
    adapter = read_adapter(folder / "tuned")
    assert sum(factors.born[0] for factors in adapter.layers.values()) > 0
    before, after = rows_of(folder / "v1"), rows_of(folder / "tuned")
    assert not any(set(after[name]) & set(before.get(name, ())) for name in after)
    for factors in adapter.layers.values():  # after the last event each birth was turned by itself
        assert sum(factors.born) == factors.rank


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gradient", "magnitude", "sensitivity"])
def test_every_policy_judges_held_components_too(folder: Path, policy: str) -> None:
    out = f"by-{policy}"
    train(second(folder, "adapter.old=freeze", f"pruning.policy={policy}", out=out))
    before, after = rows_of(folder / "v1"), rows_of(folder / out)
    left = read_adapter(folder / out).layers
    old = sum(factors.born[0] for factors in left.values())
    assert 0 < old < sum(map(len, before.values()))
    assert all(set(after[name][: f.born[0]]) <= set(before.get(name, ())) for name, f in left.items())


@pytest.mark.slow
@pytest.mark.parametrize("old", ["tune", "freeze", "magnitudes"])
def test_a_run_that_was_interrupted_ends_as_the_one_that_was_not(tmp_path: Path, old: str) -> None:
    train(make_recipe(tmp_path, out="v1"))
    train(second(tmp_path, f"adapter.old={old}", out="whole"))
    recipe = second(tmp_path, f"adapter.old={old}", out="parts")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=7)
    shutil.rmtree(tmp_path / "v1")  # the values are in the checkpoint, and the lineage on record
    train(recipe, resume=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256_of(tmp_path / "whole" / file) == sha256_of(tmp_path / "parts" / file)
    assert lines(tmp_path / "whole" / "rank_events.jsonl") == lines(tmp_path / "parts" / "rank_events.jsonl")
    whole, parts = (json.loads((tmp_path / out / "dynlora.json").read_text()) for out in ("whole", "parts"))
    assert [birth["run"] for birth in parts["births"]] == [whole["births"][0]["run"], parts["run_id"]]
    assert {n: layer["born"] for n, layer in whole["layers"].items()} == {
        n: layer["born"] for n, layer in parts["layers"].items()
    }


@pytest.mark.slow
def test_three_versions(folder: Path) -> None:
    train(second(folder, "adapter.old=freeze", out="two"))
    train(second(folder, "adapter.old=freeze", origin="two", out="three"))
    records = [json.loads((folder / out / "dynlora.json").read_text()) for out in ("v1", "two", "three")]
    births = records[2]["births"]
    assert [birth["run"] for birth in births] == [record["run_id"] for record in records]
    assert [birth["old"] for birth in births] == [None, "freeze", "freeze"]
    assert [Path(birth["folder"]).name for birth in births] == ["v1", "two", "three"]
    first, three = rows_of(folder / "v1"), rows_of(folder / "three")
    two = read_adapter(folder / "two").layers
    for name, factors in read_adapter(folder / "three").layers.items():
        one, other, own = factors.born
        assert set(three[name][:one]) <= set(first.get(name, ()))
        assert set(three[name][one : one + other]) <= set(rows_of(folder / "two").get(name, ())[two[name].born[0] :])
        assert one + other + own == factors.rank
    start = records[2]["budget"]["start_born"]
    assert all(counts[:2] == list(two[name].born) for name, counts in start.items() if name in two)


def test_a_dry_run_shows_old_and_new(folder: Path) -> None:
    found = dry_run(second(folder, "rank.init=4"))
    old = read_adapter(folder / "v1").ranks
    assert {m["name"]: m["components"] for m in found["modules"]} == {
        m["name"]: max(4, old.get(m["name"], 0)) for m in found["modules"]
    }
    assert any("adapter.from" in note for note in found["notes"])


def test_the_rate_is_found_with_the_old_components_held(folder: Path) -> None:
    train(second(folder, "adapter.old=freeze", "train.learning_rate=auto", "train.max_steps=4", out="rate"))
    before, after = rows_of(folder / "v1"), rows_of(folder / "rate")
    left = read_adapter(folder / "rate").layers
    assert all(set(after[name][: f.born[0]]) <= set(before.get(name, ())) for name, f in left.items())


def test_that_an_adapter_was_pruned_stays_on_record(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "v1", tmp_path / "v1")
    path = tmp_path / "v1/dynlora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "altered": ["pruned"]}))
    recipe = second(tmp_path, "train.max_steps=4")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=3)
    train(recipe, resume=True)
    assert read_adapter(tmp_path / "v2").record["altered_births"] == 1


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_chat_template_than_the_adapters_is_told(tmp_path: Path) -> None:
    record = {"chat_template_sha256": sha256_of_text("a")}
    assert not template_notes(record, tmp_path, "a")
    assert not template_notes({}, tmp_path, "b")  # of another tool, or of rows without a template
    assert not any("set dataset.chat_template" in note for note in template_notes(record, tmp_path, "b"))
    (tmp_path / "chat_template.jinja").write_text("a")
    (note,) = template_notes(record, tmp_path, "b")
    assert "learned from another chat template" in note
    assert f"set dataset.chat_template: {tmp_path / 'chat_template.jinja'}" in note


def test_the_adapter_that_would_be_replaced_is_refused(folder: Path) -> None:
    for origin, out in (("v1", "v1"), ("v1/checkpoints/step-12", "v1")):
        before = {path: path.stat().st_mtime_ns for path in (folder / "v1").rglob("*")}
        with pytest.raises(UsageError, match="would replace"):
            train(second(folder, origin=origin, out=out), overwrite=True)
        assert before == {path: path.stat().st_mtime_ns for path in (folder / "v1").rglob("*")}


def test_a_run_in_which_nothing_would_train_is_refused(folder: Path) -> None:
    few = ("rank.init=1", f"adapter.target_modules=[{next(iter(read_adapter(folder / 'v1').layers))}]")
    with pytest.raises(UsageError, match="there is none to train") as error:
        train(second(folder, "adapter.old=freeze", *few, out="idle"))
    assert f"rank.init above {max(read_adapter(folder / 'v1').ranks.values())}" in error.value.hint
    with pytest.raises(UsageError, match="there is none to train"):
        dry_run(second(folder, "adapter.old=freeze", *few, out="idle"))


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "v1", tmp_path / "v1")
    record = json.loads((tmp_path / "v1" / "dynlora.json").read_text())
    record["base_model"]["fingerprint"]["sampled_sha256"] = "0" * 64
    (tmp_path / "v1" / "dynlora.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="trained on another base"):
        train(second(tmp_path))


def test_other_layers_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path, "plain")
    with pytest.raises(UsageError, match="has no layer of that name"):
        train(second(tmp_path, origin="plain", kind="gpt2"))


def test_a_dora_is_refused_with_the_way_out(tmp_path: Path) -> None:
    foreign(tmp_path, "dora")
    with pytest.raises(UsageError, match="is a DoRA") as refused:
        train(second(tmp_path, origin="dora"))
    assert "dynlora merge" in str(refused.value.hint)


@pytest.mark.parametrize(("kind", "what"), [("embedding", "adapts the embedding"), ("hira", "is a HiRA")])
def test_what_is_no_sum_of_linear_components_is_refused(tmp_path: Path, kind: str, what: str) -> None:
    base, origin = make(kind, tmp_path)
    with pytest.raises(UsageError, match=what) as refused:
        read_origin(second(tmp_path, origin=origin.name), SimpleNamespace(folder=base), SimpleNamespace(notes=[]))
    assert "dynlora merge" in str(refused.value.hint)


# -- classifiers -----------------------------------------------------------------------------------------------------


def test_a_classifiers_head_goes_along(tmp_path: Path) -> None:
    one, _ = train(make_recipe(tmp_path, kind="bert", out="v1"))
    two, _ = train(second(tmp_path, "train.max_steps=2", kind="bert"))
    assert two["loss_before"] == pytest.approx(one["loss_after"], rel=1e-5)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, "train.max_steps=2", kind="bert", out="v1"))
    record = json.loads((tmp_path / "v1" / "dynlora.json").read_text())
    record["data"]["labels"] = ["many", "few"]
    (tmp_path / "v1" / "dynlora.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="tells the classes"):
        train(second(tmp_path, kind="bert"))
