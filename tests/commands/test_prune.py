"""`dynlora prune` through the command line: its own runs and other people's adapters, with and without data."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from cli_helpers import Dynlora, contents
from numeric import rounding, same_loss
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from peft_adapters import SAME_LOGITS, make
from test_clients import by_peft
from tiny_run import make_recipe, train, write_rows
from transformers import AutoModelForCausalLM

from dynlora_cli import plugins
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.pruning import rows as pruning_rows
from dynlora_cli.training.healing import heal

POLICIES = plugins.names("policies")


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict]:
    """A run that is trained enough for its adapter to matter."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = make_recipe(folder, "train.learning_rate=2e-2", "rank.budget=6", kind=request.param)
    summary, _ = train(recipe)
    return recipe, summary


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_pruned_by_every_policy_and_peft_agrees(policy, trained, tmp_path: Path, dynlora: Dynlora):
    recipe, trained_summary = trained
    before = contents(Path(recipe.output_dir))
    out = tmp_path / "small"
    answer = dynlora(
        "prune", "--adapter", recipe.output_dir, "--budget", "0.5", "--policy", policy, "--out", out, "--json"
    )
    assert answer.code == 0, answer.err
    summary = answer.json
    assert contents(Path(recipe.output_dir)) == before, "the input is never touched"
    assert summary["parameters"] <= trained_summary["parameters"] // 2
    assert summary["loss_before"] == same_loss(trained_summary["loss_after"])
    found, _ = by_peft(recipe.model_copy(update={"output_dir": str(out)}))
    assert found["loss"] == same_loss(summary["loss_after"])
    points = summary["curve"]
    assert [p["parameters"] for p in points] == sorted((p["parameters"] for p in points), reverse=True)
    assert summary["parameters"] in [p["parameters"] for p in points]
    assert points[0]["energy"] == pytest.approx(1.0, abs=rounding(torch.float32, 16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("policy", ["activation", "fisher"])
def test_a_base_in_sixteen_bits(kind: str, policy: str, tmp_path: Path, dynlora: Dynlora):
    """Heads and components are fp32 beside it, as in training."""
    recipe = make_recipe(tmp_path, "model.dtype=bfloat16", "train.learning_rate=2e-2", kind=kind)
    trained_summary, _ = train(recipe)
    options = ["--budget", "0.5", "--policy", policy, "--out", tmp_path / "small", "--json"]
    answer = dynlora("prune", "--adapter", recipe.output_dir, *options)
    assert answer.code == 0, answer.err
    assert answer.json["loss_before"] == pytest.approx(trained_summary["loss_after"], abs=1e-2)


@pytest.mark.slow
def test_what_is_left_is_a_run_folder_with_the_curve_in_its_report(trained, tmp_path: Path, dynlora: Dynlora):
    recipe, _ = trained
    out = tmp_path / "small"
    answer = dynlora("prune", "--adapter", recipe.output_dir, "--budget", "2", "--out", out)
    assert answer.code == 0, answer.err
    assert "Loss against size" in answer.err
    assert "← this one" in answer.err
    assert "Held-out loss against size" in (out / "report.html").read_text()
    assert "pruned after training" in " ".join((out / "README.md").read_text().split())
    record = json.loads((out / "dynlora.json").read_text())
    assert record["prune"]["curve"] == record["summary"]["curve"]
    assert record["recipe"]["output_dir"] == recipe.output_dir, "how it was trained is still on record"
    assert (out / "tokenizer.json").is_file()
    again = dynlora("prune", "--adapter", out, "--budget", "0.7", "--out", tmp_path / "smaller", "--json")
    assert again.code == 0, again.err
    assert again.json["loss_before"] == same_loss(record["summary"]["loss_after"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["magnitude", "activation"])
def test_auto_is_within_the_tolerance(policy: str, trained, tmp_path: Path, dynlora: Dynlora):
    recipe, _ = trained
    options = ["--budget", "auto", "--policy", policy, "--tolerance", "2%"]
    answer = dynlora("prune", "--adapter", recipe.output_dir, *options, "--out", tmp_path / "auto", "--json")
    assert answer.code == 0, answer.err
    summary = answer.json
    limit = summary["loss_before"] * 1.02
    assert summary["loss_after"] <= limit
    assert summary["parameters"] < summary["parameters_start"]
    larger = [p["loss"] for p in summary["curve"] if p["parameters"] >= summary["parameters"]]
    assert max(larger) <= limit
    assert 2 <= len(summary["curve"]) <= 11, "few evaluations, each on record"


def lean(run) -> bool:
    """Whether its blocks train with the functions of kernels/lean.py."""
    return any("forward" in vars(module) for module in run.model.model.layers.modules())


@pytest.mark.slow
def test_healing_saves_memory_as_the_run_did(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    found = []
    for setting in ("true", "false"):
        settings = f"train.gradient_checkpointing={setting}", f"train.fused={setting}"
        recipe = make_recipe(tmp_path, *settings, out=setting)
        train(recipe)
        monkeypatch.setattr(heal, "fit", lambda run: found.append((run.model.is_gradient_checkpointing, lean(run))))
        common = (
            "prune",
            "--adapter",
            recipe.output_dir,
            "--budget",
            "0.5",
            "--heal",
            "2",
            "--out",
            tmp_path / f"h{setting}",
        )
        assert dynlora(*common).code == 0
        monkeypatch.undo()
    assert found == [(True, True), (False, False)]


@pytest.mark.slow
def test_healing_trains_what_is_left(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path, "train.learning_rate=5e-3", "rank.budget=6")
    train(recipe)
    common = ["prune", "--adapter", recipe.output_dir, "--budget", "0.2", "--json"]
    plain = dynlora(*common, "--out", tmp_path / "plain").json
    answer = dynlora(*common, "--heal", "15", "--out", tmp_path / "healed")
    assert answer.code == 0, answer.err
    healed = answer.json
    assert healed["ranks"] == plain["ranks"]
    assert healed["loss_after"] < plain["loss_after"] - 0.01
    found, _ = by_peft(recipe.model_copy(update={"output_dir": str(tmp_path / "healed")}))
    assert found["loss"] == same_loss(healed["loss_after"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 15


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rslora", "patterns", "dora", "conv1d", "embedding", "classifier", "hira", "vera"])
def test_adapters_of_other_tools_need_no_data(kind: str, tmp_path: Path, dynlora: Dynlora):
    _, adapter = make(kind, tmp_path)
    answer = dynlora("prune", "--adapter", adapter, "--budget", "0.4", "--out", tmp_path / "small", "--json")
    assert answer.code == 0, answer.err
    assert "the loss is not measured" in answer.err
    summary = answer.json
    assert summary["loss_after"] is None
    assert 0 < summary["energy_kept"] < 1
    small = read_adapter(tmp_path / "small")
    assert small.parameters == summary["parameters"] <= 0.4 * read_adapter(adapter).parameters
    assert small.kind == {"dora": "DoRA", "hira": "HiRA"}.get(kind, "LoRA")
    assert small.whole.keys() == read_adapter(adapter).whole.keys()
    merged = dynlora("merge", "--adapter", tmp_path / "small", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["check"]["max_logit_difference"] < SAME_LOGITS


@pytest.mark.slow
def test_adapters_of_other_tools_with_rows_from_a_file(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path)
    train(recipe)
    out = Path(recipe.output_dir)
    for name in ("dynlora.json", "metrics.jsonl", "rank_events.jsonl"):  # as if another tool had made it
        (out / name).unlink()
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    common = ["prune", "--adapter", out, "--budget", "0.5", "--policy", "activation"]
    refused = dynlora(*common, "--out", tmp_path / "a")
    assert (refused.code, "--data FILE" in refused.err) == (2, True), refused.err
    answer = dynlora(*common, "--data", rows, "--out", tmp_path / "a", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["rows"] == 6, "the other six have chosen"
    heal = dynlora(*common[:-2], "--heal", "2", "--out", tmp_path / "b")
    assert (heal.code, "--data FILE" in heal.err) == (2, True), heal.err
    by_recipe = dynlora(*common, "--data", tmp_path / "llama.yaml", "--heal", "2", "--out", tmp_path / "b", "--json")
    assert by_recipe.code == 0, by_recipe.err


REFUSED = [
    (["--budget", "0"], 2, "--budget 0"),
    (["--budget", "many"], 2, "--budget many"),
    (["--budget", "1.5"], 2, "--budget 1.5"),
    (["--budget", "0.001"], 2, "there must be"),
    (["--budget", "999"], 2, "within the budget"),
    (["--budget", "0.5", "--policy", "activations"], 2, "did you mean 'activation'"),
    (["--budget", "0.5", "--set", "power=1"], 2, "name it with --policy"),
    (["--budget", "auto", "--tolerance", "half"], 2, "--tolerance half is no share"),
    (["--budget", "0.5", "--data", "none.jsonl"], 2, "none.jsonl"),
    (["--budget", "0.5", "--base", "none"], 3, "none"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_what_is_refused(options, code, message, trained, tmp_path: Path, dynlora: Dynlora):
    recipe, _ = trained
    answer = dynlora("prune", "--adapter", recipe.output_dir, *options, "--out", tmp_path / "new", "--json")
    assert (answer.code, message in " ".join(answer.err.split())) == (code, True), answer.err
    assert answer.json["ok"] is False
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter that says nothing of its training, as other tools leave them, and rows like those of its training."""
    folder = tmp_path_factory.mktemp("foreign")
    return stock_adapter(folder, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")), pico.rows(folder, 60)


def stock_adapter(folder: Path, config: PeftConfig) -> Path:
    """An adapter of stock PEFT on pico's model, with random numbers that are not small."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pico.pico_model(folder)), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15, generator=generator)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_the_policy_is_chosen_by_what_there_is_to_look_at(foreign, tmp_path: Path, dynlora: Dynlora):
    adapter, rows = foreign
    common = ["prune", "--adapter", adapter, "--budget", "0.5", "--json"]
    blind = dynlora(*common, "--out", tmp_path / "blind")
    assert (blind.code, blind.json["policy"]) == (0, "magnitude"), blind.err
    assert "--data FILE names rows" in " ".join(blind.err.split())
    named = dynlora(*common, "--base", adapter.parent / "pico", "--out", tmp_path / "named")
    assert (named.code, named.json["policy"]) == (0, "magnitude"), named.err
    seeing = dynlora(*common, "--data", rows, "--out", tmp_path / "seeing")
    assert seeing.code == 0, seeing.err
    assert seeing.json["policy"] == "activation"
    record = json.loads((tmp_path / "seeing" / "dynlora.json").read_text())
    assert record["prune"]["policy"] == "activation"


def test_a_kind_that_activation_cannot_judge_is_cut_by_magnitude(tmp_path: Path, dynlora: Dynlora):
    adapter = stock_adapter(tmp_path, HiraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    common = ["--budget", "0.5", "--data", pico.rows(tmp_path, 8), "--out", tmp_path / "small", "--json"]
    answer = dynlora("prune", "--adapter", adapter, *common)
    assert answer.code == 0, answer.err
    assert answer.json["policy"] == "magnitude"
    assert "policy magnitude:" in answer.err


def test_a_large_file_is_looked_at_in_part(foreign, tmp_path: Path, dynlora: Dynlora, monkeypatch):
    adapter, rows = foreign
    monkeypatch.setattr(pruning_rows, "FILE_ROWS", 7)
    common = ["prune", "--adapter", adapter, "--budget", "0.5", "--data", rows, "--json"]
    answer = dynlora(*common, "--out", tmp_path / "some")
    assert answer.json["rows"] == 3, answer.err
    told = " ".join(answer.err.split())
    assert "7 of 60 rows, evenly spread" in told
    assert "4 rows, every other one, choose what stays" in told
    assert "measured on 3 rows: " in told
    all_of_them = dynlora(*common, "--max-samples", "9", "--policy", "magnitude", "--out", tmp_path / "nine")
    assert all_of_them.json["rows"] == 9, "a policy that looks at no rows leaves all to measure on"


def test_an_adapter_of_another_tool_heals_on_rows_of_a_file(foreign, tmp_path: Path, dynlora: Dynlora):
    """A part of the rows is trained on, and another tells whether it helped."""
    adapter, rows = foreign
    common = ["prune", "--adapter", adapter, "--budget", "0.3", "--data", rows, "--json"]
    cut = dynlora(*common, "--out", tmp_path / "cut")
    healed = dynlora(*common, "--heal", "12", "--out", tmp_path / "healed")
    assert healed.code == 0, healed.err
    assert 0 < healed.json["rows"] < 30
    points = {point["parameters"]: point["loss"] for point in healed.json["curve"]}
    assert healed.json["loss_after"] < points[healed.json["parameters"]], "lower than as it was cut"
    assert healed.json["parameters"] <= cut.json["budget_parameters"]
    assert f"the learning rate {heal.RATE:.2g}" in " ".join(healed.err.split())
    steps = [json.loads(line)["step"] for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 12


@pytest.mark.slow
def test_a_run_heals_by_its_own_rows_whatever_it_is_measured_on(tmp_path: Path, dynlora: Dynlora, monkeypatch):
    recipe = make_recipe(tmp_path)
    train(recipe)
    seen = []
    monkeypatch.setattr(heal, "fit", lambda run: seen.append(len(run.data.train)))
    common = ["--budget", "0.5", "--heal", "2", "--data", write_rows(tmp_path / "rows.jsonl", 12)]
    answer = dynlora("prune", "--adapter", recipe.output_dir, *common, "--out", tmp_path / "a", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["rows"] == 6
    assert seen == [32]
    assert "heals by the recipe and rows of the adapter's own run" in " ".join(answer.err.split())


def test_not_measuring_where_it_is_not_needed(trained, tmp_path: Path, dynlora: Dynlora):
    recipe, _ = trained
    options = ["--budget", "0.5", "--policy", "activation", "--no-measure", "--out", tmp_path / "small", "--json"]
    summary = dynlora("prune", "--adapter", recipe.output_dir, *options).json
    assert summary["loss_after"] is None
    assert {point["loss"] for point in summary["curve"]} == {None}


def test_an_output_folder_in_use(trained, tmp_path: Path, dynlora: Dynlora):
    recipe, _ = trained
    (tmp_path / "mine").write_text("precious")
    common = ["prune", "--adapter", recipe.output_dir, "--budget", "0.5"]
    assert dynlora(*common, "--out", tmp_path).code == 2
    assert dynlora(*common, "--out", tmp_path, "--overwrite").code == 2
    assert dynlora(*common, "--out", recipe.output_dir, "--overwrite").code == 2
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_built_in_policies_of_training_do_not_include_activation(tmp_path: Path, dynlora: Dynlora):
    make_recipe(tmp_path)
    answer = dynlora("train", tmp_path / "llama.yaml", "--set", "pruning.policy=activation")
    assert (answer.code, "`dynlora prune --policy activation`" in answer.err) == (2, True), answer.err
