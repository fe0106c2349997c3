"""Tokens that a model writes: as transformers writes them, whoever shares the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Row, Written, own_ends, write


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = model_folder(tmp_path_factory.mktemp("models"), request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def rows(tiny: tuple[Any, Any], prompts: list[str], *samplings: Sampling) -> list[Row]:
    model, tokenizer = tiny
    ends = own_ends(model, tokenizer)
    each = samplings * len(prompts) if len(samplings) == 1 else samplings
    return [Row(tokenizer, tokenizer(p).input_ids, s, ends) for p, s in zip(prompts, each, strict=True)]


def written(tiny: tuple[Any, Any], these: list[Row], context: int | None = 128, **options: Any) -> list[Written]:
    return write(tiny[0], these, pad_id=1, context=context, **options)


PROMPTS = ["sort", "count the words in every line of it", "x", "print names and numbers"]


def test_greedy_is_that_of_transformers(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    for prompt, answer in zip(PROMPTS, written(tiny, rows(tiny, PROMPTS, Sampling(20))), strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(answer.ids) == expected[0, ids.shape[1] :].tolist()
