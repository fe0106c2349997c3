"""model.task reranker from pairs with a score to a folder that sentence-transformers loads as a CrossEncoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import byte_tokenizer
from tiny_run import assembled, train
from vector_helpers import pairs, scored, vector_recipe

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import dry_run, evaluate, merge, prune
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.data.load import load_data
from dynlora_cli.errors import DataError
from dynlora_cli.evaluation import options
from dynlora_cli.merging.method import Way
from dynlora_cli.tasks import task as tasks

PAIRS = [("count reverse sort", "count words"), ("print", "join lines and more")]


def recipe_of(folder: Path, *overrides: str, rows: Any = None) -> Any:
    return vector_recipe(folder, *overrides, rows=scored() if rows is None else rows, task="reranker")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reranker")
    summary, _ = train(recipe_of(folder))
    return folder / "out", summary


def by_cross_encoder(folder: Path) -> torch.Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    return torch.tensor(model.predict(PAIRS, activation_fn=torch.nn.Identity()))


def ours(folder: Path) -> torch.Tensor:
    adapter = read_adapter(folder)
    place = find_base(adapter)
    tokenizer = read_tokenizer(adapter, place)
    base = base_in_memory(adapter, place, tokenizer)
    inputs = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    with attached(base.model, adapter), torch.no_grad():
        return base.model(**inputs).logits[:, 0]


def test_a_run_is_a_folder_that_cross_encoder_loads(run: tuple[Path, dict[str, Any]]):
    folder, summary = run
    assert summary["peft_check"] == {**summary["peft_check"], "checked": True, "problem": None}
    torch.testing.assert_close(by_cross_encoder(folder), ours(folder), rtol=1e-5, atol=1e-5)
    assert {"spearman_before", "spearman_after"} <= set(summary)


def test_the_card_loads_it_as_what_it_is(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (code,) = re.findall(r"```python\n(.*?)```", (run[0] / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(run[0])
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[0.")


def test_a_dry_run_tells_the_memory(tmp_path: Path):
    assert dry_run.plan(recipe_of(tmp_path))["memory"]["activations"] > 0


def test_so_is_what_it_is_merged_into(run: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, _ = run
    merge.run([folder], "base", tmp_path / "merged", Way("exact"), merge.Wanted())
    torch.testing.assert_close(by_cross_encoder(tmp_path / "merged"), ours(folder), rtol=1e-4, atol=1e-5)


def test_it_is_measured_and_pruned_by_its_own_loss(run: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, summary = run
    report = evaluate.run([folder], None, options.Options(), lambda text: None)
    assert report["adapters"][0]["loss"] == pytest.approx(summary["loss_after"], rel=1e-5)
    assert report["adapters"][0]["spearman"] == pytest.approx(summary["spearman_after"], abs=1e-6)
    found = prune.run(prune.Request(folder, parse_budget(1), tmp_path / "small"))
    assert found["parameters"] < summary["parameters"]


def test_the_loss_is_binary_cross_entropy_of_the_score(tmp_path: Path):
    run = assembled(recipe_of(tmp_path, "train.micro_batch_size=8"))
    (batch,) = run.batches.step(0, 0)
    run.model.eval()
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        run.model(**batch.inputs).logits[:, 0], batch.extra["score_B"], reduction="sum"
    )
    torch.testing.assert_close(run.objective.loss(run.model, batch), wanted)


def test_rows_without_a_score_are_refused(tmp_path: Path):
    recipe = recipe_of(tmp_path, rows=pairs(4))
    with pytest.raises(DataError, match="for reranker there are"):
        load_data(recipe.dataset, byte_tokenizer(), task=tasks.of(recipe.model), seed=0)
