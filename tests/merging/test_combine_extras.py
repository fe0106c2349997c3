"""Several adapters with rows of tokens and biases become one, where that is defined without the base."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numeric import assert_close_to_truth
from peft_adapters import TERMS
from peft_extras import load, logits_of, make, make_of, peft_logits

from dynlora_cli.adapters.adapter import Adapter, TokenRows
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.errors import UsageError
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way

ALL = ["exact", "linear", "svd", "ties", "dare"]


def other(adapter: Adapter, factor: float = -0.5) -> Adapter:
    """An adapter with other biases and rows."""
    rows = {name: TokenRows(r.indices, factor * r.rows_TI) for name, r in adapter.token_rows.items()}
    whole = {name: factor * tensor for name, tensor in adapter.whole.items()}
    layers = {n: replace(f, bias_O=None if f.bias_O is None else factor * f.bias_O) for n, f in adapter.layers.items()}
    return replace(adapter, token_rows=rows, whole=whole, layers=layers)


def test_the_mean_of_biases_and_rows_is_that_of_the_models_parameters(tmp_path: Path):
    base, folder = make("lora-bias-all", tmp_path)
    one = read_adapter(folder)
    two = other(one)
    mean = combine([one, two], Way("linear", weights=[3, 1])).adapter
    models = []
    for adapter in (one, two, mean):
        model = load(base)
        with attached(model, adapter):
            models.append(
                {
                    name: tensor.clone()
                    for name, tensor in model.named_parameters()
                    if "base" in name or "norm" in name or "embed" in name
                }
            )
    for name, tensor in models[2].items():
        wanted = 0.75 * models[0][name].double() + 0.25 * models[1][name].double()
        assert_close_to_truth(tensor, wanted, terms=8)
    assert mean.biases == sorted(one.biases)
    (tmp_path / "mean").mkdir()
    save(mean, tmp_path / "mean")
    model = load(base)
    with attached(model, mean):
        assert_close_to_truth(logits_of(model, "llama-bias"), peft_logits(base, tmp_path / "mean"), terms=TERMS)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("case", ["bias-all", "rows", "lora-bias"])
def test_a_method_carries_them_or_says_why_not(case: str, method: str, tmp_path: Path):
    one = read_adapter(make(case, tmp_path)[1])
    if case != "lora-bias":
        same = combine([one, one], Way(method)).adapter
        assert all(torch.equal(same.whole[name], one.whole[name]) for name in one.whole)
        assert all(torch.equal(same.token_rows[n].rows_TI, r.rows_TI) for n, r in one.token_rows.items())
    elif method in ("exact", "linear", "svd"):
        total = 1 if method == "linear" else 2
        name, factors = next(iter(one.layers.items()))
        made = combine([one, one], Way(method)).adapter.layers[name].bias_O
        assert made is not None
        assert factors.bias_O is not None
        assert_close_to_truth(made, total * factors.bias_O.double(), terms=4)
        return
    if method == "linear":
        assert combine([one, other(one)], Way(method)).adapter.own_numbers()
        return
    match = "weights of the adapters that have it sum to 2" if method in ("exact", "svd") else "is for the entries"
    with pytest.raises(UsageError, match=match):
        combine([one, other(one)], Way(method))


def test_rows_of_different_tokens_stand_beside_each_other(tmp_path: Path):
    one = read_adapter(make("rows", tmp_path)[1])
    rows = one.token_rows["model.embed_tokens"]
    two = replace(one, token_rows={"model.embed_tokens": TokenRows((9, 8), -rows.rows_TI[:2])})
    both = combine([one, two], Way("exact")).adapter.token_rows["model.embed_tokens"]
    assert both.indices == (*rows.indices, 9, 8)
    assert torch.equal(both.rows_TI, torch.cat([rows.rows_TI, -rows.rows_TI[:2]]))
    with pytest.raises(UsageError, match=r"token 3 of model\.embed_tokens takes the place of the base's own"):
        combine([one, two], Way("linear"))
    alone = replace(two, layers={})
    assert combine([one, alone], Way("exact")).adapter.token_rows["model.embed_tokens"].indices == both.indices


def test_tokens_of_other_names_are_refused(tmp_path: Path):
    folder = make("rows", tmp_path)[1]
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    for path, content in ((folder, "<a>"), (twin, "<b>")):
        (path / "tokenizer.json").write_text(f'{{"added_tokens": [{{"id": 60, "content": "{content}"}}]}}')
    with pytest.raises(UsageError, match=r"token 60 is '<a>' in .* and '<b>' in"):
        combine([read_adapter(folder), read_adapter(twin)], Way("linear"))


def test_what_peft_has_no_form_for_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    bias = read_adapter(make_of("llama", {"target_modules": ["q_proj"], "lora_bias": True}, tmp_path / "one")[1])
    table = read_adapter(
        make_of("llama", {"target_modules": ["embed_tokens"]}, tmp_path / "two", {"save_embedding_layers": False})[1]
    )
    table = replace(table, config=bias.config)
    with pytest.raises(UsageError, match="which PEFT does not have together"):
        combine([bias, table], Way("linear"))
