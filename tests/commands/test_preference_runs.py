"""Runs that compare or judge answers, from rows to numbers: training, eval, prune, what comes after, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora
from numeric import same_loss
from safetensors.torch import load_file, save_file
from tiny_run import WORDS, lines, make_recipe, train

from dynlora_cli.commands import evaluate, init, prune
from dynlora_cli.commands.dry_run import plan as dry_run
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import DataError, Interrupted, RecipeError, UsageError
from dynlora_cli.evaluation.options import Options
from dynlora_cli.files.whole import sha256_of

REWARDS = {"accuracy", "margin", "reward_chosen", "reward_rejected"}


def write_pairs(folder: Path, count: int = 40, judged: bool = False) -> Path:
    """Answers in the order of the alphabet are better than the same words the other way round."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        words = sorted({WORDS[(index * 7 + place * 5) % len(WORDS)] for place in range(2 + index % 5)})
        prompt, good, bad = f"{index}: {' '.join(words)} -> ", " ".join(words), " ".join(words[::-1])
        if judged:
            rows.append({"prompt": prompt, "completion": good if index % 2 else bad, "label": bool(index % 2)})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path = folder / ("judged.jsonl" if judged else "pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(folder: Path, objective: str, *overrides: str, out: str | None = None, rows: int = 40) -> Recipe:
    path = write_pairs(folder, rows, judged=objective == "kto")
    own = (f"dataset.train=[{path}]", f"train.objective={objective}", "train.learning_rate=1e-2")
    return make_recipe(folder, *own, *overrides, out=out or objective)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs that tests share; not to be changed."""
    return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module", params=["dpo", "orpo", "kto"])
def trained(request: pytest.FixtureRequest, folder: Path) -> tuple[Recipe, dict[str, Any], list[dict]]:
    recipe = recipe_of(folder, request.param)
    return (recipe, *train(recipe))


@pytest.fixture(scope="module")
def dpo(folder: Path) -> Recipe:
    recipe = recipe_of(folder, "dpo", out="dpo-shared")
    train(recipe)
    return recipe


def measured(recipe: Recipe, data: Path | None = None, **options: Any) -> dict[str, Any]:
    return evaluate.run([Path(recipe.output_dir)], data, Options(**options), lambda _: None)


def test_a_run_tells_its_numbers_and_eval_finds_them_again(trained: tuple[Recipe, dict[str, Any], list[dict]]) -> None:
    recipe, summary, events = trained
    objective, looks = recipe.train.objective, [event for event in events if event["event"] == "eval"]
    assert all(looks[-1].keys() >= REWARDS and "perplexity" not in looks[-1] for look in looks)
    assert looks[-1]["tokens"] == summary_rows(events)
    assert summary["loss_after"] < summary["loss_before"]
    assert objective == "kto" or summary["margin_after"] > summary["margin_before"]  # kto's few steps teach less
    steps = [line for line in lines(Path(recipe.output_dir) / "metrics.jsonl") if line["event"] == "train"]
    assert all(REWARDS - {"accuracy"} <= line.keys() for line in steps if objective != "kto")
    report = measured(recipe)
    (ours,) = report["adapters"]
    for key in ("loss", *REWARDS):
        assert ours[key] == pytest.approx(summary[f"{key}_after"], rel=1e-4, abs=1e-5), key
        assert report["base"][key] == pytest.approx(summary[f"{key}_before"], rel=1e-4, abs=1e-5), key
    if objective == "dpo":
        assert report["base"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert any("measured from the base" in note for note in report["notes"])
    assert report["objective"] == objective


def summary_rows(events: list[dict]) -> int:
    start = next(event for event in events if event["event"] == "start")
    assert start["run"]["supervised_tokens"] is None
    return start["run"]["val_rows"]


def test_report_and_card_show_margins(trained: tuple[Recipe, dict[str, Any], list[dict]]) -> None:
    out = Path(trained[0].output_dir)
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert "Margin of the rewards" in page
    assert f"nats per {'row' if trained[0].train.objective == 'kto' else 'pair'}" in page
    assert "| held-out margin |" in card
    assert "| held-out accuracy |" in card


@pytest.mark.slow
def test_prune_goes_by_the_objective(dpo: Recipe, tmp_path: Path, dynlora: Dynlora) -> None:
    options = ["--adapter", dpo.output_dir, "--budget", "0.5", "--policy", "fisher", "--json"]
    answer = dynlora("prune", *options, "--out", tmp_path / "small")
    assert answer.code == 0, answer.err
    assert answer.json["loss_before"] == same_loss(measured(dpo)["adapters"][0]["loss"])
    assert answer.json["loss_before"] < math.log(2) < answer.json["loss_after"] + 1
    healed = dynlora("prune", *options, "--heal", "3", "--out", tmp_path / "healed")
    assert healed.code == 0, healed.err
    assert math.isfinite(healed.json["loss_after"])
    again = dynlora("eval", "--adapter", tmp_path / "small", "--json")
    assert again.code == 0, again.err
    assert again.json["adapters"][0]["loss"] == same_loss(answer.json["loss_after"])


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, stopped = (recipe_of(tmp_path, "dpo", out=name) for name in ("whole", "stopped"))
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, interrupt_at=6)
    train(stopped, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "stopped" / name)
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "stopped" / "metrics.jsonl")


@pytest.mark.slow
def test_the_rank_is_found_and_training_stops_by_the_objective(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "dpo", "rank.budget=auto", "pruning={}", "eval.early_stopping_patience=1", rows=120)
    summary, events = train(recipe)
    measured_at = [event["held_out_loss"] for event in events if event["event"] in ("prune", "refused")]
    assert measured_at
    assert max(measured_at) < 2 * math.log(2)
    assert summary["loss_after"] < math.log(2)


@pytest.mark.slow
def test_dpo_after_sft_compares_with_the_sft_adapter(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, out="sft"))
    recipe = recipe_of(tmp_path, "dpo", f"adapter.from={tmp_path / 'sft'}", "rank.init=auto", out="after")
    summary, events = train(recipe)
    assert summary["loss_before"] == pytest.approx(math.log(2), abs=1e-6)  # not of the base, but of the adapter
    assert list(summary["also"]) == ["sft"], "what SFT taught is measured by the likelihood of its rows"
    report = measured(recipe)
    assert report["adapters"][0]["loss"] == same_loss(summary["loss_after"])
    assert report["base"]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert any("sft, from which after went on" in note for note in report["notes"])
    healed = prune.run(
        prune.Request(Path(recipe.output_dir), parse_budget(0.8), tmp_path / "healed", heal_steps=2, max_samples=8)
    )
    assert math.isfinite(healed["loss_after"])
    looks = [line for line in lines(tmp_path / "healed" / "metrics.jsonl") if "margin" in line]
    assert looks[0]["margin"] != pytest.approx(0, abs=1e-4), "compared with the SFT adapter, not with what was cut"
    shutil.move(tmp_path / "sft", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"went on from the adapter in .*sft, which is not there"):
        measured(recipe)
    assert not [event for event in events if event["event"] == "warning"]


@pytest.mark.slow
def test_an_adapter_that_is_another_by_now_is_no_reference(tmp_path: Path) -> None:
    """One of another tool, which has no run to be known by; and one whose run was interrupted, and went on later."""
    train(make_recipe(tmp_path, out="sft"))
    stock = tmp_path / "stock"
    stock.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "sft" / name, stock)
    from_stock, from_sft = (
        recipe_of(tmp_path, "dpo", f"adapter.from={tmp_path / origin}", "rank.init=auto", out=f"of_{origin}")
        for origin in ("stock", "sft")
    )
    for recipe in (from_stock, from_sft):
        train(recipe)
        assert measured(recipe)["adapters"]
    weights = stock / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UsageError, match=r"another adapter than the one that is in .*stock"):
        measured(from_stock)
    record = tmp_path / "sft" / "dynlora.json"
    known = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(known | {"finished": "2999-01-01T00:00:00+0000"}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"sft was trained on after .*of_sft had gone on from it"):
        measured(from_sft)


@pytest.mark.slow
def test_rows_of_an_sft_run_are_not_replayed_between_pairs(tmp_path: Path) -> None:
    train(make_recipe(tmp_path, out="sft"))
    origin = f"adapter.from={tmp_path / 'sft'}"
    with pytest.raises(UsageError, match="single answers or texts, and these are compared answers"):
        train(recipe_of(tmp_path, "dpo", origin, "dataset.replay={share: 0.1}", "rank.init=auto", out="after"))


@pytest.mark.slow
def test_other_rows_are_measured_by_likelihood(dpo: Recipe, folder: Path) -> None:
    answers = folder / "llama.jsonl"  # prompts and completions
    report = measured(dpo, answers)
    assert report["adapters"][0]["perplexity"] > 1
    assert any("none for dpo: measured is the loss of their answers" in note for note in report["notes"])
    pairs = measured(dpo, write_pairs(folder))
    assert (pairs["rows"], pairs["objective"]) == (40, "dpo")
    also = measured(dpo, also={"before": answers})
    assert also["adapters"][0]["also"]["before"]["rows"] == 40


def test_answers_are_generated_from_prompts(dpo: Recipe, dynlora: Dynlora) -> None:
    report = measured(dpo, samples=2)
    assert [sample["references"] for sample in report["samples"]]
    assert report["generated"]["prompts"] == 0
    answer = dynlora("generate", "--adapter", dpo.output_dir, "--max-new-tokens", "4", "count words -> ")
    assert answer.code == 0, answer.err


def test_a_threshold_of_accuracy_is_kept(dpo: Recipe, dynlora: Dynlora) -> None:
    answer = dynlora("eval", "--adapter", dpo.output_dir, "--fail-below", "margin=99", "--json")
    assert (answer.code, answer.json["ok"]) == (4, False)


def test_dry_run_shows_both_answers(tmp_path: Path) -> None:
    found = dry_run(recipe_of(tmp_path, "dpo"))
    texts = [text for text, _ in found["example"]]
    assert (texts[1], texts[3]) == ("\n  chosen: ", "\n  rejected: ")
    assert found["memory"]["rows"] == 4  # two lines of each of two rows


def test_a_library_keeps_requests_only(dpo: Recipe, tmp_path: Path, dynlora: Dynlora) -> None:
    answer = dynlora("library", "add", tmp_path / "lib", "--adapter", dpo.output_dir, "--json")
    assert answer.code == 0, answer.err
    assert any("its rows compare or judge answers" in note for note in answer.json["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("dataset.packing=true", "dataset.packing"),
        ("train.cuda_graphs=true", "train.cuda_graphs"),
        ("pruning.policy=retrieval", "pruning.policy"),
        ("dataset.train_on=all", "dataset.train_on"),
        ("dataset.retrieve={corpus: x}", "dataset.retrieve"),
        ("model.task=seq2seq-lm", "model.task"),
    ],
)
def test_what_does_not_go_with_objectives_is_refused(tmp_path: Path, objective: str, setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe_of(tmp_path, objective, setting)


@pytest.mark.parametrize(("judged", "objective"), [(False, "dpo"), (True, "kto")])
def test_init_knows_such_rows(tmp_path: Path, judged: bool, objective: str) -> None:
    found = init.run(str(write_pairs(tmp_path, judged=judged)), tmp_path / "r.yaml", model="builtin:tiny")
    assert (found["objective"], found["rows"]) == (objective, 40)
    assert f"  objective: {objective}" in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_rows_of_another_kind_are_answered_in_words(tmp_path: Path) -> None:
    pairs = f"dataset.train=[{write_pairs(tmp_path)}]"
    with pytest.raises(DataError, match="single answers are learned here") as caught:
        train(make_recipe(tmp_path, pairs))
    assert caught.value.hint
    assert "set train.objective: dpo" in caught.value.hint
    assert "columns: {completion: chosen}" in caught.value.hint
    with pytest.raises(DataError, match=r"for causal-lm with train.objective dpo there are"):
        train(make_recipe(tmp_path, "train.objective=dpo"))
    with pytest.raises(DataError, match=r"does not serve model.task causal-lm") as named:
        train(make_recipe(tmp_path, f"dataset.train=[{{path: {tmp_path / 'pairs.jsonl'}, format: preference}}]"))
    assert "train.objective dpo or kto or orpo" in (named.value.hint or "")
