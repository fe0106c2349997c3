"""`dynlora prune --born` through the command line: an update is taken out again, and it is said what that means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Dynlora, contents
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.runs.folder import read_record

BASE = "base_model_name_or_path"


def grown(folder: Path, earlier: Path, old: str = "freeze") -> Path:
    """A run folder as of an update that began with the components of an earlier run, and added one to every layer."""
    adapter = read_adapter(earlier)
    generator = torch.Generator().manual_seed(len(str(folder)))
    layers = {name: _one_more(factors, generator, len(adapter.births)) for name, factors in adapter.layers.items()}
    record = {**adapter.record, "name": folder.name, "run_id": f"run-{folder.name}", "output_dir": str(folder)}
    record["births"] = [
        *adapter.births,
        {**adapter.births[-1], "run": record["run_id"], "name": folder.name, "folder": str(folder), "old": old},
    ]
    record["layers"] = {
        name: {**layer, "rank": layers[name].rank, "born": list(layers[name].born)}
        for name, layer in record["layers"].items()
        if name in layers
    }
    folder.mkdir()
    save(replace(adapter, layers=layers), folder)
    (folder / "dynlora.json").write_text(json.dumps(record))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((earlier / name).read_bytes())
    return folder


def _one_more(factors: Factors, generator: torch.Generator, births: int) -> Factors:
    a = torch.randn(1, factors.a_CI.shape[1], generator=generator) / 5
    b = torch.randn(factors.b_OC.shape[0], 1, generator=generator) / 5
    born = (*(factors.born or (*[0] * (births - 1), factors.rank)), 1)
    return replace(factors, a_CI=torch.cat([factors.a_CI, a]), b_OC=torch.cat([factors.b_OC, b], 1), born=born)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """law, trained; tax beside it, and market beside both; crop trained law further."""
    folder = tmp_path_factory.mktemp("chain")
    recipe = make_recipe(folder, "train.learning_rate=2e-2", out="law")
    train(recipe)
    law = Path(recipe.output_dir)
    tax = grown(folder / "tax", law)
    return {
        "law": law,
        "tax": tax,
        "market": grown(folder / "market", tax),
        "crop": grown(folder / "crop", law, "tune"),
    }


def retired(dynlora: Dynlora, adapter: Path, out: Path, *options: Any) -> dict[str, Any]:
    answer = dynlora("prune", "--adapter", adapter, *options, "--out", out, "--json")
    assert answer.code == 0, answer.err
    return answer.json


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_last_update_leaves_the_earlier_adapter_to_the_bit(chain, tmp_path: Path, dynlora: Dynlora):
    before = contents(chain["market"])
    out = tmp_path / "back"
    summary = retired(dynlora, chain["market"], out, "--born", "market")
    assert contents(chain["market"]) == before, "the input is never touched"
    assert (out / "adapter_model.safetensors").read_bytes() == (chain["tax"] / "adapter_model.safetensors").read_bytes()
    assert (summary["exact"], summary["why"], summary["next"]) == (True, [], None)
    assert f"number for number as in {chain['tax']}." in summary["words"]
    assert summary["compared"]["same"] == summary["components"] == read_adapter(chain["tax"]).components
    record = read_record(out)
    assert [birth["name"] for birth in record["births"]] == ["law", "tax"]
    assert [birth["name"] for birth in record["prune"]["born"]] == ["market"]
    assert [birth["name"] for birth in record["retired"]] == ["market"]
    assert record["run_id"] == read_record(chain["tax"])["run_id"], "its rows and recipe are those of what is left"


def test_two_updates_at_once_and_one_after_the_other_leave_the_same(chain, tmp_path: Path, dynlora: Dynlora):
    both = retired(dynlora, chain["market"], tmp_path / "both", "--born", "market", "--born", "tax")
    retired(dynlora, chain["market"], tmp_path / "one", "--born", "run-market")
    again = retired(dynlora, tmp_path / "one", tmp_path / "two", "--born", chain["tax"])
    assert both["exact"]
    assert again["exact"]
    law = (chain["law"] / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "both" / "adapter_model.safetensors").read_bytes() == law
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == law


def test_an_update_that_others_stand_on_is_not_exact(chain, tmp_path: Path, dynlora: Dynlora):
    out = tmp_path / "out"
    answer = dynlora("prune", "--adapter", chain["market"], "--born", "tax", "--out", out)
    assert answer.code == 0, answer.err
    text = " ".join(answer.err.split())
    assert "not exact: market was trained on top of tax" in text
    assert f"--born tax --heal 50 --out {out}-healed" in text
    assert "tax (retired)" in text
    left, before = read_adapter(out), read_adapter(chain["market"])
    for name, factors in before.layers.items():
        stays = [*range(factors.born[0]), factors.rank - 1]
        assert torch.equal(left.layers[name].a_CI, factors.a_CI[stays])
        assert torch.equal(left.layers[name].b_OC, factors.b_OC[:, stays])
    assert [birth["name"] for birth in left.births] == ["law", "market"]


def test_an_update_that_trained_the_others_is_not_exact(chain, tmp_path: Path, dynlora: Dynlora):
    summary = retired(dynlora, chain["crop"], tmp_path / "out", "--born", "crop")
    assert (summary["exact"], summary["why"]) == (False, ["crop trained the earlier components further"])
    assert read_record(tmp_path / "out")["prune"]["why"] == summary["why"]


def test_losses_are_measured_on_the_rows_of_every_run(chain, tmp_path: Path, dynlora: Dynlora):
    summary = retired(dynlora, chain["tax"], tmp_path / "out", "--born", "tax")
    rows = {line["update"]: line for line in summary["rows_by_update"]}
    assert {name: line["retired"] for name, line in rows.items()} == {"law": False, "tax": True}
    law = read_record(chain["law"])["summary"]["loss_after"]
    assert rows["law"]["loss_after"] == pytest.approx(law, abs=1e-5) == summary["loss_after"]
    assert rows["law"]["loss_before"] != rows["law"]["loss_after"]
    assert summary["agreement"]["kl"] > 0
    quiet = retired(dynlora, chain["tax"], tmp_path / "quiet", "--born", "tax", "--no-measure")
    assert (quiet["rows_by_update"], quiet["agreement"]) == ([], None)


def test_what_is_left_is_healed_by_the_recipe_of_the_last_run_that_stays(chain, tmp_path: Path, dynlora: Dynlora):
    out = tmp_path / "healed"
    summary = retired(dynlora, chain["crop"], out, "--born", "crop", "--heal", "3")
    assert summary["heal_steps"] == 3
    record = read_record(out)
    assert (record["altered"], record["recipe"]["output_dir"]) == (["healed"], str(chain["law"]))
    plain = retired(dynlora, chain["crop"], tmp_path / "plain", "--born", "crop", "--no-measure")
    assert plain["ranks"] == summary["ranks"]
    assert any(not torch.equal(one, other) for one, other in zip(*_values(out, tmp_path / "plain"), strict=True))


def _values(*folders: Path):
    return [list(weights(folder).values()) for folder in folders]


def test_a_cut_by_budget_keeps_births_and_is_not_exact_afterwards(chain, tmp_path: Path, dynlora: Dynlora):
    small = tmp_path / "small"
    retired(dynlora, chain["market"], small, "--budget", "0.7", "--no-measure")
    adapter = read_adapter(small)
    assert [birth["name"] for birth in adapter.births] == ["law", "tax", "market"]
    assert all(len(factors.born) == 3 and sum(factors.born) == factors.rank for factors in adapter.layers.values())
    assert all(0 <= factors.born[1] <= 1 for factors in adapter.layers.values())
    summary = retired(dynlora, small, tmp_path / "out", "--born", "market", "--no-measure")
    assert not summary["exact"]
    assert "another basis" in summary["why"][0]


def test_a_cut_that_turns_nothing_leaves_retirement_exact(chain, tmp_path: Path, dynlora: Dynlora):
    small = tmp_path / "small"
    retired(dynlora, chain["market"], small, "--budget", "0.8", "--policy", "prefix", "--no-measure")
    assert read_record(small)["altered"] == []
    summary = retired(dynlora, small, tmp_path / "out", "--born", "tax", "--born", "market", "--no-measure")
    assert summary["exact"]
    assert summary["compared"]["same"] == summary["components"]


def test_without_the_earlier_folder_it_says_what_it_does_not_know(chain, tmp_path: Path, dynlora: Dynlora):
    law = tmp_path / "law"
    law.mkdir()
    for name, content in contents(chain["law"]).items():
        (law / name).parent.mkdir(parents=True, exist_ok=True)
        (law / name).write_bytes(content)
    tax = grown(tmp_path / "tax", law)
    law.rename(tmp_path / "moved")
    answer = dynlora("prune", "--adapter", tax, "--born", "tax", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["exact"]
    assert answer.json["compared"] is None
    assert "rows of law is not measured" in " ".join(answer.err.split())
    assert "recipe" not in read_record(tmp_path / "out"), "that of tax would train on what was retired"
    heal = dynlora("prune", "--adapter", tax, "--born", "tax", "--heal", "2", "--out", tmp_path / "healed")
    assert (heal.code, "--data RECIPE.yaml" in heal.err) == (2, True), heal.err


def test_another_adapter_in_the_earlier_folder_is_noticed(chain, tmp_path: Path, dynlora: Dynlora):
    law = tmp_path / "law"
    law.mkdir()
    for name in ("adapter_config.json", "dynlora.json", "tokenizer.json", "tokenizer_config.json"):
        (law / name).write_bytes((chain["law"] / name).read_bytes())
    adapter: Adapter = read_adapter(chain["law"])
    save(adapter, law)
    tax = grown(tmp_path / "tax", law)
    save(adapter.with_layers({n: replace(f, b_OC=2 * f.b_OC) for n, f in adapter.layers.items()}), law)
    summary = retired(dynlora, tax, tmp_path / "out", "--born", "tax", "--no-measure")
    assert not summary["exact"]
    assert f"are not those in {law}" in summary["words"]


REFUSED = [
    ([], "give --budget 0.5, say, or --born RUN"),
    (["--born", "tax", "--budget", "0.5"], "two steps"),
    (["--born", "tax", "--policy", "fisher"], "--policy is for --budget"),
    (["--born", "tax", "--tolerance", "1%"], "--tolerance is for --budget"),
    (["--born", "tax", "--seed", "3"], "--seed is for --budget"),
    (["--born", "finance"], "no such update"),
    (["--born", "law", "--born", "tax"], "nothing would be left"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_is_refused(options, message, chain, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("prune", "--adapter", chain["tax"], *options, "--out", tmp_path / "new", "--json")
    assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    assert answer.json["ok"] is False
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_of_two_adapters_that_were_merged_is_taken_out_again(chain, tmp_path: Path, dynlora: Dynlora):
    other = make_recipe(tmp_path, "train.learning_rate=2e-2", "seed=3", out="other")
    train(other)
    both = tmp_path / "both"
    merge = ["merge", "--adapter", chain["tax"], "--adapter", other.output_dir, "--into", "adapter"]
    answer = dynlora(*merge, "--out", both, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["births"] == ["law", "tax", "other"]
    summary = retired(dynlora, both, tmp_path / "out", "--born", "other")
    assert (summary["exact"], summary["compared"]["same"]) == (True, summary["components"])
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        chain["tax"] / "adapter_model.safetensors"
    ).read_bytes()
    assert all(line["rows"] for line in summary["rows_by_update"])
    left = retired(dynlora, both, tmp_path / "left", "--born", "law", "--born", "tax")
    assert left["exact"]
    assert left["components"] == read_adapter(Path(other.output_dir)).components


@pytest.mark.parametrize("options", [["--method", "svd"], ["--budget", "0.3"]])
def test_where_merging_mixes_components_their_births_are_not_kept(options, chain, tmp_path: Path, dynlora: Dynlora):
    merge = ["merge", "--adapter", chain["tax"], "--adapter", chain["crop"], "--into", "adapter", *options]
    answer = dynlora(*merge, "--out", tmp_path / "both", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["births"] == []
    assert "is known no more" in answer.err
    assert len(read_adapter(tmp_path / "both").births) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1, and on top of it, both really trained, v2 with everything kept and v2cut with a budget for both."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_recipe(folder, "train.learning_rate=2e-2", out="v1"))
    grow = [f"adapter.from={folder / 'v1'}", "adapter.old=freeze", "train.learning_rate=2e-2", "seed=1"]
    train(make_recipe(folder, *grow, "rank.budget=8", out="v2"))
    train(make_recipe(folder, *grow, "rank.budget=3", out="v2cut"))
    return folder


def test_a_trained_update_beside_frozen_components_is_retired_to_the_bit(trained, tmp_path: Path, dynlora: Dynlora):
    summary = retired(dynlora, trained / "v2", tmp_path / "back", "--born", "v2")
    assert (summary["exact"], summary["left"]) == (True, ["v1"])
    v1 = trained / "v1"
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == (
        v1 / "adapter_model.safetensors"
    ).read_bytes()
    logits = [_logits(folder) for folder in (v1, tmp_path / "back", trained / "v2")]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    own, gone = summary["rows_by_update"]
    assert own["loss_after"] == pytest.approx(read_record(v1)["summary"]["loss_after"], abs=1e-6)
    assert gone["loss_after"] > gone["loss_before"], "what it had learned is gone"


def _logits(folder: Path) -> torch.Tensor:
    """What PEFT computes with the adapter in a folder."""
    base = AutoModelForCausalLM.from_pretrained(json.loads((folder / "adapter_config.json").read_text())[BASE])
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(input_ids=torch.arange(5, 25)[None]).logits


def test_what_the_common_budget_has_removed_of_the_earlier_ones_is_counted(trained, tmp_path: Path, dynlora: Dynlora):
    summary = retired(dynlora, trained / "v2cut", tmp_path / "back", "--born", "v2cut", "--no-measure")
    assert summary["exact"]
    found = summary["compared"]
    assert found["components"] == read_adapter(trained / "v1").components
    assert found["same"] == found["left"] == summary["components"] < found["components"]
    less = f"{found['components'] - found['left']} component"
    assert f"less {less}" in summary["words"]


@pytest.mark.slow
def test_rows_that_a_later_run_replayed_are_named(trained, tmp_path: Path, dynlora: Dynlora):
    grow = [f"adapter.from={trained / 'v2'}", "dataset.replay={share: 20%}", "rank.budget=10", "rank.init=10"]
    also = "eval.also=[{name: own, path: " + str(trained / "llama.jsonl") + "}]"
    train(make_recipe(trained, *grow, also, "adapter.old=freeze", out="v3"))
    summary = retired(dynlora, trained / "v3", tmp_path / "out", "--born", "v2", "--no-measure")
    assert summary["why"] == ["v3 was trained on top of v2", "v3 replayed rows of v2"]
    answer = dynlora("prune", "--adapter", trained / "v3", "--born", "v2", "--heal", "2", "--out", tmp_path / "healed")
    assert answer.code == 0, answer.err
    assert "are not replayed" in answer.err
    last = retired(dynlora, trained / "v3", tmp_path / "last", "--born", "v3", "--no-measure")
    assert last["exact"]
    assert (tmp_path / "last" / "adapter_model.safetensors").read_bytes() == (
        trained / "v2" / "adapter_model.safetensors"
    ).read_bytes()
