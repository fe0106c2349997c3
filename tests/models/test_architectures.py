"""Each architecture from a tiny random model of its config: train with a pruning event, save, load in PEFT, merge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import sweep_architectures as sweep
import torch
import transformers
from numeric import assert_close_to_truth, in_double, rounding
from packaging.version import Version
from sweep_architectures import STEPS, TYPES, try_type
from sweep_models import write_tiny
from tiny_architectures import CASES, CLASSES, LANGUAGE, SEQ2SEQ, write_model
from tiny_run import make_recipe, train, write_rows

from dynlora_cli import plugins
from dynlora_cli.adapters import write
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.commands import export, prune
from dynlora_cli.commands.merge import into_base
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.evaluation import peft_check
from dynlora_cli.runs.folder import read_record

# Roundings on the way to a logit: in each of two blocks (or four, of two stacks), sums over up to 32 and 64 numbers.
TERMS = 4 * (32 + 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[0, 45, 60, 33, 71, 80, 12], [0, 90, 22, 53, 64, 101, 7]])
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_trained_pruned_saved_loaded_and_merged(folder, kind):
    _, settings, task, layers = CASES[kind]
    write_model(folder / kind, kind)
    overrides = [f"model.task={task}", "train.max_steps=3", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=1"]
    if task == CLASSES:
        rows = write_rows(folder / f"{kind}-rows.jsonl", labelled=True)
        overrides.append(f"dataset.train=[{rows}]")
    recipe = make_recipe(folder, *overrides, "eval.steps=3", kind=kind, out=f"out-{kind}")
    summary, events = train(recipe)
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert len(summary["ranks"]) == layers
    assert summary["loss_after"] != summary["loss_before"]
    assert summary["peft_check"]["problem"] is None
    assert summary["peft_check"]["difference"] < rounding(torch.float32, TERMS)

    notes = events[0]["notes"]
    of_experts = [note for note in notes if "experts (4 in each of 2 blocks) are not adapted" in note]
    assert len(of_experts) == ("num_experts_per_tok" in settings)
    auto = getattr(transformers, plugins.declared("tasks", task, "AUTO_MODEL"))
    adapter = read_adapter(Path(recipe.output_dir))
    more = {"num_labels": 2} if task == CLASSES else {}
    untouched = logits(auto.from_pretrained(folder / kind, **more))
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(folder / kind, **more), adapter.folder)
    expected = logits(in_double(theirs))
    assert (expected - untouched).abs().max() > 1e-3
    with attached(ours := auto.from_pretrained(folder / kind, **more), adapter):
        assert_close_to_truth(logits(ours), expected, terms=TERMS)
    merged = into_base(adapter, folder / f"merged-{kind}")
    assert merged["check"]["kl"] < rounding(torch.float32, 64)
    assert_close_to_truth(logits(auto.from_pretrained(folder / f"merged-{kind}")), expected, terms=TERMS)


# A dozen that stand for others; `scripts/sweep` and the long suite have all. The other tests of this file have more.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("deepseek_v3", LANGUAGE),
        ("glm4_moe", LANGUAGE),
        ("qwen3_next", LANGUAGE),
        ("beam", LANGUAGE),
        ("gpt_oss", LANGUAGE),
        ("granitemoehybrid", LANGUAGE),
        ("gemma4_text", LANGUAGE),
        ("hunyuan_v1_moe", LANGUAGE),
        ("laguna", LANGUAGE),
        ("roc_bert", LANGUAGE),
        ("m2m_100", SEQ2SEQ),
        ("distilbert", CLASSES),
    ],
)
def test_stock_peft_reads_what_was_trained(kind, task, tmp_path):
    if kind in ("qwen3_next", "granitemoehybrid") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("with transformers 5.20 the check of a merge computes something else, and refuses it")
    result = try_type(tmp_path, kind, task)
    assert {step: result.get(step) for step in STEPS} == dict.fromkeys(STEPS, "ok"), result
    assert result["moved"] > 0.01


@pytest.mark.long
@pytest.mark.parametrize("task", TYPES)
def test_what_works_in_the_table_still_does(task, tmp_path):
    command = [sys.executable, sweep.__file__, "--task", task, "--results", tmp_path / "results.jsonl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    now = {line["type"]: line for line in sweep.read_results(tmp_path / "results.jsonl")}
    before = {line["type"]: line for line in sweep.read_results(sweep.RESULTS) if line["task"] == task}
    assert before
    worse = {
        kind: {step: now[kind].get(step) for step in line if line[step] == "ok" and now[kind].get(step) != "ok"}
        for kind, line in before.items()
        if kind in now  # another version of transformers may have others
    }
    assert not {kind: steps for kind, steps in worse.items() if steps}


def test_the_table_is_that_of_the_results():
    assert sweep.table(sweep.read_results(sweep.RESULTS)) == sweep.TABLE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hira", "vera"])
def test_kinds_that_peft_does_not_change_name_every_module(variant, tmp_path):
    write_tiny(tmp_path / "glm4_moe", "glm4_moe", LANGUAGE)
    summary, _ = train(make_recipe(tmp_path, f"adapter.variant={variant}", kind="glm4_moe"))
    assert summary["peft_check"]["problem"] is None


def test_what_peft_does_not_adapt_in_a_mamba_is_left_out_and_said(tmp_path):
    write_tiny(tmp_path / "mamba", "mamba", LANGUAGE)
    recipe = make_recipe(tmp_path, "train.max_steps=2", kind="mamba")
    summary, events = train(recipe)
    assert summary["ranks"]
    assert not [name for name in summary["ranks"] if name.endswith("out_proj")]
    assert [note for note in events[0]["notes"] if ".out_proj (2): not adapted: PEFT adapts no out_proj" in note]
    with pytest.raises(UsageError, match="'out_proj': PEFT adapts no out_proj in a model of type mamba"):
        train(make_recipe(tmp_path, "adapter.target_modules=[out_proj]", kind="mamba", out="other"))


@pytest.mark.slow
def test_dora_of_what_peft_takes_for_experts_is_refused(tmp_path):
    write_tiny(tmp_path / "glm4_moe", "glm4_moe", LANGUAGE)
    with pytest.raises(UsageError, match="PEFT has no dora for model"):
        train(make_recipe(tmp_path, "adapter.variant=dora", kind="glm4_moe"))
    recipe = make_recipe(tmp_path, "adapter.variant=dora", "adapter.target_modules=attention", kind="glm4_moe")
    assert train(recipe)[0]["ok"]


@pytest.mark.slow
def test_a_run_whose_adapter_peft_reads_otherwise_ends_with_4_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "taken_for_experts", lambda model_type: frozenset())  # as before version 0.2
    write_tiny(tmp_path / "glm4_moe", "glm4_moe", LANGUAGE)
    with pytest.raises(MeasureError, match="PEFT puts nothing into ") as caught:
        train(make_recipe(tmp_path, kind="glm4_moe"))
    assert caught.value.exit_code == 4
    assert "the adapter is kept" in caught.value.hint
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "PEFT puts nothing" in read_record(tmp_path / "out")["summary"]["peft_check"]["problem"]


def test_without_peft_a_run_says_that_nobody_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_check.importlib.util, "find_spec", lambda name: None)
    summary, events = train(make_recipe(tmp_path, "train.max_steps=2"))
    assert summary["peft_check"] == {"checked": False, "reason": peft_check.ABSENT}
    assert events.count({"event": "note", "text": peft_check.ABSENT}) == 1


@pytest.mark.slow
def test_other_commands_ask_peft_too(tmp_path):
    write_tiny(tmp_path / "glm4_moe", "glm4_moe", LANGUAGE)
    train(make_recipe(tmp_path, kind="glm4_moe"))
    adapter = read_adapter(tmp_path / "out")
    assert peft_check.check_files(adapter, tmp_path / "out")["problem"] is None
    smaller = prune.run(prune.Request(tmp_path / "out", parse_budget(1), tmp_path / "small", policy="magnitude"))
    assert smaller["peft_check"]["problem"] is None
    exported = export.run(tmp_path / "out", "uniform", tmp_path / "uniform")
    assert exported["peft_check"]["problem"] is None

    save(adapter, tmp_path / "uniform", for_peft=False)  # as for readers who do not look for experts
    assert "PEFT puts nothing into" in peft_check.check_files(adapter, tmp_path / "uniform")["problem"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("kind", "task", "targets"),
    [
        ("zamba", CLASSES, ["layers.1.shared_transf.self_attn.q_proj"]),  # the files have its weight
        ("zamba", CLASSES, ["layers.3.shared_transf.self_attn.q_proj"]),  # which this one shares
        ("zamba", LANGUAGE, ["lm_head"]),  # no more sharing in the config, of the blocks neither
        ("bart", SEQ2SEQ, ["lm_head"]),  # the head, and the tables of encoder and decoder
        ("t5", SEQ2SEQ, ["shared"]),
    ],
)
def test_a_weight_of_several_places_is_merged_where_its_components_are(kind, task, targets, tmp_path):
    write_tiny(tmp_path / kind, kind, task)
    auto = getattr(transformers, plugins.declared("tasks", task, "AUTO_MODEL"))
    kinds = {CLASSES: "SEQ_CLS", SEQ2SEQ: "SEQ_2_SEQ_LM", LANGUAGE: "CAUSAL_LM"}
    config = peft.LoraConfig(task_type=kinds[task], r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(auto.from_pretrained(tmp_path / kind), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with model.disable_adapter():
        assert (sweep.logits(model) - sweep.logits(auto.from_pretrained(tmp_path / kind))).abs().max() < 1e-6
    into_base(read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged")
    assert_close_to_truth(sweep.logits(merged), sweep.logits(model).double(), terms=TERMS)


@pytest.mark.slow
def test_a_model_without_a_table_of_tokens_is_merged(tmp_path):
    result = try_type(tmp_path, "canine", CLASSES)
    assert {step: result.get(step) for step in STEPS} == dict.fromkeys(STEPS, "ok"), result


def test_a_type_that_trains_on_texts_of_one_length_is_refused_by_name(tmp_path):
    write_tiny(tmp_path / "reformer", "reformer", CLASSES)
    rows = write_rows(tmp_path / "rows.jsonl", labelled=True)
    with pytest.raises(UsageError, match="a model of type reformer, which trains only on texts that fill"):
        train(make_recipe(tmp_path, f"model.task={CLASSES}", f"dataset.train=[{rows}]", kind="reformer"))
