"""`dynlora eval --tasks`: tasks of lm-evaluation-harness, offline from files of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import Answer
from eval_helpers import Run, by_peft, foreign
from tiny_run import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer


def own_task(folder: Path, documents: list[dict[str, Any]]) -> Path:
    """A task file of questions with choices, and its documents beside it."""
    (folder / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "own_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "y",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(task))
    return folder / "own.yaml"


@pytest.mark.slow
def test_a_task_of_ones_own(llama: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    """Its numbers are those that the model's own probabilities say, for base and adapter."""
    documents = [{"q": f"sort {n}:", "c": [" a b", " lines"], "y": n % 2} for n in range(6)]
    task = own_task(tmp_path, documents)
    answer = dynlora_eval("--adapter", llama.folder, "--tasks", task, "--limit", 5, "--generate", 0, "--json")
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
def test_only_tasks(dynlora_eval: Callable[..., Answer], tmp_path: Path):
    """An adapter of another tool knows no rows, and tasks need none."""
    adapter = foreign(model_folder(tmp_path), tmp_path / "adapter", target_modules=["q_proj"])
    task = own_task(tmp_path, [{"q": "sort", "c": [" a", " b"], "y": 0}])
    answer = dynlora_eval("--adapter", adapter, "--tasks", task, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    assert report["rows"] == report["tokens"] == 0
    assert report["adapters"][0]["loss"] is None
    assert set(report["tasks"]["own_choice"]) == {"base", "adapter"}
    gated = dynlora_eval("--adapter", adapter, "--tasks", task, "--fail-above", "3", "--json")
    assert (gated.code, "no loss is measured" in gated.json["error"]) == (2, True)


@pytest.mark.slow
def test_tasks_that_do_not_work(llama: Run, dynlora_eval: Callable[..., Answer], tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("task: x\noutput_type: nonsense\ndataset_path: json\n")
    for tasks, code, message in (
        (tmp_path / "broken.yaml", 2, "the harness does not take it"),
        ("hellaswagg", 2, "did you mean 'hellaswag'"),
        ("hellaswag", 3, "neither here nor to be had"),
    ):
        answer = dynlora_eval("--adapter", llama.folder, "--tasks", tasks, "--json")
        assert (answer.code, message in answer.json["error"]) == (code, True), answer.json
