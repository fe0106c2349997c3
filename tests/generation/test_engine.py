"""A base with adapters in memory: who speaks, in which form, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import by_peft, finished_chat_run, finished_run, foreign
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.generation.engine import Engine, Wanted

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on bare prompts and stock PEFT adapters of its base; a run on conversations, of another base."""
    folder = tmp_path_factory.mktemp("runs")
    bare = finished_run(folder / "bare", "llama")
    (folder / "chat").mkdir()
    chat = finished_chat_run(folder / "chat")
    base = folder / "bare" / "llama"
    foreign(base, folder / "plain", target_modules=["q_proj", "down_proj"])
    foreign(base, folder / "dora", target_modules=["q_proj"], use_dora=True)
    return {
        "bare": bare.folder,
        "base": base,
        "chat": chat.folder,
        "chat_base": folder / "chat" / "pico",
        "plain": folder / "plain",
        "dora": folder / "dora",
    }


@pytest.fixture(scope="module")
def engine(runs: dict[str, Path]) -> Iterator[Engine]:
    with Engine.open(Wanted(adapters=[runs["bare"], runs["plain"], runs["dora"]])) as engine:
        yield engine


def greedy(model: Any, folder: Path, prompt: str, count: int = 12) -> str:
    """What stock transformers writes after a bare prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_base_and_stock_adapters_answer_as_stock_peft_does(engine: Engine, runs: dict[str, Path]):
    models = {"base": AutoModelForCausalLM.from_pretrained(runs["base"]).eval()}
    models |= {name: by_peft(runs["base"], runs[name]) for name in ("plain", "dora")}
    requests = [engine.request(engine.use(name), "sort: b a -> ", SHORT) for name in models]
    answers = engine.generate(requests)
    expected = [greedy(model, runs["base"], "sort: b a -> ") for model in models.values()]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) == 3, "the adapters matter"
