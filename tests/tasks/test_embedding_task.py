"""model.task embedding from rows to a folder that sentence-transformers loads, with the same vectors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import byte_tokenizer, dataset
from tiny_run import assembled, train
from torch import Tensor
from vector_helpers import pairs, scored, vector_recipe, written

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import dry_run, evaluate, export, merge, prune
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, Interrupted, UsageError
from dynlora_cli.evaluation import options
from dynlora_cli.merging.method import Way
from dynlora_cli.tasks import task as tasks
from dynlora_cli.tasks.embedding.reading import reading_of

TEXTS = ["print 3?", "3 print join words", "an altogether different text, which is longer", "x"]


def notes(events: list[dict[str, Any]]) -> str:
    start = next(event for event in events if event["event"] == "start")
    return "\n".join([*start["notes"], *(event["text"] for event in events if event["event"] == "note")])


def our_vectors(folder: Path, texts: list[str], longest: int = 64) -> Tensor:
    """Of the adapter in a folder, by this program's own code."""
    adapter = read_adapter(folder)
    place = find_base(adapter)
    tokenizer = read_tokenizer(adapter, place)
    base = base_in_memory(adapter, place, tokenizer)
    reading, _ = reading_of(place.options, 64)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with attached(base.model, adapter), torch.no_grad():
        return reading.vectors(base.model, {name: inputs[name] for name in ("input_ids", "attention_mask")})


def their_vectors(folder: Path, texts: list[str], **how: Any) -> Tensor:
    """Of a folder, by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(texts, **how))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("llama", "last")])
def test_a_run_is_a_folder_that_sentence_transformers_loads(tmp_path: Path, kind: str, pooling: str):
    summary, events = train(vector_recipe(tmp_path, kind=kind))
    folder = tmp_path / "out"
    assert summary["peft_check"] == {**summary["peft_check"], "checked": True, "problem": None}
    assert f"pooling {pooling}, length 1 (by default" in notes(events)
    ours, theirs = our_vectors(folder, TEXTS), their_vectors(folder, TEXTS)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    base = their_vectors(Path(summary["model"]), TEXTS)
    assert not torch.allclose(theirs, torch.nn.functional.normalize(base), atol=1e-3)  # the adapter is in it
    assert not any("pooler" in name for name in summary["ranks"])


@pytest.mark.slow
def test_training_lowers_the_loss_and_tells_how_well_held_out_rows_rank(tmp_path: Path):
    summary, events = train(vector_recipe(tmp_path, "train.max_steps=40", "eval.steps=20"))
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["recall@1_after"] >= summary["recall@1_before"]
    first, last = (event for event in events if event["event"] == "eval" and event["step"] in (0, 40))
    assert {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "passages"} <= set(first)
    assert first["passages"] == last["passages"] > 1


# -- rows ------------------------------------------------------------------------------------------------------------


def load(recipe: Recipe) -> Data:
    task = tasks.of(recipe.model)
    return load_data(recipe.dataset, byte_tokenizer(), task=task, seed=0)


def test_texts_have_their_prompts_and_the_special_tokens_of_the_tokenizer(tmp_path: Path):
    rows = [{"anchor": "q", "positive": "p", "negative": "n", "negative_1": "m"}, {"anchor": "r", "positive": "s"}]
    prompts = ("model.query_prompt='query: '", "model.passage_prompt='passage: '", "dataset.val_size=0")
    data = load(vector_recipe(tmp_path, *prompts, rows=rows))
    decoded = [[byte_tokenizer().decode(line) for line in each.lines] for each in data.train]
    assert decoded == [
        ["<s>query: q", "<s>passage: p", "<s>passage: n", "<s>passage: m"],
        ["<s>query: r", "<s>passage: s"],
    ]


def test_rows_of_one_passage_fall_on_one_side(tmp_path: Path):
    data = load(vector_recipe(tmp_path, rows=pairs(40)))
    sides = [{tuple(each.lines[1]) for each in part} for part in (data.train, data.val)]
    assert len(data.val) == 10
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "", "passage": "p"}, "1 row with an empty text"),
        ({"query": "q", "passage": " "}, "1 row with an empty text"),
        ({"query": "q", "passage": "p", "negative": "  "}, "1 row with an empty text"),
    ],
)
def test_rows_with_an_empty_text_are_dropped_and_counted(tmp_path: Path, row: dict, said: str):
    data = load(vector_recipe(tmp_path, "dataset.val_size=0", rows=[*pairs(4), row]))
    assert len(data.train) == 4
    assert said in "\n".join(data.notes)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([*pairs(4), {"query": "q", "passage": None}], (), "'passage' is null"),
        ([*pairs(4), {"query": "q", "passage": "p", "negatives": [3]}], (), "holds int, expected text"),
        (pairs(4), ("model.loss=triplet",), "triplet needs a negative in every row"),
        (pairs(4), ("model.loss=cosent",), "cosent is for pairs with a score"),
        (scored(4), ("model.loss=mnrl",), "mnrl is for pairs without a score"),
        ([{"sentence1": "a", "sentence2": "b", "score": 3}], (), "'score' is 3, expected a number from 0 to 1"),
        ([{"a": "x", "b": "y"}], (), "for embedding there are"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_place(tmp_path: Path, rows: list, settings: tuple, said: str):
    with pytest.raises(DataError, match=said) as raised:
        load(vector_recipe(tmp_path, *settings, rows=rows))
    assert "rows.jsonl:" in str(raised.value)


def test_pairs_with_and_without_scores_do_not_mix(tmp_path: Path):
    recipe = vector_recipe(tmp_path)
    more = written(tmp_path / "scored.jsonl", scored(4))
    both = dataset(*(source.path for source in recipe.dataset.train), str(more))
    with pytest.raises(DataError, match="pairs with a score among pairs without one"):
        load_data(both, byte_tokenizer(), task=tasks.of(recipe.model), seed=0)


def test_scores_that_are_all_one_are_told_where_they_teach_nothing(tmp_path: Path):
    alike = [row | {"score": 1.0} for row in scored(4)]
    said = "every row has the score 1.0: model.loss cosent, which learns from scores that differ, learns nothing"
    assert said in "\n".join(load(vector_recipe(tmp_path, rows=alike)).notes)
    assert "every row" not in "\n".join(load(vector_recipe(tmp_path, rows=scored(4))).notes)
    assert "every row" not in "\n".join(load(vector_recipe(tmp_path, "model.loss=cosine", rows=alike)).notes)


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "theirs"),
    [
        (pairs(8, negatives=2), (), "MultipleNegativesRankingLoss"),
        (pairs(8, negatives=1), ("model.loss=triplet", "model.margin=0.3"), "TripletLoss"),
        (scored(8), (), "CoSENTLoss"),
        (scored(8), ("model.loss=cosine",), "CosineSimilarityLoss"),
    ],
)
def test_a_batch_has_the_loss_of_sentence_transformers(tmp_path: Path, rows: list, settings: tuple, theirs: str):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    unique = rows[::2] if "passage" in rows[0] else rows  # no passage twice
    size = f"train.micro_batch_size={len(unique)}"
    recipe = vector_recipe(tmp_path, *settings, size, "dataset.val_size=0", "model.normalize=false", rows=unique)
    run = assembled(recipe, fill=False)
    run.model.eval()
    (batch,) = run.batches.step(0, 0)
    found = run.objective.loss(run.model, batch) / batch.supervised

    model = SentenceTransformer(recipe.model.name_or_path, device="cpu")
    order = [unique[row] for row in batch.rows]
    keys = ("sentence1", "sentence2") if "score" in unique[0] else ("query", "passage")
    columns = [[row[key] for row in order] for key in keys]
    columns += [list(texts) for texts in zip(*(row.get("negatives", []) for row in order), strict=True)]
    kind = getattr(losses, theirs)
    loss = kind(model, triplet_margin=0.3) if theirs == "TripletLoss" else kind(model)
    labels = torch.tensor([float(row.get("score", 0)) for row in order])
    wanted = loss([model.preprocess(column) for column in columns], labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_mini_batches_give_the_same_gradient_as_one_batch(tmp_path: Path, dropout: float):
    gradients = []
    for size in ("null", "3"):
        size = f"model.mini_batch_size={size}"
        run = assembled(vector_recipe(tmp_path, size, "train.micro_batch_size=8", rows=pairs(16, negatives=1)))
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        (batch,) = run.batches.step(0, 0)
        torch.manual_seed(0)
        loss = run.objective.loss(run.model, batch)
        loss.backward()
        gradients.append((loss.item(), run.trained.values.grad.clone()))
    (loss, whole), (again, parts) = gradients
    if not dropout:  # which is drawn otherwise for parts
        assert again == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert parts.abs().max() > 1e-3
    assert np.isfinite(again)


def test_dropout_is_the_same_in_both_passes_of_a_mini_batch(tmp_path: Path):
    """Else the gradient would be that of vectors which no loss was computed of."""
    run = assembled(vector_recipe(tmp_path, "model.mini_batch_size=2", rows=pairs(16)))
    (batch,) = run.batches.step(0, 0)
    seen: list[Tensor] = []
    judge = batch.judge
    whole = type(judge.reading).vectors

    def look(self: Any, model: Any, inputs: Any) -> Tensor:
        seen.append(whole(self, model, inputs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(judge.reading), "vectors", look)
        judge.loss(run.model, batch).backward()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(second) == 4
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(first[0], whole(judge.reading, run.model, judge._parts(batch)[0][0]))  # there is dropout


# -- how vectors are made --------------------------------------------------------------------------------------------


def sentence_files(base: Path, *, mode: str = "cls", normalize: bool = False, **more: Any) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(base))
    transformer.max_seq_length = 16
    modules = [transformer, Pooling(32, mode), *([Normalize()] if normalize else [])]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "ask: ", "document": "say: "})
    model.save(str(base))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_bases_own_files_say_how_vectors_are_made(tmp_path: Path, normalize: bool):
    recipe = vector_recipe(tmp_path)
    sentence_files(Path(recipe.model.name_or_path), normalize=normalize)
    _, events = train(recipe)
    reading, _ = reading_of(recipe.model, 64)
    assert (reading.pooling, reading.normalize, reading.longest) == ("cls", normalize, 16)
    said = notes(events)
    for words in ("as its own files say", "texts are read to 16 tokens", "query_prompt 'ask: '"):
        assert words in said
    saved = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert saved["prompts"] == {"query": "ask: ", "document": "say: "}
    theirs = their_vectors(tmp_path / "out", TEXTS, prompt_name="query")
    ours = our_vectors(tmp_path / "out", ["ask: " + text for text in TEXTS], longest=16)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: sentence_files(base, mode="weightedmean"), "pooling by weightedmean is not supported"),
        (lambda base: (base / "modules.json").write_text('[{"type": "x.Dense"}]'), "a module Dense"),
        (lambda base: (base / "modules.json").write_text('{"a": 1}'), "no short list of modules"),
        (
            lambda base: (base / "modules.json").write_text('[{"type": "x.Pooling", "path": "../elsewhere"}]'),
            "elsewhere",
        ),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path: Path, change: Any, said: str):
    recipe = vector_recipe(tmp_path)
    change(Path(recipe.model.name_or_path))
    with pytest.raises(UsageError, match=said):
        train(recipe)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path):
    from tiny_architectures import write_model

    recipe = vector_recipe(tmp_path)
    base = tmp_path / "t5"
    write_model(base, "t5")
    with pytest.raises(UsageError, match="an encoder or a decoder alone"):
        train(recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(base)})}))


# -- afterwards ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embedding")
    summary, _ = train(vector_recipe(folder, "model.query_prompt='ask: '", "model.pooling=max"))
    return folder / "out", summary


def test_the_card_loads_it_as_what_it_is(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    card = (run[0] / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(run[0])
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_counts_the_lines_that_have_a_graph_at_a_time(tmp_path: Path):
    rows = pairs(22) + pairs(2, negatives=2)  # some rows have more texts than others
    whole = dry_run.plan(vector_recipe(tmp_path, rows=rows))["memory"]
    assert whole["rows"] == 4 * 4
    assert whole["activations"] > 0
    parts = dry_run.plan(vector_recipe(tmp_path, "model.mini_batch_size=2", rows=rows))["memory"]
    assert parts["rows"] == 2
    assert parts["activations"] < whole["activations"]


def test_a_merged_model_has_the_same_vectors_and_prompts(run: tuple[Path, dict[str, Any]], tmp_path: Path):
    found = merge.run([run[0]], "base", tmp_path / "merged", Way("exact"), merge.Wanted())
    assert found["compared"] == "vectors"
    for how in ({}, {"prompt_name": "query"}):
        merged, adapter = (their_vectors(folder, TEXTS, **how) for folder in (tmp_path / "merged", run[0]))
        torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["vllm", "uniform"])
def test_an_exported_adapter_is_loaded_with_its_pooling_and_prompts(run: tuple[Path, Any], tmp_path: Path, form: str):
    export.run(run[0], form, tmp_path / "out")
    for how in ({}, {"prompt_name": "query"}):
        exported, adapter = (their_vectors(folder, TEXTS, **how) for folder in (tmp_path / "out", run[0]))
        torch.testing.assert_close(exported, adapter, rtol=1e-4, atol=1e-5)


def test_it_is_measured_and_pruned_by_its_own_loss(run: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, summary = run
    report = evaluate.run([folder], None, options.Options(), lambda text: None)
    assert report["adapters"][0]["loss"] == pytest.approx(summary["loss_after"], rel=1e-5)
    assert report["base"]["mrr"] == pytest.approx(summary["mrr_before"], abs=1e-6)
    assert report["adapters"][0]["ndcg@10"] == pytest.approx(summary["ndcg@10_after"], abs=1e-6)
    for policy in ("fisher", "activation"):
        found = prune.run(prune.Request(folder, parse_budget(1), tmp_path / policy, policy=policy))
        assert found["parameters"] < summary["parameters"]


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_it_writes_no_text(run: tuple[Path, dict[str, Any]], dynlora: Any, command: str):
    more = {"generate": ["x"], "chat": [], "serve": []}[command]
    found = dynlora(command, "--adapter", str(run[0]), *more)
    assert found.code == 2
    assert "makes vectors of texts, and writes no text" in " ".join(found.err.split())


def test_the_code_on_the_page_runs(
    run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    page = Path(__file__).parents[2] / "docs" / "howto" / "embedding.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    shutil.copytree(run[0], tmp_path / "out" / "search")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out.strip() in code


@pytest.mark.slow
def test_rows_that_stream_give_the_same_vectors(tmp_path: Path):
    plain = ("dataset.val_size=0", "eval.steps=null")
    streamed = (*plain, "dataset.streaming=true", "dataset.shuffle_buffer=12")
    for name, settings in (("whole", plain), ("streamed", (*plain, streamed[2])), ("blocks", streamed)):
        train(vector_recipe(tmp_path, *settings, f"output_dir={tmp_path / name}"))
    stopped = vector_recipe(tmp_path, *streamed, f"output_dir={tmp_path / 'stopped'}")
    with pytest.raises(Interrupted):
        train(stopped, interrupt_at=7)
    train(stopped, resume=True)
    whole, same, blocks, resumed = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "streamed", "blocks", "stopped")
    )
    assert whole == same != blocks == resumed
