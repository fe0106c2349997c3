"""Rows of tokens, biases, tables and whole tensors in adapters of stock PEFT: read, attached and written as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_helpers import Dynlora, contents
from numeric import assert_close_to_truth
from peft_adapters import TERMS
from peft_extras import CASES, WORDS, change, edit, load, logits_of, make, make_of, peft_logits, rewrite

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import UsageError
from dynlora_cli.files import peft_fields

REFUSED = {"bias-parameter": "is a Conv1D, whose weight PEFT's target_parameters takes"}
EXACT = [name for name in CASES if name not in REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_attached_it_computes_what_peft_computes(name: str, tmp_path: Path):
    base, folder = make(name, tmp_path)
    kind, words = CASES[name][0], CASES[name][2].get("resize", WORDS)
    model = load(base)
    before, vocabulary = logits_of(model, kind), model.config.vocab_size
    with attached(model, read_adapter(folder)):
        assert_close_to_truth(logits_of(model, kind, words), peft_logits(base, folder, words), terms=TERMS)
        assert model.config.vocab_size == words
    assert torch.equal(logits_of(model, kind), before), "the model is as it was"
    assert model.config.vocab_size == vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_peft_reads_what_is_written(name: str, tmp_path: Path):
    base, folder = make(name, tmp_path)
    words = CASES[name][2].get("resize", WORDS)
    adapter, again = read_adapter(folder), tmp_path / "again"
    again.mkdir()
    save(adapter, again)
    assert_close_to_truth(
        peft_logits(base, again, words), peft_logits(base, folder, words), terms=TERMS, dtype=torch.float32
    )
    read = read_adapter(again)
    assert {n: rows.indices for n, rows in read.token_rows.items()} == {
        n: rows.indices for n, rows in adapter.token_rows.items()
    }
    assert sorted(read.biases) == sorted(adapter.biases)
    assert read.has_lora_bias == adapter.has_lora_bias
    assert read.parameters == adapter.parameters


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_exactly_is_refused(name: str, tmp_path: Path):
    base, folder = make(name, tmp_path)
    with pytest.raises(UsageError, match=REFUSED[name]), attached(load(base), read_adapter(folder)):
        pass


def test_rows_keep_the_type_of_the_table_and_tied_modules_share_them(tmp_path: Path):
    base, folder = make("rows-tied", tmp_path, dtype=torch.bfloat16)
    model = load(base)
    rows = read_adapter(folder).token_rows["model.embed_tokens"]
    with attached(model, read_adapter(folder)):
        table = model.get_input_embeddings().weight
        assert table.dtype == torch.bfloat16
        assert table is model.get_output_embeddings().weight
        assert torch.equal(table[list(rows.indices)], rows.rows_TI.bfloat16())


# -- the fields of LoraConfig ----------------------------------------------------------------------------------------


def test_every_field_of_pefts_config_is_known():
    known = [*peft_fields.READ, *peft_fields.OF_TRAINING, *peft_fields.REFUSED]
    assert len(known) == len(set(known))
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not theirs - set(known), "PEFT has a new field: read it, or say why not, in peft_fields.py"
    assert set(known) - theirs <= {"bdlora_config"}, "of another version"


@pytest.mark.parametrize("field", peft_fields.REFUSED)
def test_a_field_that_changes_the_mathematics_is_refused_in_words(field: str, tmp_path: Path, dynlora: Dynlora):
    _, folder = make_of("llama", {"target_modules": ["q_proj"]}, tmp_path)
    edit(folder, **{field: [[0, 1], [0, 2]]})
    answer = dynlora("inspect", "--adapter", folder)
    said = " ".join(answer.err.split())
    assert answer.code == 2
    assert f"{field}: [[0, 1], [0, 2]]: {peft_fields.REFUSED[field]}" in said


def test_a_field_of_a_newer_peft_is_named(tmp_path: Path):
    _, folder = make_of("llama", {"target_modules": ["q_proj"]}, tmp_path)
    assert not read_adapter(folder).note
    edit(folder, lora_of_tomorrow=True)
    assert "were not used: lora_of_tomorrow" in str(read_adapter(folder).note)


def test_velora_computes_as_lora(tmp_path: Path):
    options = {"target_modules": ["q_proj"], "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}
    base, folder = make_of("llama", options, tmp_path)
    adapter = read_adapter(folder)
    assert "only training uses them" in str(adapter.note)
    model = load(base)
    with attached(model, adapter):
        assert_close_to_truth(logits_of(model, "llama"), peft_logits(base, folder), terms=TERMS)


# -- damaged and hostile files ---------------------------------------------------------------------------------------

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
B_BIAS = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"


def _with(case: str, damage: Any, message: str, code: int = 2) -> tuple[str, Any, str, int]:
    return case, damage, message, code


def fill(tensors: dict[str, Any], name: str, value: float) -> None:
    tensors[name].view(-1)[:1].fill_(value)


DAMAGES = {
    "tokens: far out": _with(
        "rows", lambda f: edit(f, trainable_token_indices=[3, 60, 2**30]), "the base's table ends at 63, and token 64"
    ),
    "tokens: past the end": _with("rows", lambda f: edit(f, trainable_token_indices=[3, 60, 65]), "token 64 is in neither"),
    "tokens: input alone": _with(
        "rows", lambda f: edit(f, trainable_token_indices=[3, 60, 64]), "some tokens are in one of them alone"
    ),
    "tokens: negative": _with("rows", lambda f: edit(f, trainable_token_indices=[3, 60, -1]), "trainable_token_indices"),
    "tokens: huge": _with("rows", lambda f: edit(f, trainable_token_indices=[3, 60, 2**40]), "trainable_token_indices"),
    "tokens: true": _with("rows", lambda f: edit(f, trainable_token_indices=[3, 60, True]), "trainable_token_indices"),
    "tokens: twice": _with("rows", lambda f: edit(f, trainable_token_indices=[3, 60, 3]), "the token 3 of"),
    "tokens: too few": _with("rows", lambda f: edit(f, trainable_token_indices=[3]), "names 1 tokens"),
    "tokens: none": _with("rows", lambda f: edit(f, trainable_token_indices=None), "does not say of which"),
    "tokens: of another": _with(
        "rows", lambda f: edit(f, trainable_token_indices={"lm_head": [1, 2, 3]}), "does not say of which"
    ),
    "tokens: two ends": _with(
        "rows",
        lambda f: edit(f, trainable_token_indices={"embed_tokens": [1, 2, 3], "tokens": [1, 2, 4]}),
        "names model.embed_tokens more than once",
    ),
    "rows: gone": _with("rows", lambda f: rewrite(f, lambda t: t.pop(ROWS)), "lacks their rows"),
    "rows: a vector": _with("rows", lambda f: rewrite(f, lambda t: t.update({ROWS: torch.ones(3)})), "rows of shape (3,)"),
    "rows: narrow": _with("rows", lambda f: rewrite(f, lambda t: t.update({ROWS: torch.ones(3, 5)})), "have 5 numbers"),
    "rows: NaN": _with("rows", lambda f: rewrite(f, lambda t: fill(t, ROWS, float("nan"))), "holds NaN or infinity", 4),
    "rows: nowhere": _with(
        "rows",
        lambda f: rewrite(f, lambda t: t.update({ROWS.replace("embed_tokens", "table"): t.pop(ROWS)})),
        "has no layer model.table",
    ),
    "rows: of a norm": _with(
        "rows",
        lambda f: rewrite(f, lambda t: t.update({ROWS.replace("embed_tokens", "norm"): t.pop(ROWS)})),
        "a LlamaRMSNorm of (32,)",
    ),
    "rows: and factors": _with(
        "rows",
        lambda f: rewrite(
            f,
            lambda t: t.update(
                {
                    ROWS.replace("token_adapter.trainable_tokens_delta", "lora_embedding_A"): torch.ones(4, 64),
                    ROWS.replace("token_adapter.trainable_tokens_delta", "lora_embedding_B"): torch.ones(32, 4),
                }
            ),
        ),
        "has trained rows and components",
    ),
    "bias: nowhere": _with(
        "bias-all", lambda f: rewrite(f, lambda t: t.update({"base_model.model.model.x.bias": torch.ones(3)})), "no layer model.x"
    ),
    "bias: base has none": _with(
        "bias-all",
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(64)})),
        "has no lm_head.bias",
    ),
    "bias: short": _with(
        "bias-all",
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.model.layers.0.self_attn.k_proj.bias": torch.ones(3)})),
        "is (3,) in the adapter and (16,) in the base",
    ),
    "bias: twice": _with(
        "bias-all",
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "twice, once as",
    ),
    "lora_bias: gone": _with("lora-bias", lambda f: rewrite(f, lambda t: t.pop(B_BIAS)), "no lora_B.bias, and lora_bias is set"),
    "lora_bias: not said": _with("lora-bias", lambda f: edit(f, lora_bias=False), "a lora_B.bias, and lora_bias is not set"),
    "lora_bias: short": _with(
        "lora-bias", lambda f: rewrite(f, lambda t: t.update({B_BIAS: torch.ones(3)})), "lora_B.bias of shape (3,) for 32"
    ),
    "lora_bias: of A": _with(
        "lora-bias",
        lambda f: rewrite(f, lambda t: t.update({B_BIAS.replace("lora_B", "lora_A"): torch.ones(4)})),
        "is not understood",
    ),
    "lora_bias: a DoRA": _with(
        "lora-bias",
        lambda f: rewrite(
            f,
            lambda t: t.update(
                {B_BIAS.replace("lora_B.bias", "lora_magnitude_vector"): torch.ones(32)}
            ),
        ),
        "is a DoRA with lora_bias",
    ),
    "magnitudes: short": _with(
        "dora-table",
        lambda f: rewrite(
            f, lambda t: t.update({"base_model.model.model.embed_tokens.lora_magnitude_vector": torch.ones(64)})
        ),
        "has 64 magnitudes, and 32 belong to it",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_extra_gets_one_clear_message(name: str, tmp_path: Path, dynlora: Dynlora):
    case, damage, message, code = DAMAGES[name]
    _, folder = make(case, tmp_path)
    damage(folder)
    before = contents(tmp_path)
    answer = dynlora("merge", "--adapter", folder, "--out", tmp_path / "new", "--json")
    assert answer.code == code, answer.err
    assert message in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING"),
    ],
)
def test_another_method_is_named(config: Any, named: str, tmp_path: Path, dynlora: Dynlora):
    base, _ = make_of("llama", {"target_modules": ["q_proj"]}, tmp_path)
    model = peft.get_peft_model(load(base), config)
    change(model)
    model.save_pretrained(tmp_path / "other")
    answer = dynlora("inspect", "--adapter", tmp_path / "other")
    assert answer.code == 2
    assert f"peft_type is {named}" in answer.err
