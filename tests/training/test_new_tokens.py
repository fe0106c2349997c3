"""`adapter.new_tokens`: what the tokenizer, the model, the files and the record of a run make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from numeric import same_loss
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import assembled, make_recipe, model_folder, train, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.adapters.find import CONFIG, WEIGHTS
from dynlora_cli.commands import dry_run
from dynlora_cli.config.load import load_recipe
from dynlora_cli.errors import UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.place import input_table
from dynlora_cli.tasks.loss import evaluating
from dynlora_cli.training.setup import read_data

TOKENS = ["<|sorted|>", "<|end|>"]


def rows_with_tokens(folder: Path) -> str:
    """The rows of `make_recipe`, whose answers stand between two markers."""
    lines = [json.loads(line) for line in write_rows(folder / "plain.jsonl").read_text().splitlines()]
    path = folder / "marked.jsonl"
    marked = [line | {"completion": f"{TOKENS[0]}{line['completion']}{TOKENS[1]}"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in marked), encoding="utf-8")
    return f"dataset.train={path}"


def recipe_of(folder, *overrides, tokens=TOKENS, **options):
    return make_recipe(
        folder, rows_with_tokens(folder), f"adapter.new_tokens={json.dumps(tokens)}", *overrides, **options
    )


def notes_of(recipe):
    return [note for note in dry_run.plan(recipe)["notes"] if "new" in note and "tokens" in note]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_rows_and_components_train_and_stock_peft_computes_the_same(tmp_path, kind):
    """gpt2 ties its head to its table, this llama does not."""
    recipe = recipe_of(tmp_path, kind=kind)
    before = load_file(model_folder(tmp_path, kind) / "model.safetensors")
    summary, _ = train(recipe)
    assert summary["peft_check"]["problem"] is None
    assert summary["loss_after"] < summary["loss_before"]
    out = Path(recipe.output_dir)
    config, tensors = json.loads((out / CONFIG).read_text()), load_file(out / WEIGHTS)
    names = {"llama": ["model.embed_tokens", "lm_head"], "gpt2": ["transformer.wte"]}[kind]
    size = len(AutoTokenizer.from_pretrained(model_folder(tmp_path, kind)))
    assert config["trainable_token_indices"] == {name: [size, size + 1] for name in names}
    rows = {name: tensors[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] for name in names}
    assert all(own.shape == (2, 32) for own in rows.values())
    assert not any("base_layer" in name for name in tensors), "no table is saved"
    after = load_file(model_folder(tmp_path, kind) / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    record = json.loads((out / "dynlora.json").read_text())
    assert record["tokens"]["table_rows"] == size + 2
    assert [token["text"] for token in record["tokens"]["new"]] == TOKENS
    # As a person does it who has PEFT alone.
    base = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path, kind))
    base.resize_token_embeddings(record["tokens"]["table_rows"])
    loaded = PeftModel.from_pretrained(base, out).eval()
    ids = AutoTokenizer.from_pretrained(out)(TOKENS, add_special_tokens=False)["input_ids"]
    vectors = loaded.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(vectors[:, 0], rows[names[0]])
    mean = next(t for name, t in before.items() if name.startswith(names[0]) or name == "wte.weight").mean(0)
    assert not torch.allclose(rows[names[0]], mean.expand(2, -1), atol=1e-3), "they were trained"


def test_their_gradient_is_clipped_with_the_rest_and_the_step_is_that_of_a_larger_table(tmp_path):
    run = assembled(recipe_of(tmp_path, "rank.init=2", "pruning.events=1"))
    (table, head), model = run.base.rows.values(), run.model
    assert [group["coupled"] for group in run.optimizer.param_groups] == [True, False]
    assert [p is q for p, q in zip(run.optimizer.param_groups[1]["params"], (table.own_TI, head.own_TI), strict=True)]
    assert run.trained.parameters == sum(p.numel() for p in run.trained.leaves), "the budget knows nothing of them"
    assert all(not p.requires_grad for n, p in model.named_parameters() if n.endswith(("wte.weight", "base.weight")))


@pytest.mark.parametrize("how", ["mean", "text"])
def test_first_values(tmp_path, how):
    run = assembled(recipe_of(tmp_path, f"adapter.new_tokens_init={how}"), fill=False)
    plain = AutoTokenizer.from_pretrained(model_folder(tmp_path))
    for name, module in (("model.embed_tokens", input_table(run.model)), ("lm_head", run.model.lm_head)):
        weight = module.base.weight
        pieces = [plain(text, add_special_tokens=False)["input_ids"] for text in TOKENS]
        wanted = [weight.mean(0)] * 2 if how == "mean" else [weight[ids].mean(0) for ids in pieces]
        assert torch.allclose(run.base.rows[name].own_TI, torch.stack(wanted), atol=1e-6)


@pytest.mark.slow
def test_a_row_that_the_table_has_already_is_used_and_nothing_is_enlarged(tmp_path):
    folder = model_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)  # padded, as many bases are
    model.save_pretrained(folder)
    recipe = recipe_of(tmp_path)
    summary, _ = train(recipe)
    assert summary["peft_check"]["problem"] is None
    assert json.loads((Path(recipe.output_dir) / "dynlora.json").read_text())["tokens"]["table_rows"] == size + 3
    assert not any("resize_token_embeddings" in note for note in notes_of(recipe))
    run = assembled(recipe, fill=False)
    mean = input_table(run.model).base.weight[:size].mean(0)
    assert torch.allclose(run.base.rows["lm_head"].own_TI[0], run.model.lm_head.base.weight[:size].mean(0), atol=1e-6)
    assert torch.allclose(run.base.rows["model.embed_tokens"].own_TI[0], mean, atol=1e-6), "padding is no token"


def test_a_token_that_is_there_already_goes_on_from_its_row_and_says_so(tmp_path):
    recipe = recipe_of(tmp_path, tokens=["</s>", *TOKENS])
    run = assembled(recipe, fill=False)
    assert torch.equal(run.base.rows["lm_head"].own_TI[0], run.model.lm_head.base.weight[1])
    assert any("'</s>' is token 1 of the tokenizer already" in note for note in notes_of(recipe))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_memory_is_estimated_with_them(tmp_path, kind):
    plan = dry_run.plan(recipe_of(tmp_path, kind=kind))
    assert plan["memory"]["total"] > 0, plan["notes"]
    assert plan["parameters"]["new token"] == {"llama": 128, "gpt2": 64}[kind]


def test_dry_run_names_them_and_what_nothing_teaches(tmp_path):
    recipe = recipe_of(tmp_path, tokens=[*TOKENS, "<|never|>"])
    notes = "\n".join(notes_of(recipe))
    assert "192 numbers beside the budget" in notes
    assert "'<|never|>' stands in none of the rows" in notes
    assert f"'{TOKENS[0]}' stands" not in notes
    assert "model.resize_token_embeddings(" in notes


def test_special_ones_are_left_out_of_answers_and_others_stay(tmp_path):
    files = BaseFiles.find(
        (recipe := recipe_of(tmp_path, tokens=[TOKENS[0], {"content": TOKENS[1], "special": True}])).model
    )
    read_data(recipe, files)
    ids = files.tokenizer(f"{TOKENS[0]}a{TOKENS[1]}", add_special_tokens=False)["input_ids"]
    assert files.tokenizer.decode(ids, skip_special_tokens=True) == f"{TOKENS[0]}a"


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path):
    whole = recipe_of(tmp_path, "train.save_steps=4", out="whole")
    train(whole)
    cut = recipe_of(tmp_path, "train.save_steps=4", out="cut")
    with pytest.raises(Exception, match="interrupted"):
        train(cut, interrupt_at=7)
    train(cut, resume=True)
    assert (Path(whole.output_dir) / WEIGHTS).read_bytes() == (Path(cut.output_dir) / WEIGHTS).read_bytes()


def test_resume_with_other_tokens_is_refused(tmp_path):
    with pytest.raises(Exception, match="interrupted"):
        train(recipe_of(tmp_path, "train.save_steps=2"), interrupt_at=5)
    with pytest.raises(UsageError, match=r"adapter\.new_tokens"):
        train(recipe_of(tmp_path, "train.save_steps=2", tokens=TOKENS[:1]), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["adapter.variant=dora"], ["train.learning_rate=auto"], ["train.compile=false"]])
def test_other_settings(tmp_path, more):
    summary, _ = train(recipe_of(tmp_path, *more))
    assert summary["peft_check"]["problem"] is None


def test_a_classifier_reads_them(tmp_path):
    folder = tmp_path / "marked.csv"
    lines = [f'"{TOKENS[i % 2]} {i} and a text",{("yes", "no")[i % 2]}' for i in range(40)]
    folder.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    recipe = make_recipe(tmp_path, f"dataset.train={folder}", f"adapter.new_tokens={json.dumps(TOKENS)}", kind="bert")
    summary, _ = train(recipe)
    assert summary["peft_check"]["problem"] is None
    config = json.loads((Path(recipe.output_dir) / CONFIG).read_text())
    assert list(config["trainable_token_indices"]) == ["bert.embeddings.word_embeddings"]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("adapter.variant=full", "no adapter to keep their rows in"),
        ("adapter.variant=hira", "no rows of single tokens beside a hira"),
        ("model.task=seq2seq-lm", "seq2seq-lm has no rows of single tokens"),
        ("train.shard_base=true", "a table in parts"),
        ("train.cuda_graphs=true", "a recorded pass"),
    ],
)
def test_what_they_do_not_go_with(tmp_path, override, why):
    with pytest.raises(UsageError, match=why):
        recipe_of(tmp_path, override)


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (["<a>", "<a>"], "is there twice"),
        ([""], "must be a section with the keys content, special|must be a text"),
        ([" "], "nobody could see it"),
        ([3], "must be a section"),
        ([{"content": "<a>", "special": 1}], "must be true or false"),
    ],
)
def test_wrong_tokens(tmp_path, tokens, why):
    with pytest.raises(UsageError, match=why):
        recipe_of(tmp_path, tokens=tokens)


def test_no_components_beside_rows_of_the_head(tmp_path):
    with pytest.raises(UsageError, match="the output head, in which new tokens have rows"):
        assembled(recipe_of(tmp_path, "adapter.target_modules=lm_head"))


def test_a_start_of_tokens_that_nobody_names(tmp_path):
    make_recipe(tmp_path)
    with pytest.raises(UsageError, match="there are none"):
        load_recipe(tmp_path / "llama.yaml", ["adapter.new_tokens_init=text"])


def test_one_token_may_stand_alone(tmp_path):
    make_recipe(tmp_path)
    recipe = load_recipe(tmp_path / "llama.yaml", ["adapter.new_tokens='<a>'"])
    assert [new.content for new in recipe.adapter.new_tokens] == ["<a>"]


def test_a_loss_of_marked_rows_is_that_of_the_merged_table(tmp_path):
    """The model in training against the oracle: the same rows in a table that was made larger."""
    recipe = recipe_of(tmp_path)
    run = assembled(recipe)
    batch = run.batches.step(0, 0)[0]
    generator = torch.Generator().manual_seed(0)
    for rows in run.base.rows.values():
        rows.own_TI.data = torch.randn(rows.own_TI.shape, generator=generator)
    with evaluating(run.model):
        here = run.objective.loss(run.model, batch).item()
    oracle = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path))
    size = oracle.config.vocab_size
    oracle.resize_token_embeddings(size + 2, mean_resizing=False)
    with torch.no_grad():
        oracle.model.embed_tokens.weight[size:] = run.base.rows["model.embed_tokens"].own_TI
        oracle.lm_head.weight[size:] = run.base.rows["lm_head"].own_TI
        own = dict(run.model.named_modules())
        for name, layer in run.trained.layers.items():  # their components as a sum
            a_CI, b_OC = layer.factors()
            oracle.get_submodule(name).weight += layer.scale * b_OC @ a_CI
            assert own[name] is layer
    with evaluating(oracle):
        assert here == same_loss(run.objective.loss(oracle, batch).item())
