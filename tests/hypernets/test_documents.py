"""What the base thinks of documents: cut into chunks, each read alone, and kept."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dynlora_cli.errors import UsageError
from dynlora_cli.hypernets.documents import Reader, block_names, cut
from dynlora_cli.hypernets.hypernet import Written, places_of
from dynlora_cli.hypernets.layer import place_layers

SIZES = {"vocab_size": 50, "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
MODELS = {
    "llama": (LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1), "model.layers.{}.mlp.down_proj"),
    "gpt2": (GPT2Config(vocab_size=50, n_layer=3, n_embd=16, n_head=2), "transformer.h.{}.mlp.c_proj"),  # has dropout
}
DOCUMENTS = [list(range(5, 12)), list(range(20, 43)), [7, 8, 9]]
MOST, OPENING = 10, [1]


def make(kind="llama", depths=(0, 1, 2), **keys):
    torch.manual_seed(0)
    config, layer = MODELS[kind]
    model = AutoModelForCausalLM.from_config(config).train()
    return model, make_reader(model, layer, depths, **keys)


def make_reader(model, layer=MODELS["llama"][1], depths=(0, 1, 2), **keys):
    names = block_names(places_of([(layer.format(depth), 24, 16, 1) for depth in depths]))
    return Reader(model, names, 16, MOST, OPENING, **keys)


def test_a_document_is_cut_into_as_few_chunks_as_possible_of_about_one_length():
    assert cut(range(23), 10) == [range(7), range(7, 15), range(15, 23)]
    assert cut(range(10), 10) == [range(10)]
    assert cut([], 10) == []
    for length in range(1, 60):
        chunks = cut(range(length), 7)
        assert [token for chunk in chunks for token in chunk] == list(range(length))
        assert len(chunks) == -(-length // 7)
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize("kind", MODELS)
def test_the_inputs_of_the_blocks_are_the_models_own_hidden_states(kind):
    model, reader = make(kind)
    read = reader.read(DOCUMENTS)
    assert read.chunks == (1, 3, 1)
    assert model.training
    model.eval()
    chunks = [chunk for ids in DOCUMENTS for chunk in cut(ids, MOST)]
    assert read.mask_NT.sum(1).tolist() == [len(chunk) + 1 for chunk in chunks]
    for chunk, inputs_LTD in zip(chunks, read.inputs_NLTD, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([[*OPENING, *chunk]]), output_hidden_states=True).hidden_states[:3]
        torch.testing.assert_close(inputs_LTD[:, : len(chunk) + 1], torch.cat(states))
        assert not inputs_LTD[:, len(chunk) + 1 :].any()
    assert not read.inputs_NLTD.requires_grad


def test_blocks_that_nothing_is_written_for_are_not_looked_at():
    everything, (_, reader) = make()[1].read(DOCUMENTS), make(depths=(2, 1))
    torch.testing.assert_close(reader.read(DOCUMENTS).inputs_NLTD, everything.inputs_NLTD[:, 1:], rtol=0, atol=0)


def test_a_chunk_is_read_once_and_alone():
    model, reader = make()
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    together = reader.read(DOCUMENTS)
    assert len(passes) == 5
    again = reader.read([DOCUMENTS[2], DOCUMENTS[0]])
    assert len(passes) == 5
    assert reader.kept == sum(len(ids) + 1 for ids in [*DOCUMENTS, [], []]) * 3 * 16 * 4
    assert torch.equal(again.inputs_NLTD[0, :, :4], together.inputs_NLTD[4, :, :4])
    assert torch.equal(again.inputs_NLTD, make()[1].read([DOCUMENTS[2], DOCUMENTS[0]]).inputs_NLTD)


def test_what_does_not_fit_is_read_each_time():
    model, reader = make(limit=8 * 3 * 16 * 4)
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = reader.read(DOCUMENTS)
    assert (reader.kept, reader.again, len(passes)) == (8 * 3 * 16 * 4, 4, 5)
    assert torch.equal(reader.read(DOCUMENTS).inputs_NLTD, first.inputs_NLTD)
    assert len(passes) == 9


def test_documents_without_tokens_have_no_chunks():
    _, reader = make()
    assert reader.read([[]]).inputs_NLTD.shape == (0, 3, 0, 16)
    assert reader.read([[], [7, 8]]).chunks == (0, 1)


def test_what_is_put_on_the_base_is_off_while_it_reads():
    model, reader = make()
    before = reader.read(DOCUMENTS)
    (layer,) = place_layers(model, ["model.layers.0.mlp.down_proj"]).values()
    layer.hold(Written(torch.ones(2, 24), torch.ones(16, 2)))
    changed = make_reader(model).read(DOCUMENTS)
    assert torch.equal(changed.inputs_NLTD, before.inputs_NLTD)
    assert not layer.off


def test_a_layer_outside_of_all_blocks_is_told():
    with pytest.raises(UsageError, match="lm_head"):
        block_names(places_of([("lm_head", 4, 4, 1)]))
