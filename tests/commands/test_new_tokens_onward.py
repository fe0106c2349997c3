"""A run with new tokens in all that comes after: eval, merge, prune, export, generate, a library, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from tiny_run import assembled, make_recipe, train, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.find import WEIGHTS
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import UsageError

TOKENS = ["<|sorted|>", {"content": "<|end|>", "special": True}]
ROWS, MARKED = "{}/marked.jsonl", "<|sorted|>{}<|end|>"


def marked_recipe(folder, *overrides, kind="llama", tokens=TOKENS, **options):
    """Answers stand between two markers."""
    lines = [json.loads(line) for line in write_rows(folder / "plain.jsonl").read_text().splitlines()]
    path = folder / "marked.jsonl"
    lines = [line | {"completion": MARKED.format(line["completion"])} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new = f"adapter.new_tokens={json.dumps(tokens)}"
    return make_recipe(folder, f"dataset.train={path}", new, *overrides, kind=kind, **options)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run(request, tmp_path_factory):
    """The folder of a finished run; its head has rows of its own, or those of the table (gpt2). Not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = marked_recipe(folder, kind=request.param)
    summary, _ = train(recipe)
    assert summary["loss_after"] < summary["loss_before"] - 0.1, "rows with the tokens are learned"
    return Path(recipe.output_dir)


@pytest.fixture(scope="module")
def merged(run):
    folder = run.parent / "merged"
    if not folder.is_dir():
        from dynlora_cli.cli.app import main

        with pytest.raises(SystemExit) as end:
            main(["merge", "--adapter", str(run), "--out", str(folder)])
        assert not end.value.code
    return folder


def base_size(run):
    record = json.loads((run / "dynlora.json").read_text())
    return record["tokens"]["base_rows"]


@pytest.mark.slow
def test_merged_it_is_a_model_with_the_tokens_and_says_the_same(run, merged, dynlora: Dynlora):
    size = base_size(run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model.config.vocab_size == size + 2 == len(tokenizer)
    assert tokenizer("<|sorted|>", add_special_tokens=False)["input_ids"] == [size]
    adapter = read_adapter(run)
    for table, rows in adapter.token_rows.items():
        assert torch.equal(model.get_submodule(table).weight[size:], rows.rows_TI)
    base = AutoModelForCausalLM.from_pretrained(adapter.base_name)
    ids = tokenizer("1: a b -> <|sorted|>a b<|end|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with attached(base, adapter):
            logits = base(ids).logits
        assert logits.shape[-1] == size + 2
        assert torch.allclose(model(ids).logits, logits, atol=1e-4)
        assert base(torch.zeros(1, 1, dtype=torch.long)).logits.shape[-1] == size, "the base is what it was"
    done = dynlora("eval", "--adapter", run, "--json")
    assert done.code == 0, done.err
    summary = json.loads((run / "dynlora.json").read_text())["summary"]
    assert [one["loss"] for one in done.json["adapters"]] == [pytest.approx(summary["loss_after"], rel=1e-4)]
    assert done.json["base"] is None, "whose table has no row for these texts"


def test_generated_text_shows_what_is_not_special(run, dynlora: Dynlora):
    done = dynlora("generate", "--adapter", run, "--max-new-tokens", 4, "3: b a -> ")
    assert done.code == 0, done.err
    assert "<|end|>" not in done.out


def test_pruned_it_keeps_the_rows_and_the_tokens(run, tmp_path, dynlora: Dynlora):
    done = dynlora("prune", "--adapter", run, "--budget", "0.5", "--policy", "magnitude", "--out", tmp_path / "small")
    assert done.code == 0, done.err
    before, after = (read_adapter(folder) for folder in (run, tmp_path / "small"))
    assert after.components < before.components
    for table, rows in before.token_rows.items():
        assert after.token_rows[table].indices == rows.indices
        assert torch.equal(after.token_rows[table].rows_TI, rows.rows_TI)
    assert after.record["tokens"] == before.record["tokens"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == base_size(run) + 2


@pytest.mark.parametrize("target", ["vllm", "sglang", "tgi", "lorax", "gguf"])
def test_readers_of_adapters_are_refused_with_what_to_do(run, target, tmp_path, dynlora: Dynlora):
    done = dynlora("export", "--adapter", run, "--to", target, "--out", tmp_path / "x")
    assert done.code == 2
    if "llama" in read_adapter(run).base_name:  # SGLang and TGI have something against GPT-2 as well
        assert "trained rows of" in done.err
    assert "dynlora merge" in done.err


@pytest.mark.parametrize("target", ["peft", "uniform"])
def test_peft_gets_them(run, target, tmp_path, dynlora: Dynlora):
    done = dynlora("export", "--adapter", run, "--to", target, "--out", tmp_path / "x")
    assert done.code == 0, done.err
    assert read_adapter(tmp_path / "x").token_rows.keys() == read_adapter(run).token_rows.keys()


def test_a_library_refuses_what_its_base_cannot_read(run, tmp_path, dynlora: Dynlora):
    done = dynlora("library", "add", tmp_path / "library", "--adapter", run)
    assert done.code == 2
    assert "which the base could not read" in done.err


def test_inspect_tells_their_texts(run, dynlora: Dynlora):
    done = dynlora("inspect", "--adapter", run)
    assert done.code == 0, done.err
    assert "<|sorted|>" in done.out + done.err


@pytest.mark.slow
def test_two_with_other_tokens_are_not_made_one(run, tmp_path, dynlora: Dynlora):
    kind = "gpt2" if "gpt2" in read_adapter(run).base_name else "llama"
    other = marked_recipe(run.parent, kind=kind, tokens=["<|other|>"], out="other")
    if not (Path(other.output_dir) / WEIGHTS).is_file():
        train(other)
    done = dynlora(
        "merge", "--adapter", run, "--adapter", other.output_dir, "--into", "adapter", "--out", tmp_path / "x"
    )
    assert done.code == 2
    assert "<|other|>" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("old", ["tune", "freeze"])
def test_a_run_goes_on_with_its_tokens_and_more(run, old, tmp_path):
    kind = "gpt2" if "gpt2" in read_adapter(run).base_name else "llama"
    tokens = ["<|sorted|>", "<|more|>"]
    recipe = marked_recipe(
        run.parent,
        f"adapter.from={run}",
        f"adapter.old={old}",
        "rank.init=12",
        kind=kind,
        tokens=tokens,
        out=f"v2-{old}",
    )
    start = assembled(recipe, fill=False)
    before = read_adapter(run)
    size = base_size(run)
    for table, rows in start.base.rows.items():
        assert rows.tokens == (size, size + 1, size + 2)
        assert torch.equal(rows()[:2], before.token_rows[table].rows_TI)
    summary, _ = train(recipe)
    assert summary["peft_check"]["problem"] is None
    after = read_adapter(Path(recipe.output_dir))
    for table, rows in after.token_rows.items():
        assert rows.indices == (size, size + 1, size + 2)
        same = torch.equal(rows.rows_TI[:2], before.token_rows[table].rows_TI)
        assert same == (old == "freeze")
    assert [token["text"] for token in after.record["tokens"]["new"]] == ["<|sorted|>", "<|end|>", "<|more|>"]
    assert after.record["tokens"]["new"][1]["special"]


def test_a_run_goes_on_without_naming_any(run):
    kind = "gpt2" if "gpt2" in read_adapter(run).base_name else "llama"
    recipe = marked_recipe(run.parent, f"adapter.from={run}", kind=kind, tokens=[], out="v3")
    assert all(
        rows.tokens == (base_size(run), base_size(run) + 1) for rows in assembled(recipe, fill=False).base.rows.values()
    )


def test_without_its_tokenizer_nobody_knows_the_tokens(run, tmp_path):
    kind = "gpt2" if "gpt2" in read_adapter(run).base_name else "llama"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (bare / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UsageError, match="no tokenizer stands beside it"):
        assembled(marked_recipe(run.parent, f"adapter.from={bare}", kind=kind, tokens=[], out="v4"), fill=False)


@pytest.mark.slow
def test_merged_gguf_has_the_tokens(run, tmp_path, dynlora: Dynlora):
    done = dynlora("export", "--adapter", run, "--to", "merged-gguf", "--out", tmp_path / "x")
    if "gpt2" in read_adapter(run).base_name and done.code == 2:
        pytest.skip("no GGUF of this architecture")
    assert done.code == 0, done.err
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(next((tmp_path / "x").rglob("*.gguf"))).fields
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    size = base_size(run)
    assert tokens[size:] == ["<|sorted|>", "<|end|>"]
    assert types[size:] == [4, 3], "user-defined, and control"
