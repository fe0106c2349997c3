"""`train.run` as a whole: budgets, early stopping, plain LoRA, classifiers, trackers, and the golden run.

Golden files are remade with
    DYNLORA_REMAKE_GOLDEN=1 python -m pytest tests/commands/test_train.py -k golden
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from numeric import same_curve, same_loss
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_run import assembled, lines, make_recipe, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.pruning import control, select
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.record import Record
from dynlora_cli.training import loop
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.step import step

GOLDEN = Path(__file__).parents[1] / "golden"
ONE_RANK = 1024  # Σ(d_in + d_out) over the layers of the tiny Llama


def adapter_numbers(folder):
    """Numbers in the A and B factors of the saved adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if ".lora_" in name)


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "limit", "start"),
    [("2", 2 * ONE_RANK, 8 * ONE_RANK), ("0.3", int(0.3 * 8 * ONE_RANK), 8 * ONE_RANK), ("1.5k", 1500, 8 * ONE_RANK)],
)
def test_the_budget_is_met_and_reported_alike_everywhere(tmp_path, budget, limit, start):
    summary, events = train(make_recipe(tmp_path, f"rank.budget={budget}"))
    folder = tmp_path / "out"
    record = run_folder.read_record(folder)
    # Of a router's run, of one with new tokens, of one on a document, of one whose rank goes by the timestep, of torchrun's.
    others = ("library", "tokens", "adapted", "rank_by_timestep", "elastic_job")
    keys = [key for key in Record.__annotations__ if key not in others]
    assert list(record) == keys[: keys.index("summary") + 1], "all that the schema has of a run, in its order"
    counted = adapter_numbers(folder)
    assert limit - 96 < counted <= limit  # a component of this model holds 48 to 96 numbers
    assert summary["parameters"] == record["summary"]["parameters"] == counted
    assert summary["parameters_start"] == record["budget"]["start_parameters"] == start
    assert summary["budget_parameters"] == record["budget"]["parameters"] == limit
    assert sum((layer["d_in"] + layer["d_out"]) * layer["rank"] for layer in record["layers"].values()) == counted
    assert sum(summary["ranks"].values()) == summary["components"]
    assert [event for event in events if event["event"] == "prune"][-1]["parameters"] == counted
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == sum(rank > 0 for rank in summary["ranks"].values())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["rank.init=2", "rank.budget=2"], ["rank.init=3", "rank.budget=4k"]])
def test_a_start_within_the_budget_is_never_pruned(tmp_path, settings):
    summary, events = train(make_recipe(tmp_path, *settings))
    assert not [event for event in events if event["event"] in ("prune", "gauge")]
    assert (tmp_path / "out" / "rank_events.jsonl").read_text() == ""
    assert summary["policy"] is None
    init = int(settings[0][-1])
    assert set(summary["ranks"].values()) == {init}
    assert summary["parameters"] == adapter_numbers(tmp_path / "out") == init * ONE_RANK
    rates = [line["learning_rate"] for line in lines(tmp_path / "out" / "metrics.jsonl") if line["event"] == "train"]
    assert max(rates) == 5e-3  # nothing was removed, so nothing is coupled


@pytest.mark.slow
def test_a_start_above_half_the_layer_is_capped(tmp_path):
    summary, events = train(make_recipe(tmp_path, "rank.init=100", "rank.budget=2"))
    layers = events[0]["layers"]
    assert {layer["name"].split(".")[-1]: layer["components"] for layer in layers} == {
        "q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 16, "up_proj": 16, "down_proj": 16,
    }  # fmt: skip
    assert summary["parameters"] <= 2 * ONE_RANK


def test_a_budget_of_less_than_a_component_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"rank\.budget allows 80 parameters"):
        train(make_recipe(tmp_path, "rank.budget=0.08k"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(make_recipe(tmp_path, f"seed={seed}", out=name))
    events = [lines(tmp_path / name / "rank_events.jsonl") for name in ("one", "two", "three")]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert events[0] == events[1] != events[2]
    assert adapters[0] == adapters[1] != adapters[2]


# -- early stopping --------------------------------------------------------------------------------------------------


def held_out_losses(monkeypatch, values):
    """Let the held-out loss be these values, one after the other; the first is before training."""
    left = iter(values)
    monkeypatch.setattr(loop, "held_out_loss", lambda run: {"loss": next(left), "tokens": 1, "perplexity": 1.0})


@pytest.mark.slow
def test_patience_counts_once_the_budget_is_met_and_the_root_is_the_best(tmp_path, monkeypatch):
    # Evaluations after steps 1 to 12. The lowest loss comes before the budget is met (step 8) and does not count.
    held_out_losses(monkeypatch, [9, 5, 1, 2, 3, 4, 5, 6, 7, 6.5, 6.8, 6.9, 0])
    summary, events = train(make_recipe(tmp_path, "eval.steps=1", "eval.early_stopping_patience=2"))
    folder = tmp_path / "out"
    assert summary["steps"] == 11
    assert [event["step"] for event in events if event["event"] == "eval" and event["best"]] == [8, 9]
    assert summary["loss_after"] == 6.5
    assert summary["adapter"] == run_folder.read_record(folder)["adapter"] == "best"
    assert run_folder.pointed(folder, "best").name == "step-9"
    assert run_folder.pointed(folder, "last").name == "step-11"
    root, best, last = (
        (path / "adapter_model.safetensors").read_bytes()
        for path in (folder, folder / "checkpoints" / "step-9", folder / "checkpoints" / "step-11")
    )
    assert root == best != last
    assert summary["parameters"] == adapter_numbers(folder)
    assert any("no better for 2 evaluations" in event.get("text", "") for event in events)
    again, _ = train(make_recipe(tmp_path, "eval.steps=1", "eval.early_stopping_patience=2"), resume=True)
    assert again["steps"] == 11


def test_without_patience_the_root_is_the_last(tmp_path, monkeypatch):
    held_out_losses(monkeypatch, [9, 8, 1, 2])
    summary, _ = train(make_recipe(tmp_path))
    folder = tmp_path / "out"
    assert summary["adapter"] == run_folder.read_record(folder)["adapter"] == "last"
    assert summary["loss_after"] == 2
    assert run_folder.pointed(folder, "best").name == "step-8"
    last = folder / "checkpoints" / "step-12" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == last.read_bytes()


@pytest.mark.slow
def test_a_crash_after_patience_ran_out_does_not_train_on(tmp_path, monkeypatch):
    from dynlora_cli.training import roots

    recipe = make_recipe(tmp_path, "eval.steps=1", "eval.early_stopping_patience=1")
    held_out_losses(monkeypatch, [9, 5, 5, 5, 5, 5, 5, 5, 5, 6, 0, 0])

    def crash(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(roots, "write_root", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(recipe)
    summary, _ = train(recipe, resume=True)
    assert (summary["steps"], summary["loss_after"], summary["adapter"]) == (9, 5, "best")


@pytest.mark.slow
def test_the_saved_adapter_has_the_held_out_loss_that_is_reported(tmp_path):
    """Stock PEFT, on the files of the run folder, computes the loss of the summary."""
    recipe = make_recipe(tmp_path)
    summary, _ = train(recipe)
    run = assembled(recipe, fill=False)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    total = targets = 0
    for index in range(run.val_batches.steps_per_epoch):
        for batch in run.val_batches.step(0, index):
            with torch.no_grad():
                logits = model(**batch.inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            total, targets = total + loss.item(), targets + batch.supervised
    assert total / targets == same_loss(summary["loss_after"])


# -- plain LoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_without_pruning_it_trains_as_peft_does(tmp_path, scaling, kind):
    settings = [
        "rank.init=4",
        "rank.budget=4",
        "adapter.scaling=rslora",
        "adapter.alpha=16",
        f"adapter.scaling={scaling}",
        "train.weight_decay=0.1",
    ]
    run = assembled(make_recipe(tmp_path, *settings, kind=kind), fill=False)
    run.model.eval()  # GPT-2 has dropout of its own
    model = AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path).eval()
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_rslora=scaling == "rslora",
                        fan_in_fan_out=kind == "gpt2")  # fmt: skip
    model = get_peft_model(model, config)
    for name, layer in run.trained.layers.items():
        theirs = model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.a_CI)
        assert theirs.scaling["default"] == pytest.approx(layer.scale)
        assert not theirs.lora_B["default"].weight.any()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == run.trained.parameters
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.1)

    ours, theirs = [], []
    for number in range(1, 13):
        micro_batches = run.batches.step(*divmod(number - 1, run.batches.steps_per_epoch))
        ours.append(step(run, micro_batches)["loss"])
        run.progress.step += 1
        targets, losses = sum(batch.supervised for batch in micro_batches), []
        for batch in micro_batches:
            logits = model(**batch.inputs).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum") / targets
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * rate_share(number, run.total_steps, run.recipe.train)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(sum(losses))
    assert ours == same_curve(theirs)
    assert ours[-1] < ours[0] - 0.2


def test_full_fine_tuning_trains_everything_and_saves_a_model(tmp_path):
    recipe = make_recipe(tmp_path, "adapter.variant=full", "train.learning_rate=1e-3")
    summary, events = train(recipe)
    before = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert summary["parameters"] == before.num_parameters()
    unchanged = [
        name for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True) if one.equal(two)
    ]
    assert unchanged == []
    assert summary["loss_after"] < summary["loss_before"] - 0.2
    assert not [event for event in events if event["event"] in ("prune", "gauge")]


# -- classification --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_classifier_trains_its_head_and_reports_accuracy(tmp_path):
    settings = [
        "train.max_steps=40",
        "train.micro_batch_size=16",
        "train.learning_rate=1e-2",
        "adapter.scaling=rslora",
        "adapter.alpha=4",
    ]
    recipe = make_recipe(tmp_path, *settings, kind="bert")
    summary, _ = train(recipe)
    folder = tmp_path / "out"
    record = run_folder.read_record(folder)
    assert record["data"]["labels"] == ["few", "many"]
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["accuracy_after"] == record["summary"]["accuracy_after"] == 1.0
    assert "perplexity_after" not in summary

    tensors = load_file(folder / "adapter_model.safetensors")
    head = {name for name in tensors if "classifier" in name}
    assert head == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert summary["parameters"] == adapter_numbers(folder)  # the head does not count
    start = assembled(recipe, fill=False)
    assert not torch.equal(start.model.classifier.weight, tensors["base_model.model.classifier.weight"])

    base = AutoModelForSequenceClassification.from_pretrained(recipe.model.name_or_path, num_labels=2)
    model = PeftModel.from_pretrained(base, folder).eval()
    correct = 0
    for index in range(start.val_batches.steps_per_epoch):
        for batch in start.val_batches.step(0, index):
            correct += (model(**batch.inputs).logits.argmax(-1) == batch.labels).sum().item()
    assert correct == record["data"]["val_rows"] == 8


# -- trackers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_gets_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_recipe(tmp_path, "train.report_to=[tensorboard]", "train.max_steps=4"))
    (written,) = {
        path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*") if "train/loss" in scalars(path)
    }
    assert written.is_relative_to(tmp_path / "out" / "tensorboard")
    reader = EventAccumulator(str(written)).Reload()
    told = [event.value for event in reader.Scalars("train/loss")]
    expected = [line["loss"] for line in lines(tmp_path / "out" / "metrics.jsonl") if line["event"] == "train"]
    assert told == pytest.approx(expected)
    assert [event.step for event in reader.Scalars("eval/loss")] == [0, 4]


def scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path)).Reload().Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path):
    if importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    with pytest.raises(MachineError, match="mlflow is not installed") as stopped:
        train(make_recipe(tmp_path, "train.report_to=[mlflow]"))
    assert stopped.value.exit_code == 3
    assert "pip install" in stopped.value.hint
    assert not (tmp_path / "out").exists()


# -- golden ----------------------------------------------------------------------------------------------------------


def test_golden_run(tmp_path, monkeypatch):
    """20 steps on a fixed model and fixed rows: the losses of every step, and exactly the ranks of every event.

    They hold on any processor: rounding moves the losses by 1e-7 (AVX-512, AVX2, none of them; Intel and AMD), and no
    score is so near to the threshold that a thousandth more or less would change what goes.
    """
    decided, clear = select.select_K, []

    def listening(scores_K, *args, **kwargs):
        keep_K, threshold = decided(scores_K, *args, **kwargs)
        noise = torch.rand(20, len(scores_K), generator=torch.Generator().manual_seed(0)) * 2e-3 - 1e-3
        clear.extend(torch.equal(decided(scores_K * (1 + part), *args, **kwargs)[0], keep_K) for part in noise)
        return keep_K, threshold

    monkeypatch.setattr(control, "select_K", listening)
    train(make_recipe(tmp_path, "train.max_steps=20"))
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    events = lines(tmp_path / "out" / "rank_events.jsonl")
    found = {
        "losses.jsonl": [{key: line[key] for key in ("event", "step", "loss")} for line in metrics if "loss" in line],
        "rank_events.jsonl": [
            {key: event[key] for key in ("event", "step", "parameters", "ranks")} for event in events
        ],
    }
    if os.environ.get("DYNLORA_REMAKE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        for name, rows in found.items():
            (GOLDEN / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = {name: [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()] for name in found}
    assert found["rank_events.jsonl"] == golden["rank_events.jsonl"]
    assert [(row["event"], row["step"]) for row in found["losses.jsonl"]] == [
        (row["event"], row["step"]) for row in golden["losses.jsonl"]
    ]
    assert [row["loss"] for row in found["losses.jsonl"]] == same_curve([row["loss"] for row in golden["losses.jsonl"]])
    assert len(clear) == 3 * 20
    assert all(clear), "the golden run must not hang on rounding; choose other rows"
