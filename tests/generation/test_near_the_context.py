"""Answers that end where the model's context does, in a batch with others."""

from __future__ import annotations

from pathlib import Path

from eval_helpers import Run, foreign

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.generation.engine import Engine, Wanted


def test_a_long_prompt_shares_its_batch_with_short_ones_of_other_adapters(llama: Run, tmp_path: Path):
    """128 tokens of context: the answers may have 30, 27 and 60 tokens, and all begin at once."""
    other = foreign(llama.folder.parent / "llama", tmp_path / "other", target_modules=["q_proj", "down_proj"])
    with Engine.open(Wanted(adapters=[llama.folder, other])) as engine:
        asked = [(engine.names[1], "sort " * 24), ("base", "w" * 100), (engine.names[1], "y"), (engine.names[0], "x ")]
        requests = [
            engine.request(engine.use(use), prompt, Sampling(max_new_tokens=60), raw=True) for use, prompt in asked
        ]
        alone = [engine.generate([request])[0] for request in requests]
        order: list[int] = []
        together = engine.generate(requests, on_piece=lambda row, _: order.append(row))
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert [len(answer.ids) for answer in together][:2] == [30, 27]
    assert set(order[:4]) >= {0, 1, 2}
