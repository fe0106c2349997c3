"""`dynlora eval`: the same numbers as training and as PEFT, what is evaluated, and gates."""

from __future__ import annotations

import json
import math
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Answer
from eval_helpers import Run, by_peft, foreign
from numeric import same_loss
from peft import PeftModel
from tiny_run import make_recipe, model_folder, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynlora_cli.adapters import base as base_module
from dynlora_cli.commands import evaluate
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.examples import OneText
from dynlora_cli.evaluation import generation
from dynlora_cli.evaluation.held_out_loss import held_out, row_sums
from dynlora_cli.kernels.linear_cross_entropy import Ending


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Nats per token of the completions and their end, one row after the other."""
    total, targets = 0.0, 0
    for row in rows:
        prompt, completion = (tokenizer(row[key], add_special_tokens=False).input_ids for key in row)
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        for place in range(len(prompt), ids.shape[1] - 1):
            total, targets = total - float(log_p[place, ids[0, place + 1]]), targets + 1
    return total / targets


def several_answers(path: Path) -> list[dict[str, str]]:
    """Four rows, two of them with the same prompt."""
    rows = [
        {"prompt": "sort b a: ", "completion": "a b"},
        {"prompt": "count words: ", "completion": "two"},
        {"prompt": "sort b a: ", "completion": "first a then b"},
        {"prompt": "print the names of every line: ", "completion": "names and lines"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# -- the same numbers as everybody else ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_losses_that_training_told(kind: str, runs: Callable[[str], Run], dynlora_eval: Callable[..., Answer]):
    folder, _, summary = runs(kind)
    assert abs(summary["loss_before"] - summary["loss_after"]) > 1e-2
    answer = dynlora_eval("--adapter", folder, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    (adapter,) = report["adapters"]
    assert adapter["loss"] == same_loss(summary["loss_after"])
    assert report["rows"] == 8
    if kind == "bert":
        assert report["base"] is None
        assert "no classifier head of its own" in answer.err
        assert adapter["accuracy"] == pytest.approx(summary["accuracy_after"])
        assert sum(map(sum, adapter["confusion"])) == report["rows"] == report["tokens"]
        assert {"f1", "matthews"} <= set(adapter)
        assert adapter["difference"] is None
    else:
        assert report["base"]["loss"] == same_loss(summary["loss_before"])
        assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
        difference = adapter["difference"]
        assert difference["to"] == "base"
        assert difference["loss"] == pytest.approx(adapter["loss"] - report["base"]["loss"])
        assert difference["low"] <= difference["loss"] <= difference["high"]
        assert {"bleu", "chrf", "rouge_l", "exact_match", "token_accuracy"} <= set(adapter) & set(report["base"])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["model.dtype=bfloat16", "model.load_in_4bit=true", "dataset.packing=true"])
def test_the_loss_of_a_run_in_another_form(setting: str, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    summary, _ = train(make_recipe(tmp_path, setting))
    answer = dynlora_eval("--adapter", tmp_path / "out", "--generate", 2, "--json")
    assert answer.code == 0, answer.err
    rounding = 1e-3 if "bfloat16" in setting else 1e-5  # s is folded into B now, and bf16 has eight bits
    assert answer.json["adapters"][0]["loss"] == pytest.approx(summary["loss_after"], abs=rounding)
    assert answer.json["base"]["loss"] == same_loss(summary["loss_before"])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_of_another_tool_has_the_loss_and_the_answers_that_peft_finds(
    dora: bool, dynlora_eval: Callable[..., Answer], tmp_path: Path
):
    base = model_folder(tmp_path)
    adapter = foreign(base, tmp_path / "adapter", use_dora=dora, target_modules="all-linear")
    rows = several_answers(tmp_path / "rows.jsonl")
    answer = dynlora_eval("--adapter", adapter, "--data", tmp_path / "rows.jsonl", "--samples", 3, "--json")
    assert answer.code == 0, answer.err
    model, tokenizer = by_peft(base, adapter), AutoTokenizer.from_pretrained(base)
    report = answer.json
    assert report["adapters"][0]["loss"] == same_loss(mean_loss(model, tokenizer, rows))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert report["base"]["loss"] == same_loss(mean_loss(plain, tokenizer, rows))
    assert report["generated"] == {"prompts": 3, "references": 4}
    assert report["samples"][0]["references"] == ["a b", "first a then b"]
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")
    inputs = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    room = generation.MARGIN + len(tokenizer("first a then b", add_special_tokens=False).input_ids) + 1
    room = max(room, generation.MARGIN + len(tokenizer("names and lines", add_special_tokens=False).input_ids) + 1)
    written = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=1)[0]
    text = tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert report["samples"][0]["answers"][report["adapters"][0]["name"]] == text


def test_a_classifier_of_another_tool(dynlora_eval: Callable[..., Answer], tmp_path: Path):
    base = model_folder(tmp_path, "bert")
    adapter = foreign(base, tmp_path / "adapter", classes=3, target_modules=["query"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {n}", "label": n % 3}) + "\n" for n in range(9)))
    answer = dynlora_eval("--adapter", adapter, "--data", rows, "--json")
    assert answer.code == 0, answer.err
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), adapter
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = [tokenizer(f"text {n}", return_tensors="pt").input_ids for n in range(9)]
        logits = torch.cat([model(input_ids=ids).logits for ids in texts])
    labels = torch.arange(9) % 3
    (found,) = answer.json["adapters"]
    assert found["loss"] == same_loss(torch.nn.functional.cross_entropy(logits, labels).item())
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_classes_that_an_adapter_does_not_know_are_not_guessed(dynlora_eval: Callable[..., Answer], tmp_path: Path):
    """PEFT saves no names of classes; those of the rows could be in any order."""
    base = model_folder(tmp_path, "bert")
    adapter = foreign(base, tmp_path / "adapter", classes=2, target_modules=["query"])
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "spam"}\n{"text": "b", "label": "ham"}\n')
    answer = dynlora_eval("--adapter", adapter, "--data", tmp_path / "rows.jsonl", "--json")
    assert (answer.code, "'spam' is not among" in answer.json["error"]) == (2, True)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n')
    answer = dynlora_eval("--adapter", adapter, "--data", tmp_path / "rows.jsonl", "--json")
    assert answer.code == 0, "one class of two is enough to measure on"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sums_of_rows_are_those_of_the_whole_from_fewer_logits_where_the_head_must_stay(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path, kind)).eval()
    examples = [OneText([0, *range(20, 40)], [-100] * (9 + n) + list(range(28 + n, 40)), n) for n in range(5)]
    batches = [Batches.in_order(examples, micro_batch_size=2, max_length=32, pad_id=1).step(0, n)[0] for n in range(3)]
    whole = held_out(model, batches)
    monkeypatch.setattr(Ending, "fused", False)
    made: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, made_BTV: made.append(made_BTV.shape[1]))
    sums = row_sums(model, batches)
    assert sums.loss == same_loss(whole["loss"])
    assert sums.targets == whole["tokens"]
    assert sums.targets_R.tolist() == [example.supervised() for example in examples]
    assert made == [12, 10, 8], "positions with a target in some row of the batch, of 21"
    one = row_sums(model, [Batches.in_order(examples[3:4], micro_batch_size=1, max_length=32, pad_id=1).step(0, 0)[0]])
    assert one.loss_R[0] == same_loss(sums.loss_R[3])


# -- what is evaluated -----------------------------------------------------------------------------------------------


def test_the_newest_run_below_out(llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    """For a person: everything on stderr, the verdict in words."""
    monkeypatch.chdir(llama.folder.parent)
    answer = dynlora_eval()
    assert (answer.code, answer.out) == (0, "")
    assert "\x1b" not in answer.err
    for part in ("perplexity", "BLEU", "is better than base:", "95 % interval", "8 rows"):
        assert part in answer.err


def test_a_recipe_means_its_own_run_and_its_rows(
    llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(llama.folder.parent)
    by_recipe = dynlora_eval(llama.recipe.name, "--generate", 0, "--json").json
    by_folder = dynlora_eval("--adapter", "out", "--generate", 0, "--json").json
    assert by_recipe["adapters"][0].pop("folder") == str(llama.folder)
    assert by_folder["adapters"][0].pop("folder") == "out"
    assert by_recipe["adapters"] == by_folder["adapters"]
    assert not any("trained on other rows" in note for note in by_recipe["notes"])


def test_several_adapters_on_one_base(
    llama: Run, dynlora_eval: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    loads = []
    honest = base_module.base_in_memory
    monkeypatch.setattr(evaluate, "base_in_memory", lambda *given: loads.append(1) or honest(*given))
    other = foreign(llama.folder.parent / "llama", tmp_path / "other", target_modules=["q_proj", "down_proj"])
    answer = dynlora_eval("--adapter", llama.folder, "--adapter", other, "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    assert len(loads) == 1
    first, second = report["adapters"]
    assert (first["name"], second["name"]) == ("out", "other")
    assert report["best"]["name"] == "out"
    assert report["best"]["difference"]["high"] < 0
    assert first["loss"] == same_loss(llama.summary["loss_after"])
    alone = dynlora_eval("--adapter", other, "--data", llama.recipe, "--generate", 0, "--json").json
    assert alone["adapters"][0]["loss"] == same_loss(second["loss"]), "the first one was taken off again"
    assert "other was trained on other rows" in "".join(report["notes"])


def test_without_the_base_adapters_are_compared_with_the_first(llama: Run, dynlora_eval: Callable[..., Answer]):
    step = llama.folder / "checkpoints" / "step-8"
    answer = dynlora_eval("--adapter", llama.folder, "--adapter", step, "--no-base", "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    first, second = report["adapters"]
    assert report["base"] is None
    assert first["difference"] is None
    assert second["difference"]["to"] == first["name"] == str(llama.folder)


def test_samples_stand_side_by_side(llama: Run, dynlora_eval: Callable[..., Answer]):
    answer = dynlora_eval("--adapter", llama.folder, "--samples", 2, "--generate", 0)
    assert answer.code == 0
    assert answer.err.count("  prompt ") == answer.err.count("  right ") == 2
    assert "BLEU" not in answer.err, "shown, not scored"


# -- thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (["--fail-above", "100"], 0),
        (["--fail-above", "0.5"], 4),
        (["--fail-below", "token_accuracy=0"], 0),
        (["--fail-below", "token_accuracy=0.99"], 4),
        (["--fail-below", "bleu=99", "--fail-above", "100"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_gate(gate: list[str], code: int, llama: Run, dynlora_eval: Callable[..., Answer]):
    answer = dynlora_eval("--adapter", llama.folder, *gate, "--max-samples", 3, "--json")
    assert answer.code == code, answer.err
    report = answer.json
    assert report["ok"] is (code == 0)
    assert bool(report["failed"]) is (code == 4)
    assert report["adapters"][0]["loss"] > 0, "the numbers are there all the same"
    if code:
        assert gate[0] in report["error"]
        assert answer.err.count("error:") == 1


def test_a_baseline(llama: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    """Against itself it holds; against a better one it fails, by how much decides."""
    report = tmp_path / "report.json"
    once = dynlora_eval("--adapter", llama.folder, "--generate", 0, "--json")
    report.write_text(once.out)
    gate = ("--adapter", llama.folder, "--generate", 0, "--baseline", report, "--json")
    assert dynlora_eval(*gate, "--max-regression", "0%").code == 0
    better = once.json
    better["adapters"][0]["loss"] *= 0.97
    report.write_text(json.dumps(better))
    assert dynlora_eval(*gate, "--max-regression", "4%").code == 0
    answer = dynlora_eval(*gate)
    assert answer.code == 4
    assert "3.1 % above the baseline" in answer.json["error"]
    other_rows = dynlora_eval(*gate, "--max-samples", 3)
    assert (other_rows.code, "other rows" in other_rows.json["error"]) == (2, True)


# -- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.shared
def test_facts_to_sentences(shared: Path, tmp_path: Path, warm: Path):
    """A real model and real rows with several references each, as a shell runs it, in a folder of its own."""
    rows = (shared / "data" / "e2e_nlg" / "valid_clean.jsonl").read_text().splitlines()[:1500]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    recipe = {
        "model": str(shared / "models" / "stories3M"),
        "dataset": {"train": ["rows.jsonl"], "val_size": 0.1, "max_length": 256},
        "rank": {"budget": 2},
        "train": {"micro_batch_size": 16, "learning_rate": 2e-3, "max_steps": 40},
        "output_dir": "out/facts",
    }
    (tmp_path / "facts.yaml").write_text(json.dumps(recipe))

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(warm), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    trained = shell("train", "facts.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    answer = shell("eval", "--json", "--samples", "1", "--generate", "8", "--fail-above", "3.5")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    (adapter,) = report["adapters"]
    assert adapter["loss"] == same_loss(json.loads(trained.stdout)["loss_after"])
    assert report["generated"]["references"] > report["generated"]["prompts"] == 8
    assert adapter["difference"]["high"] < -1
    assert adapter["bleu"] > report["base"]["bleu"] + 5
    assert adapter["chrf"] > report["base"]["chrf"]
