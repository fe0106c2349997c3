"""A beginning that all prompts share, read once: the same tokens come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, MambaConfig, MistralConfig, Qwen2Config

from dynlora_cli.decoding import prefix
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Row, write

TEXT = "count the words in every line of it and print names and numbers then sort them "


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = model_folder(tmp_path_factory.mktemp("models"), request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_rows_are_what_they_are_alone(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    """Of other lengths, drawn or not, and beyond the context of the first batch."""
    model, tokenizer = tiny
    monkeypatch.setattr(prefix, "LEAST", 8)
    seen: list[int] = []
    read = prefix.read
    monkeypatch.setattr(prefix, "read", lambda *args: seen.append(len(args[1])) or read(*args))
    ends = ["x", "print", "names and numbers of all lines", "sort"]
    samplings = [
        Sampling(20),
        Sampling(12, do_sample=True, temperature=1.5, seed=3),
        Sampling(30),
        Sampling(60, do_sample=True, top_p=0.9, seed=4),
    ]
    shared = tokenizer(TEXT[:60]).input_ids

    def rows() -> list[Row]:
        prompts = [shared + tokenizer(end, add_special_tokens=False).input_ids for end in ends]
        return [Row(tokenizer, ids, how, ()) for ids, how in zip(prompts, samplings, strict=True)]

    alone = [write(model, [row], pad_id=1, context=128)[0] for row in rows()]
    assert seen == []
    assert write(model, rows(), pad_id=1, context=128, shares=True) == alone
    assert seen[0] >= len(shared)


def test_what_is_shared():
    assert prefix.shared([[1, 2, 3]]) == 0
    assert prefix.shared([[7] * 50 + [1], [7] * 50 + [2, 3]]) == 50
    assert prefix.shared([[7] * 50, [7] * 60]) == 49  # each row has a token of its own to go on from
    assert prefix.shared([[7] * 10 + [1], [7] * 10 + [2]]) == 0  # not worth it


def test_models_whose_cache_is_no_list_of_all_tokens_do_not_share(tiny: tuple[Any, Any]):
    assert prefix.can_share(tiny[0])

    def of(config: Any) -> bool:
        model = type("Model", (), {"config": config})()
        return prefix.can_share(model)

    assert of(Qwen2Config(use_sliding_window=False))
    assert not of(MistralConfig(sliding_window=32))
    assert not of(Gemma2Config())
    assert not of(MambaConfig())


def test_the_cache_is_that_of_each_row(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    ids = tokenizer(TEXT).input_ids[:40]
    cache = prefix.read(model, ids, 3)
    assert cache.get_seq_length() == 40
    with torch.no_grad():
        whole = model(torch.tensor([[*ids, 5]])).logits[0, -1]
        rest = model(torch.tensor([[5]] * 3), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(rest, whole.expand(3, -1), atol=1e-5, rtol=1e-5)
