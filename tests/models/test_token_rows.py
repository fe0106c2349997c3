"""Rows of single tokens against a model whose table was made larger and holds the same rows."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_close_to_truth, in_double
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTJConfig, LlamaConfig

from dynlora_cli.data.batches import Batch
from dynlora_cli.errors import UsageError
from dynlora_cli.models.token_rows import TokenHead, TokenRows, TokenTable, put_rows, take_off
from dynlora_cli.tasks.loss import IGNORE, judged, summed_loss

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 67}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=67),
    "gemma3": Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
}
TOKENS = (69, 5, 67, 68)  # behind the table's end, but one
TERMS = 2 * 2 * (32 + 48) + 71 + 27


def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval().requires_grad_(False)


def tables(model):
    """Names of those that get rows: the input table, and a head of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    return [table] if model.config.tie_word_embeddings else [table, head]


def rows_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 32, generator=generator) * 0.1 for _ in tables(model)]


def enlarged(model, rows):
    """The oracle: all rows in the table."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    for module, own in zip((model.get_input_embeddings(), model.get_output_embeddings()), rows, strict=False):
        with torch.no_grad():
            module.weight[list(TOKENS)] = own
    return model


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 70, (3, 9), generator=generator)
    ids[0, :4] = torch.tensor(TOKENS)
    labels = ids.roll(-1, 1)
    labels[1] = IGNORE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, [0, 1, 2], ids.numel(), int((labels != IGNORE).sum()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_rows_is_the_model_with_a_larger_table(kind):
    model, data = build(kind), batch()
    values = rows_of(model, 1)
    oracle = in_double(enlarged(model, values))
    for module in (oracle.get_input_embeddings(), oracle.get_output_embeddings()):
        module.weight.requires_grad_(True)
    logits = oracle(**data.inputs).logits.flatten(0, 1)
    true_loss = F.cross_entropy(logits, data.labels.flatten(), reduction="sum", ignore_index=IGNORE)
    true_loss.backward()
    wanted = [m.weight.grad[list(TOKENS)] for m in (oracle.get_input_embeddings(), oracle.get_output_embeddings())]

    own = [TokenRows(TOKENS, value, trains=True) for value in values]
    names = tables(model)
    for name, rows in zip(names, own, strict=True):
        put_rows(model, name, rows)
    assert isinstance(model.get_input_embeddings(), TokenTable)
    assert isinstance(model.get_output_embeddings(), TokenHead)
    for attempt in range(2):  # the first pass finds out whether the head may be left out
        for rows in own:
            rows.own_TI.grad = None
        loss = summed_loss(model, data)
        loss.backward()
        assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5), attempt
        for rows, want in zip(own, wanted, strict=False):
            assert_close_to_truth(rows.own_TI.grad, want, terms=TERMS)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n in dict(model.named_parameters()) if n.endswith("own_TI")
    ]
    with torch.no_grad():
        assert_close_to_truth(model(**data.inputs).logits.flatten(0, 1), logits.detach(), terms=TERMS)
        assert judged(model, data)[0].sum().item() == pytest.approx(true_loss.item(), rel=1e-5)


def test_taken_off_the_model_is_what_it_was():
    model = build("llama, tied")
    before = {name: id(module) for name, module in model.named_modules()}
    changes = put_rows(model, "model.embed_tokens", TokenRows(TOKENS, rows_of(model, 1)[0]))
    assert len(changes) == 2, "the head shares the table's weight"
    take_off(changes)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_held_rows_get_no_gradient_and_no_weight_decay():
    rows = TokenRows((1, 2, 3), torch.ones(3, 2), held=2, trains=True)
    assert [p.shape for p in rows.parameters()] == [(1, 2)]
    rows().sum().backward()
    assert rows().shape == (3, 2)
    assert rows.own_TI.grad.tolist() == [[1, 1]]


def test_a_hole_behind_the_table_is_refused():
    with pytest.raises(UsageError, match="none for 67"):
        put_rows(build("llama"), "model.embed_tokens", TokenRows((68,), torch.ones(1, 32)))


def test_a_head_with_a_bias_is_refused_and_the_model_left_alone():
    model = AutoModelForCausalLM.from_config(GPTJConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    with pytest.raises(UsageError, match="bias"):
        put_rows(model, "lm_head", TokenRows((3,), torch.ones(1, 16)))
    assert type(model.lm_head) is torch.nn.Linear
