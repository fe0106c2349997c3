"""Tokens that a model writes: as transformers writes them, whoever shares the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import write_model
from tiny_run import model_folder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynlora_cli.decoding.draw import Draw
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Listener, Row, Written, own_ends, write
from dynlora_cli.errors import UsageError


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


@pytest.mark.slow
def test_a_batch_writes_as_each_row_alone(tiny: tuple[Any, Any]):
    """Whoever shares the batch: of other length, drawn, with other ends, cancelled."""
    samplings = [
        Sampling(20),
        Sampling(25, do_sample=True, temperature=1.5, seed=3),
        Sampling(4, repetition_penalty=1.7),
        Sampling(30, do_sample=True, top_k=5, seed=4, repetition_penalty=1.3),
    ]
    alone = [written(tiny, rows(tiny, [p], s))[0] for p, s in zip(PROMPTS, samplings, strict=True)]
    together = written(tiny, rows(tiny, PROMPTS, *samplings))
    assert together == alone
    assert [len(answer.ids) for answer in alone] == [20, 25, 4, 30]
    backwards = written(tiny, rows(tiny, PROMPTS[::-1], *samplings[::-1]))
    assert backwards[::-1] == alone


def test_a_row_that_would_leave_the_context_waits(tiny: tuple[Any, Any]):
    """GPT-2 has a table of positions: there the long row's neighbour may not go on for longer than it can."""
    model, tokenizer = tiny
    ends = own_ends(model, tokenizer)
    long = tokenizer("words " * 60).input_ids[:120]

    def both() -> list[Row]:
        return [Row(tokenizer, long, Sampling(50), ends), Row(tokenizer, tokenizer("x").input_ids, Sampling(50), ends)]

    one, two = written(tiny, both())
    assert (len(one.ids), one.finish_reason) == (8, "length")
    assert (len(two.ids), two.finish_reason) == (50, "length")
    assert [one, two] == [written(tiny, [row])[0] for row in both()]


@pytest.mark.parametrize(("prompt", "words"), [([], "without a single token"), ([5] * 128, "context 128: no room")])
def test_prompts_that_leave_no_room(prompt: list[int], words: str, tiny: tuple[Any, Any]):
    with pytest.raises(UsageError) as refused:
        written(tiny, [Row(tiny[1], prompt, Sampling(), ())])
    assert words in refused.value.message


def test_an_end_of_its_own(tiny: tuple[Any, Any]):
    drawn = Sampling(20, do_sample=True, seed=1)
    free = written(tiny, rows(tiny, PROMPTS[:1], drawn))[0]
    at = next(n for n in range(1, 20) if free.ids[n] not in free.ids[:n])
    one, two = rows(tiny, PROMPTS[:1] * 2, drawn)
    one.ends |= {free.ids[at]}
    ended, other = written(tiny, [one, two])
    assert (ended.ids, ended.finish_reason) == (free.ids[:at], "stop")
    assert other == free


# -- drawing ---------------------------------------------------------------------------------------------------------


def shaped_by_transformers(scores_V: torch.Tensor, ids_T: list[int], **settings: Any) -> torch.Tensor:
    """The probabilities that transformers itself would draw from. [V], fp64"""
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    processors = model._get_logits_processor(config, len(ids_T), None, None, None)
    return processors(torch.tensor([ids_T]), scores_V[None].clone())[0].softmax(-1, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.9},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_would(settings: dict[str, Any]):
    """Every chance from 0 to 1, evenly: the counts of tokens are their probabilities, to one part in so many."""
    many, scores_V = 4000, torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    ids = [3, 3, 7, 30, 12]
    expected_V = shaped_by_transformers(scores_V, ids, **settings)
    chances = [torch.tensor((n + 0.5) / many, dtype=torch.float64) for n in range(many)]
    sampling = Sampling.of(do_sample=True, **settings)
    draw = Draw([sampling] * many, [2] * many, [lambda chance=chance: chance for chance in chances])
    padded = torch.tensor([[9, 9, *ids]] * many)  # what stands in the padding is nobody's token
    tokens = draw(padded, scores_V.repeat(many, 1)).argmax(-1)
    shares_V = torch.bincount(tokens, minlength=40).double() / many
    assert (shares_V - expected_V).abs().max() <= 1.01 / many
    assert not shares_V[expected_V == 0].any()


def test_chances_at_the_very_ends():
    scores = torch.full((2, 6), -torch.inf)
    scores[:, 2:4] = 0.0
    ends = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(1 - 2**-53, dtype=torch.float64)]
    draw = Draw([Sampling(do_sample=True)] * 2, [0, 0], [lambda end=end: end for end in ends])
    assert draw(torch.zeros(2, 1, dtype=torch.long), scores).argmax(-1).tolist() == [2, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-44, 1e-38, 1e-30])
@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature: float, shift: float):
    """Divided by it, numbers become inf and NaN: no row of the batch may break, and no other token be taken."""
    scores = torch.tensor([[0.5, 2.0, -3.0, 1.0], [3.0, 0.0, 1.0, 2.9]]) + shift
    chances = [lambda: torch.tensor(0.99, dtype=torch.float64)] * 2
    draw = Draw([Sampling(do_sample=True, temperature=temperature)] * 2, [0, 0], chances)
    assert draw(torch.zeros(2, 1, dtype=torch.long), scores).argmax(-1).tolist() == [1, 0]


def test_seeds(tiny: tuple[Any, Any]):
    def texts(seed: int | None) -> str:
        return written(tiny, rows(tiny, PROMPTS[:1], Sampling(20, do_sample=True, seed=seed)))[0].text

    assert texts(1) == texts(1) != texts(2)
    assert texts(None) != texts(None)


# -- stopped on the way ----------------------------------------------------------------------------------------------


def test_pieces_are_told_as_they_come(tiny: tuple[Any, Any]):
    told: list[tuple[int, str]] = []
    ended: list[int] = []
    answers = written(
        tiny,
        rows(tiny, PROMPTS, Sampling(9), Sampling(12), Sampling(3), Sampling(20)),
        listener=Listener(lambda row, piece: told.append((row, piece)), lambda row, _: ended.append(row)),
    )
    for number, answer in enumerate(answers):
        assert "".join(piece for row, piece in told if row == number) == answer.text
    assert ended == [2, 0, 1, 3], "each at its own end"
    assert [row for row, _ in told[:4]] != [0] * 4, "side by side"


def test_cancelled_rows_end_and_others_do_not(tiny: tuple[Any, Any]):
    these = rows(tiny, PROMPTS, Sampling(20))
    answers = written(
        tiny, these, listener=Listener(cancelled=lambda row: row in (0, 2) and len(these[row].ids) >= 4 + row)
    )
    whole = written(tiny, rows(tiny, PROMPTS, Sampling(20)))
    assert [answer.finish_reason for answer in answers] == ["cancelled", "length", "cancelled", "length"]
    assert [len(answer.ids) for answer in answers] == [4, 20, 6, 20]
    assert answers[1] == whole[1]
    assert answers[0].ids == whole[0].ids[:4]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_paused_answer_goes_on_exactly_there(after: int, tiny: tuple[Any, Any]):
    """In other company, too: greedy and drawn, with a stop string half there and half a character held back."""
    samplings = [
        Sampling(20),
        Sampling(25, do_sample=True, temperature=1.5, seed=3),
        Sampling(4, repetition_penalty=1.7),
        Sampling(30, do_sample=True, top_k=5, seed=4, repetition_penalty=1.3, stop_strings=("}o", "of")),
    ]
    whole = written(tiny, rows(tiny, PROMPTS, *samplings))
    told = [""] * 4

    def run(these: list[Row], numbers: list[int]) -> list[Written]:
        count = [0]

        def paused() -> bool:
            count[0] += 1
            return count[0] >= after

        def piece(row: int, text: str) -> None:
            told[numbers[row]] += text

        return written(tiny, these, listener=Listener(piece, paused=paused))

    found: dict[int, Written] = {}
    waiting = dict(enumerate(rows(tiny, PROMPTS, *samplings)))
    for _ in range(40):
        numbers = sorted(waiting, reverse=True)[:3]
        for number, answer in zip(numbers, run([waiting[n] for n in numbers], numbers), strict=True):
            if answer.row is None:
                found[number] = answer
                del waiting[number]
            else:
                assert answer.finish_reason == "paused"
                assert answer.row is waiting[number]
        if not waiting:
            break
    assert [found[number] for number in range(4)] == whole
    assert told == [answer.text for answer in whole]


def test_nan_ends_its_own_row(tiny: tuple[Any, Any]):
    whole = written(tiny, rows(tiny, PROMPTS, Sampling(6)))
    model = tiny[0]

    def poison(_module: Any, _inputs: Any, outputs: Any) -> None:
        outputs.logits[1] = torch.nan
        outputs.logits[2, :, 0], outputs.logits[2, :, 1] = torch.inf, -torch.inf

    hook = model.register_forward_hook(poison)
    try:
        answers = written(tiny, rows(tiny, PROMPTS, Sampling(6)))
    finally:
        hook.remove()
    assert [answer.finish_reason for answer in answers] == ["length", "failed", "length", "length"]
    assert (answers[0], answers[3]) == (whole[0], whole[3])
    assert (answers[1].ids, answers[1].text) == ((), "")
    assert set(answers[2].ids) == {0}


def test_ctrl_c_gets_through(tiny: tuple[Any, Any]):
    def interrupt(_row: int, _piece: str) -> None:
        raise KeyboardInterrupt

    own = tiny[0].generation_config
    with pytest.raises(KeyboardInterrupt):
        written(tiny, rows(tiny, PROMPTS[:1], Sampling(6)), listener=Listener(interrupt))
    assert tiny[0].generation_config is own


# -- an encoder and a decoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("t5")
    write_model(folder, "t5")
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_two_texts(t5: tuple[Any, Any]):
    model, tokenizer = t5
    samplings = [Sampling(12), Sampling(7, do_sample=True, seed=1), Sampling(9, repetition_penalty=1.5), Sampling(3)]
    together = written(t5, rows(t5, PROMPTS, *samplings))
    assert together == [written(t5, rows(t5, [p], s))[0] for p, s in zip(PROMPTS, samplings, strict=True)]
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 1:]
    ended = tokenizer.eos_token_id
    assert list(together[0].ids) == [token for token in expected.tolist() if token != ended]
    never = written(t5, rows(t5, PROMPTS[:1], Sampling(12)), listener=Listener(paused=lambda: True))
    assert never == together[:1], "it does not pause"


def test_a_prompt_longer_than_the_encoder(t5: tuple[Any, Any]):
    with pytest.raises(UsageError, match="the model's context 4"):
        written(t5, rows(t5, PROMPTS[1:2], Sampling(3)), context=4)
    assert len(written(t5, rows(t5, PROMPTS[:1], Sampling(30)), context=9)[0].ids) <= 9


def test_each_token_has_a_chance_of_its_own(tiny: tuple[Any, Any]):
    """The same until the token has come: on some devices a step begins anew."""
    (row,) = rows(tiny, PROMPTS[:1], Sampling(do_sample=True, seed=5))
    generator = torch.Generator().manual_seed(5)
    for token in (50, 60, 70):
        expected = torch.rand((), generator=generator, dtype=torch.float64)
        assert row.chance() == row.chance() == expected
        row.take(token, 99)
