"""`dynlora eval` as a person and a script meet it: the same numbers as training and as PEFT, and every gate and refusal."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from pico import pico_recipe
from test_architecture import fresh
from tiny_run import make_recipe, model_folder, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynlora_cli import evaluate, generation
from dynlora_cli.cli import main
from dynlora_cli.recipe import load_recipe

GOLDEN = Path(__file__).parent / "golden"


class Answer(NamedTuple):
    """What a command left behind; `json` is stdout, which must be one JSON object and nothing else."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def dynlora(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs `dynlora eval ARGUMENTS`."""

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["eval", *map(str, arguments)])
        return Answer(end.value.code or 0, *capfd.readouterr())

    return run


class Run(NamedTuple):
    """A finished run, its recipe file, and what it said."""

    folder: Path
    recipe: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Finished runs by the kind of their model, each trained once; under the module's folder at KIND/out."""
    made: dict[str, Run] = {}
    root = tmp_path_factory.mktemp("eval")

    def of(kind: str) -> Run:
        if kind not in made:
            folder = root / kind
            folder.mkdir()
            # The long way round for one of them: bert's classes hardly come apart in 12 steps of the default rate.
            recipe = make_recipe(folder, "train.learning_rate=2e-2", kind=kind)
            summary, _ = train(recipe)
            path = folder / f"{kind}.yaml"
            path.write_text(path.read_text().replace("0.005", "0.02"))
            made[kind] = Run(folder / "out", path, summary)
        return made[kind]

    return of


@pytest.fixture
def llama(runs: Callable[[str], Run]) -> Run:
    return runs("llama")


def foreign(base: Path, folder: Path, *, classes: int | None = None, **config: Any) -> Path:
    """A LoRA that stock PEFT made on a base, with weights that matter."""
    auto, options = (AutoModelForCausalLM, {}) if classes is None else (AutoModelForSequenceClassification, {})
    options |= {} if classes is None else {"num_labels": classes}
    kind = "CAUSAL_LM" if classes is None else "SEQ_CLS"
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = get_peft_model(
            auto.from_pretrained(base, **options), LoraConfig(r=2, lora_alpha=4, task_type=kind, **config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_losses_that_training_told(kind: str, runs: Callable[[str], Run], dynlora: Callable[..., Answer]):
    folder, _, summary = runs(kind)
    assert abs(summary["loss_before"] - summary["loss_after"]) > 1e-2
    answer = dynlora("--adapter", folder, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    (adapter,) = report["adapters"]
    assert adapter["loss"] == pytest.approx(summary["loss_after"], abs=1e-5)
    assert report["rows"] == 8
    if kind == "bert":
        assert report["base"] is None
        assert "no classifier head of its own" in answer.err
        assert adapter["accuracy"] == pytest.approx(summary["accuracy_after"])
        assert sum(map(sum, adapter["confusion"])) == report["rows"] == report["tokens"]
        assert {"f1", "matthews"} <= set(adapter)
        assert adapter["difference"] is None
    else:
        assert report["base"]["loss"] == pytest.approx(summary["loss_before"], abs=1e-5)
        assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
        difference = adapter["difference"]
        assert difference["to"] == "base"
        assert difference["loss"] == pytest.approx(adapter["loss"] - report["base"]["loss"])
        assert difference["low"] <= difference["loss"] <= difference["high"]
        assert {"bleu", "chrf", "rouge_l", "exact_match", "token_accuracy"} <= set(adapter) & set(report["base"])


@pytest.mark.parametrize("setting", ["model.dtype=bfloat16", "model.load_in_4bit=true", "dataset.packing=true"])
def test_the_loss_of_a_run_in_another_form(setting: str, dynlora: Callable[..., Answer], tmp_path: Path):
    summary, _ = train(make_recipe(tmp_path, setting))
    answer = dynlora("--adapter", tmp_path / "out", "--generate", 2, "--json")
    assert answer.code == 0, answer.err
    rounding = 1e-3 if "bfloat16" in setting else 1e-5  # s is folded into B now, and bf16 has eight bits
    assert answer.json["adapters"][0]["loss"] == pytest.approx(summary["loss_after"], abs=rounding)
    assert answer.json["base"]["loss"] == pytest.approx(summary["loss_before"], abs=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_of_another_tool_has_the_loss_and_the_answers_that_peft_finds(
    dora: bool, dynlora: Callable[..., Answer], tmp_path: Path
):
    base = model_folder(tmp_path)
    adapter = foreign(base, tmp_path / "adapter", use_dora=dora, target_modules="all-linear")
    rows = several_answers(tmp_path / "rows.jsonl")
    answer = dynlora("--adapter", adapter, "--data", tmp_path / "rows.jsonl", "--samples", 3, "--json")
    assert answer.code == 0, answer.err
    model, tokenizer = by_peft(base, adapter), AutoTokenizer.from_pretrained(base)
    report = answer.json
    assert report["adapters"][0]["loss"] == pytest.approx(mean_loss(model, tokenizer, rows), abs=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert report["base"]["loss"] == pytest.approx(mean_loss(plain, tokenizer, rows), abs=1e-5)
    assert report["generated"] == {"prompts": 3, "references": 4}
    assert report["samples"][0]["references"] == ["a b", "first a then b"]
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")
    inputs = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    room = generation.MARGIN + len(tokenizer("first a then b", add_special_tokens=False).input_ids) + 1
    room = max(room, generation.MARGIN + len(tokenizer("names and lines", add_special_tokens=False).input_ids) + 1)
    written = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=1)[0]
    text = tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert report["samples"][0]["answers"][report["adapters"][0]["name"]] == text


def test_a_classifier_of_another_tool(dynlora: Callable[..., Answer], tmp_path: Path):
    base = model_folder(tmp_path, "bert")
    adapter = foreign(base, tmp_path / "adapter", classes=3, target_modules=["query"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {n}", "label": n % 3}) + "\n" for n in range(9)))
    answer = dynlora("--adapter", adapter, "--data", rows, "--json")
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
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


# -- what is evaluated -----------------------------------------------------------------------------------------------


def test_the_newest_run_below_out(llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    """For a person: everything on stderr, the verdict in words."""
    monkeypatch.chdir(llama.folder.parent)
    answer = dynlora()
    assert (answer.code, answer.out) == (0, "")
    assert "\x1b" not in answer.err
    for part in ("perplexity", "BLEU", "is better than base:", "95 % interval", "8 rows"):
        assert part in answer.err


def test_a_recipe_means_its_own_run_and_its_rows(
    llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(llama.folder.parent)
    by_recipe = dynlora(llama.recipe.name, "--generate", 0, "--json").json
    by_folder = dynlora("--adapter", "out", "--generate", 0, "--json").json
    assert by_recipe["adapters"][0].pop("folder") == str(llama.folder)
    assert by_folder["adapters"][0].pop("folder") == "out"
    assert by_recipe["adapters"] == by_folder["adapters"]
    assert not any("trained on other rows" in note for note in by_recipe["notes"])


def test_several_adapters_on_one_base(
    llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    loads = []
    honest = evaluate.base_in_memory
    monkeypatch.setattr(evaluate, "base_in_memory", lambda *given: loads.append(1) or honest(*given))
    other = foreign(llama.folder.parent / "llama", tmp_path / "other", target_modules=["q_proj", "down_proj"])
    answer = dynlora("--adapter", llama.folder, "--adapter", other, "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    assert len(loads) == 1
    first, second = report["adapters"]
    assert (first["name"], second["name"]) == ("out", "other")
    assert report["best"]["name"] == "out"
    assert report["best"]["difference"]["high"] < 0
    assert first["loss"] == pytest.approx(llama.summary["loss_after"], abs=1e-5)
    alone = dynlora("--adapter", other, "--data", llama.recipe, "--generate", 0, "--json").json
    assert alone["adapters"][0]["loss"] == pytest.approx(second["loss"], abs=1e-6), "the first one was taken off again"
    assert "other was trained on other rows" in "".join(report["notes"])


def test_without_the_base_adapters_are_compared_with_the_first(llama: Run, dynlora: Callable[..., Answer]):
    step = llama.folder / "checkpoints" / "step-8"
    answer = dynlora("--adapter", llama.folder, "--adapter", step, "--no-base", "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    first, second = report["adapters"]
    assert report["base"] is None
    assert first["difference"] is None
    assert second["difference"]["to"] == first["name"] == str(llama.folder)


def test_samples_stand_side_by_side(llama: Run, dynlora: Callable[..., Answer]):
    answer = dynlora("--adapter", llama.folder, "--samples", 2, "--generate", 0)
    assert answer.code == 0
    assert answer.err.count("  prompt ") == answer.err.count("  right ") == 2
    assert "BLEU" not in answer.err, "shown, not scored"


# -- gates -----------------------------------------------------------------------------------------------------------


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
def test_a_gate(gate: list[str], code: int, llama: Run, dynlora: Callable[..., Answer]):
    answer = dynlora("--adapter", llama.folder, *gate, "--max-samples", 3, "--json")
    assert answer.code == code, answer.err
    report = answer.json
    assert report["ok"] is (code == 0)
    assert bool(report["failed"]) is (code == 4)
    assert report["adapters"][0]["loss"] > 0, "the numbers are there all the same"
    if code:
        assert gate[0] in report["error"]
        assert answer.err.count("error:") == 1


def test_a_baseline(llama: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    """Against itself it holds; against a better one it fails, by how much decides."""
    report = tmp_path / "report.json"
    once = dynlora("--adapter", llama.folder, "--generate", 0, "--json")
    report.write_text(once.out)
    gate = ("--adapter", llama.folder, "--generate", 0, "--baseline", report, "--json")
    assert dynlora(*gate, "--max-regression", "0%").code == 0
    better = once.json
    better["adapters"][0]["loss"] *= 0.97
    report.write_text(json.dumps(better))
    assert dynlora(*gate, "--max-regression", "4%").code == 0
    answer = dynlora(*gate)
    assert answer.code == 4
    assert "3.1 % above the baseline" in answer.json["error"]
    other_rows = dynlora(*gate, "--max-samples", 3)
    assert (other_rows.code, "other rows" in other_rows.json["error"]) == (2, True)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no run below ./out"),
        (["--fail-below", "acuracy=0.8"], "did you mean 'accuracy'"),
        (["--max-regression", "1%"], "--baseline"),
        (["--baseline", "none.json"], "none.json cannot be read"),
        (["--limit", "3"], "--tasks"),
        (["--tasks", "none.yaml"], "no task file none.yaml"),
        (["none.yaml"], "no recipe at none.yaml"),
        (["folder"], "--adapter folder"),
        (["--data", "none.yaml", "--adapter", "x"], "no recipe at none.yaml"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_before_anything_heavy_loads(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code, loaded, shown = fresh("eval", *arguments)
    assert (code, loaded) == (2, [])
    assert message in " ".join(shown.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_help(dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    """Golden: after a wanted change write the new text with UPDATE_GOLDEN=1."""
    monkeypatch.setenv("COLUMNS", "120")
    answer = dynlora("--help")
    golden = GOLDEN / "help_eval.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(answer.out, encoding="utf-8")
    assert answer == (0, golden.read_text(encoding="utf-8"), "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--adapter", "nowhere"], 2, "nowhere does not exist"),
        (["--adapter", "{run}", "--adapter", "{run}"], 2, "are the same"),
        (["--adapter", "{run}", "--adapter", "{gpt2}"], 2, "different base models"),
        (["--adapter", "{run}", "--fail-below", "accuracy=0.8"], 2, "measured here: token_accuracy"),
        (["--adapter", "{bert}", "--fail-below", "bleu=10"], 2, "measured here: accuracy, f1, matthews"),
        (["--adapter", "{bert}", "--generate", "2"], 2, "no prompts"),
        (["--adapter", "{bert}", "--tasks", "hellaswag"], 2, "--tasks are for causal-lm"),
        (["--adapter", "{run}", "--data", "no.jsonl"], 2, "no.jsonl"),
        (["{recipe}", "--adapter", "{run}", "--data", "no.jsonl"], 2, "both say which rows"),
        (["{recipe}", "--base", "no-such-folder"], 3, "no-such-folder"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_gets_one_message(
    arguments: list[str], code: int, message: str, runs: Callable[[str], Run], dynlora: Callable[..., Answer]
):
    places = {kind: runs(kind).folder for kind in ("gpt2", "bert")}
    places |= {"run": runs("llama").folder, "recipe": runs("llama").recipe}
    answer = dynlora(*(argument.format(**places) for argument in arguments), "--json")
    assert answer.code == code, answer.err
    assert answer.json["ok"] is False
    assert message in " ".join(f"{answer.json['error']} {answer.json['hint']}".split())
    assert answer.err.count("error:") == 1


def test_rows_that_nobody_knows(dynlora: Callable[..., Answer], tmp_path: Path):
    adapter = foreign(model_folder(tmp_path), tmp_path / "adapter", target_modules=["q_proj"])
    answer = dynlora("--adapter", adapter)
    assert (answer.code, "--data FILE" in answer.err) == (2, True)


def test_weights_that_are_not_numbers(llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    honest = evaluate.row_sums

    def poisoned(*given: Any, **options: Any) -> Any:
        sums = honest(*given, **options)
        sums.loss_R[0] = math.nan
        return sums

    monkeypatch.setattr(evaluate, "row_sums", poisoned)
    answer = dynlora("--adapter", llama.folder, "--json")
    assert (answer.code, answer.json["error"]) == (4, "the held-out loss of base is nan")


def test_without_the_extra(llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation, "missing_packages", lambda: ["sacrebleu"])
    answer = dynlora("--adapter", llama.folder, "--json")
    assert answer.code == 0
    assert "bleu" not in answer.json["adapters"][0]
    assert 'pip install "dynlora[eval]"' in answer.err
    asked = dynlora("--adapter", llama.folder, "--generate", 3, "--json")
    assert (asked.code, asked.json["hint"]) == (3, 'pip install "dynlora[eval]"')


def test_without_the_harness(llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch):
    from dynlora_cli import harness

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    answer = dynlora("--adapter", llama.folder, "--tasks", "hellaswag", "--json")
    assert (answer.code, answer.json["hint"]) == (3, 'pip install "dynlora[harness]"')


def test_interrupted(llama: Run, dynlora: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    before = sorted(llama.folder.parent.rglob("*"))
    monkeypatch.setattr(evaluate, "row_sums", lambda *given, **options: os.kill(os.getpid(), signal.SIGINT))
    answer = dynlora("--adapter", llama.folder, "--json")
    assert (answer.code, answer.json["ok"]) == (130, False)
    assert sorted(llama.folder.parent.rglob("*")) == before
    assert not list(tmp_path.iterdir())


# -- conversations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on conversations of one or two turns."""
    folder = tmp_path_factory.mktemp("chat")
    rows = []
    for number in range(30):
        turns = [("user", f"sort {number}"), ("assistant", f"done {number}")] * (1 + number % 2)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"train": [str(folder / "chat.jsonl")], "val_size": 0.2, "max_length": 96}
    path = pico_recipe(folder, dataset=dataset)
    summary, _ = train(load_recipe(path))
    return Run(folder / "out", path, summary)


def test_another_chat_template_is_refused_unless_allowed(chat: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    answer = dynlora("--adapter", chat.folder, "--samples", 2, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["adapters"][0]["loss"] == pytest.approx(chat.summary["loss_after"], abs=1e-5)
    assert answer.json["samples"][0]["references"][0].startswith("done ")
    changed = tmp_path / "changed"
    shutil.copytree(chat.folder, changed)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|bot|>"))
    refused = dynlora("--adapter", changed, "--json")
    assert refused.code == 2
    assert "--allow-template-mismatch" in refused.json["hint"]
    assert refused.json["error"].count("hash") == 1
    allowed = dynlora("--adapter", changed, "--allow-template-mismatch", "--generate", 0, "--json")
    assert allowed.code == 0
    assert any("chat template in use" in note for note in allowed.json["notes"])


def test_an_adapter_trained_without_a_template(chat: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(chat.folder, changed)
    record = json.loads((changed / "dynlora.json").read_text())
    record["chat_template_sha256"] = None
    (changed / "dynlora.json").write_text(json.dumps(record))
    answer = dynlora("--adapter", changed, "--json")
    assert (answer.code, "trained without one" in answer.json["error"]) == (2, True)


def test_a_foreign_adapter_has_no_template_to_compare(chat: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    adapter = foreign(chat.folder.parent / "pico", tmp_path / "adapter", target_modules=["q_proj"])
    answer = dynlora("--adapter", adapter, "--data", chat.folder.parent / "chat.jsonl", "--generate", 0, "--json")
    assert answer.code == 0, answer.err
    assert any("does not say which chat template" in note for note in answer.json["notes"])


# -- lm-evaluation-harness -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_of_ones_own(llama: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    """Its numbers are those that the model's own probabilities say, for base and adapter."""
    documents = [{"q": f"sort {n}:", "c": [" a b", " lines"], "y": n % 2} for n in range(6)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "own_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "y",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    answer = dynlora(
        "--adapter", llama.folder, "--tasks", tmp_path / "own.yaml", "--limit", 5, "--generate", 0, "--json"
    )
    assert answer.code == 0, answer.err
    base = llama.folder.parent / "llama"
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {"base": AutoModelForCausalLM.from_pretrained(base).eval(), "out": by_peft(base, llama.folder)}
    for name, model in models.items():
        right = 0
        for document in documents[:5]:
            sums = []
            for choice in document["c"]:
                start = len(tokenizer(document["q"]).input_ids)
                ids = torch.tensor([tokenizer(document["q"] + choice).input_ids])
                with torch.no_grad():
                    log_p = model(ids).logits[0].log_softmax(-1)
                sums.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
            right += sums.index(max(sums)) == document["y"]
        assert answer.json["tasks"]["own_choice"][name]["acc"] == pytest.approx(right / 5)
    assert "own_choice" in answer.err


@pytest.mark.slow
def test_tasks_that_do_not_work(llama: Run, dynlora: Callable[..., Answer], tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("task: x\noutput_type: nonsense\ndataset_path: json\n")
    for tasks, code, message in (
        (tmp_path / "broken.yaml", 2, "the harness does not take it"),
        ("hellaswagg", 2, "did you mean 'hellaswag'"),
        ("hellaswag", 3, "neither here nor to be had"),
    ):
        answer = dynlora("--adapter", llama.folder, "--tasks", tasks, "--json")
        assert (answer.code, message in answer.json["error"]) == (code, True), answer.json


# -- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.shared
def test_facts_to_sentences(shared: Path, tmp_path: Path):
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
        command = [sys.executable, "-m", "dynlora_cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    trained = shell("train", "facts.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    answer = shell("eval", "--json", "--samples", "1", "--generate", "8", "--fail-above", "3.5")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    (adapter,) = report["adapters"]
    assert adapter["loss"] == pytest.approx(json.loads(trained.stdout)["loss_after"], abs=1e-5)
    assert report["generated"]["references"] > report["generated"]["prompts"] == 8
    assert adapter["difference"]["high"] < -1
    assert adapter["bleu"] > report["base"]["bleu"] + 5
    assert adapter["chrf"] > report["base"]["chrf"]
