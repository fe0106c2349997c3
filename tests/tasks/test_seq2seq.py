"""model.task seq2seq-lm: prompts to the encoder, completions to the decoder; its loss, answers and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import CHATML, byte_tokenizer, dataset, task_named
from numeric import same_loss
from tiny_architectures import write_model
from tiny_run import make_recipe, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from dynlora_cli.commands import evaluate, prune
from dynlora_cli.commands.dry_run import plan as plan_run
from dynlora_cli.config.budget import parse_budget
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.example_view import show_example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation import options
from dynlora_cli.evaluation.generation import find_prompts, generate
from dynlora_cli.evaluation.held_out_loss import held_out, row_sums
from dynlora_cli.tasks.loss import summed_loss

from recipe_helpers import MINIMAL, problems

TASK = "seq2seq-lm"
ROWS = [
    {"prompt": "sort: b a c", "completion": "a b c"},
    {"prompt": "reverse: a quick brown fox", "completion": "fox brown quick a"},
    {"prompt": "copy: x", "completion": "x"},
]


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, tokenizer: Any = None, **settings: Any) -> Data:
    return load_data(dataset(path, **settings), tokenizer or byte_tokenizer(), task=task_named(TASK), seed=0)


@pytest.fixture(scope="module", params=["t5", "bart"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("seq2seq") / request.param
    write_model(folder, request.param)
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_the_encoder_reads_the_prompt_and_the_decoder_writes_all_of_the_completion(tmp_path: Path):
    tokenizer = byte_tokenizer()
    data = load(written(tmp_path / "rows.jsonl", *ROWS), tokenizer)
    assert show_example(data.train[0], tokenizer) == [("<s>sort: b a c", False), ("<s>a b c</s>", True)]
    assert data.train[0].supervised() == len(data.train[0].labels)
    assert data.counts["train"]["tokens"] == sum(len(e.input_ids) + len(e.labels) for e in data.train)


def test_instructions_are_written_out_even_where_the_tokenizer_has_a_chat_template(tmp_path: Path):
    tokenizer = byte_tokenizer(CHATML)
    data = load(
        written(tmp_path / "rows.jsonl", {"instruction": "Sort.", "input": "b a", "output": "a b"}),
        tokenizer,
        max_length=400,
    )
    given, answer = (text for text, _ in show_example(data.train[0], tokenizer))
    assert given.endswith("### Input:\nb a\n\n### Response:\n")
    assert answer == "<s>a b</s>"


def test_each_side_is_cut_at_max_length(tmp_path: Path):
    long = [{"prompt": "ab " * 30, "completion": "b"}, {"prompt": "a", "completion": "cd " * 30}]
    rows = written(tmp_path / "rows.jsonl", *long, {"prompt": "a", "completion": "b"})
    data = load(rows, max_length=16)
    assert [(len(e.input_ids), len(e.labels)) for e in data.train] == [(16, 3), (2, 16), (2, 3)]
    assert data.counts["train"]["truncated"] == 2
    assert data.counts["train"]["cut_answers"] == 1
    assert load(rows, max_length=16, overlong="drop").counts["train"]["dropped"] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "only a text"}, "no format fits the columns text; for seq2seq-lm there are"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no format fits the columns messages; for seq2seq-lm"),
    ],
)
def test_rows_without_two_texts_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load(written(tmp_path / "rows.jsonl", row), byte_tokenizer(CHATML))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.packing=true", "dataset.packing: packing does not go with seq2seq-lm"),
        ("dataset.train_on=all", "dataset.train_on: got all; a decoder writes the completion and nothing else"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, message: str):
    assert any(message in problem for problem in problems(MINIMAL, f"model.task={TASK}", override))


# -- loss and answers --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_models_own(tiny: tuple[Any, Any], tmp_path: Path):
    model, tokenizer = tiny
    data = load(written(tmp_path / "rows.jsonl", *ROWS), tokenizer)
    batches = Batches(data.train, micro_batch_size=3, max_length=128, pad_id=tokenizer.pad_token_id, shuffle=False)
    (batch,) = batches.step(0, 0)
    with torch.no_grad():
        expected = model(**batch.inputs, labels=batch.labels).loss.item()
        found = [summed_loss(model, batch).item() / batch.supervised for _ in range(2)]  # first pass, and with the head
    assert found == same_loss([expected, expected])
    assert held_out(model, [batch])["loss"] == same_loss(expected)
    sums = row_sums(model, [batch])
    assert list(sums.targets_R) == [len(example.labels) for example in data.train]


def test_answers_are_the_decoders(tiny: tuple[Any, Any], tmp_path: Path):
    model, tokenizer = tiny
    data = load(written(tmp_path / "rows.jsonl", *ROWS), tokenizer)
    prompts = find_prompts(data.train, tokenizer, 9)
    assert [prompt.references for prompt in prompts] == [[row["completion"]] for row in ROWS]
    together = generate(model, tokenizer, prompts, batch_size=3, context=128)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt.ids])
        new = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=1)[0, 1:].tolist()
        alone = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        assert answer
        assert alone.startswith(answer) or answer.startswith(alone)  # one of the two is cut earlier


@pytest.mark.slow
def test_a_run_is_evaluated_and_its_adapter_pruned(tmp_path: Path):
    write_model(tmp_path / "t5", "t5")
    summary, _ = train(make_recipe(tmp_path, f"model.task={TASK}", "train.max_steps=3", "eval.steps=3", kind="t5"))
    report = evaluate.run([tmp_path / "out"], None, options.Options(generate=0), print)
    assert report["adapters"][0]["loss"] == same_loss(summary["loss_after"])
    half = prune.run(prune.Request(tmp_path / "out", parse_budget(0.5), tmp_path / "half", policy="activation"))
    assert half["parameters"] <= summary["parameters"] / 2


def test_an_encoder_decoder_as_causal_lm_is_answered_with_the_right_task(tmp_path: Path):
    write_model(tmp_path / "t5", "t5")
    with pytest.raises(UsageError, match="does not load as causal-lm") as caught:
        train(make_recipe(tmp_path, kind="t5"))
    assert "model.task: seq2seq-lm" in str(caught.value.hint)
    assert "LlamaConfig" not in str(caught.value)


def test_the_plan_of_a_run(tmp_path: Path):
    write_model(tmp_path / "t5", "t5")
    plan = plan_run(make_recipe(tmp_path, f"model.task={TASK}", kind="t5"))
    assert len(plan["modules"]) == 32
    assert plan["memory"]["length"] > 0


@pytest.mark.slow
def test_a_tokenizer_written_in_python(tmp_path: Path):
    """ByT5's has no backend whose text could be kept."""
    sizes: dict[str, Any] = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "byt5")
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    recipe = make_recipe(tmp_path, f"model.name_or_path={tmp_path / 'byt5'}", f"model.task={TASK}", "train.max_steps=3")
    summary, _ = train(recipe)
    assert summary["ok"]
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text())
    assert len(record["tokenizer_sha256"]) == 64
