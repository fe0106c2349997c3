"""Generated answers: which prompts and references, the same in a batch as alone, and metrics as their libraries say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from data_helpers import ROLE_TOKENS, byte_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from tiny_run import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.examples import Located, OneText
from dynlora_cli.data.forms import Pair, Plain, Turns
from dynlora_cli.evaluation.generation import MARGIN, Prompt, find_prompts, generate, metrics, unseen_by_rouge


def examples(tokenizer: Any, *forms: Any, train_on: str = "auto") -> list[OneText]:
    encoder = TextEncoder(tokenizer, train_on, 128)
    found = []
    for number, form in enumerate(forms):
        (draft,) = encoder.encode([Located(f"row {number}", form)])
        found.append(OneText(draft.ids, draft.labels, number))
    return found


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_has_all_its_references_once():
    tokenizer = byte_tokenizer()
    rows = [Pair("sort: ", "a b"), Pair("count: ", " two "), Pair("sort: ", "b"), Pair("sort: ", "a b")]
    sort, count = find_prompts(examples(tokenizer, *rows), tokenizer, 9)
    assert (sort.text, sort.references) == ("sort: ", ["a b", "b"])
    assert (count.text, count.references) == ("count: ", ["two"])
    assert sort.end_ids == {tokenizer.eos_token_id}
    assert sort.longest == len(tokenizer("a b", add_special_tokens=False).input_ids) + 1


def test_so_many_prompts_and_no_more_but_all_their_references():
    tokenizer = byte_tokenizer()
    rows = [Pair("a: ", "1"), Pair("b: ", "2"), Pair("a: ", "3")]
    (prompt,) = find_prompts(examples(tokenizer, *rows), tokenizer, 1)
    assert prompt.references == ["1", "3"]


def test_the_last_turn_of_a_conversation_is_the_answer():
    tokenizer = byte_tokenizer(ROLE_TOKENS)
    turns = [("user", "hello"), ("assistant", "yes?"), ("user", "sort"), ("assistant", "done")]
    conversation = Turns([{"role": role, "content": text} for role, text in turns])
    (prompt,) = find_prompts(examples(tokenizer, conversation), tokenizer, 9)
    assert prompt.references == ["done"]
    assert prompt.text.endswith("<|user|>sort</s><|assistant|>")
    assert "yes?" in prompt.text
    assert prompt.end_ids == {tokenizer.eos_token_id}


def test_rows_without_a_prompt_are_left_out():
    tokenizer = byte_tokenizer()
    assert find_prompts(examples(tokenizer, Plain("only a text")), tokenizer, 9) == []
    assert find_prompts(examples(tokenizer, Pair("a", "b"), train_on="all"), tokenizer, 9) == []


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = model_folder(tmp_path_factory.mktemp("models"), request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def prompts_of(tokenizer: Any, texts: list[str], longest: int = 12) -> list[Prompt]:
    return [Prompt(tuple(tokenizer(text).input_ids), text, ["x"], set(), longest) for text in texts]


def test_a_batch_answers_as_each_prompt_alone(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    texts = ["sort", "count the words in every line of it", "x", "print names and numbers"]
    prompts = prompts_of(tokenizer, texts)
    together = generate(model, tokenizer, prompts, batch_size=8, context=128)
    alone = [generate(model, tokenizer, [prompt], batch_size=1, context=128)[0] for prompt in prompts]
    assert together == alone
    assert generate(model, tokenizer, prompts, batch_size=2, context=None) == alone
    assert len(set(alone)) == len(alone), "the prompts matter"


@torch.no_grad()
def test_answers_are_the_most_likely_tokens_without_a_cache(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    (prompt,) = prompts_of(tokenizer, ["sort the lines"])
    ids = list(prompt.ids)
    for _ in range(prompt.longest + MARGIN):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, [prompt], batch_size=1, context=128) == [expected]


def test_no_answer_leaves_the_context_or_is_cut_for_its_neighbour(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    long, short = prompts_of(tokenizer, ["words " * 60, "sort"])
    long = Prompt(long.ids[:125], long.text, ["x"], set(), 12)
    together = generate(model, tokenizer, [long, short], batch_size=2, context=128)
    assert together[0] == generate(model, tokenizer, [long], batch_size=1, context=128)[0]
    assert together[1] == generate(model, tokenizer, [short], batch_size=1, context=128)[0]
    assert len(together[0]) <= 3 * max(map(len, tokenizer.get_vocab())), "three tokens are left of the context"


def test_an_answer_ends_at_the_token_that_ends_references(tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    (prompt,) = prompts_of(tokenizer, ["sort the lines"])
    ids = torch.tensor([prompt.ids])
    first, second = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)[0, -2:]
    assert first != second
    prompt.end_ids = {int(second)}
    (answer,) = generate(model, tokenizer, [prompt], batch_size=1, context=128)
    assert answer == tokenizer.decode([int(first)], skip_special_tokens=True).strip()


SAMPLING = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "num_beams": 2}
TOKENS = {"min_new_tokens": 30, "forced_bos_token_id": 70, "bad_words_ids": [[80]], "forced_eos_token_id": 90}


@pytest.mark.parametrize("wishes", [SAMPLING, TOKENS, "suppress"], ids=["sampling", "tokens", "suppressed"])
def test_a_models_own_wishes_do_not_count(wishes: Any, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, ["sort the lines", "count"])
    first = int(model(torch.tensor([prompts[0].ids])).logits[0, -1].argmax())
    plain = generate(model, tokenizer, prompts, batch_size=2, context=128)
    own = model.generation_config
    for name, value in ({"suppress_tokens": [first]} if wishes == "suppress" else wishes).items():
        monkeypatch.setattr(own, name, value, raising=False)
    assert generate(model, tokenizer, prompts, batch_size=2, context=128) == plain
    assert model.generation_config is own


def test_where_a_model_stops_of_itself_counts(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny
    (prompt,) = prompts_of(tokenizer, ["sort the lines"])
    first = int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])
    assert generate(model, tokenizer, [prompt], batch_size=1, context=128) == [""]


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_as_their_libraries_say():
    answers = ["the cat sat on the mat", "a dog", "two words here now"]
    references = [
        ["the cat is on the mat", "there is a cat on the mat"],
        ["a dog"],
        ["three words here", "x", "here now"],
    ]
    found = metrics(answers, references)
    assert found["exact_match"] == pytest.approx(1 / 3)
    sets: Any = [
        ["the cat is on the mat", "a dog", "three words here"],
        ["there is a cat on the mat", None, "x"],
        [None, None, "here now"],
    ]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, sets).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, sets).score)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts)
        for answer, texts in zip(answers, references, strict=True)
    ]
    assert found["rouge_l"] == pytest.approx(sum(best) / 3)


def test_more_references_never_hurt():
    answers, one, two = ["the cat sat"], [["a cat sat"]], [["a cat sat", "the cat sat"]]
    assert metrics(answers, two)["exact_match"] == 1
    assert metrics(answers, two)["rouge_l"] == 1 > metrics(answers, one)["rouge_l"]
    assert metrics(answers, two)["chrf"] == pytest.approx(100)


def test_what_rouge_does_not_see():
    texts = ["Привет", "привет 7", "ok", "…"]
    assert unseen_by_rouge([Prompt((1,), "", texts)]) == 2
    found = metrics(["Привет"], [["Привет"]])
    assert (found["rouge_l"], found["exact_match"], found["chrf"]) == (0, 1, pytest.approx(100))


def test_silence_scores_nothing():
    assert metrics([""], [["something"]]) == {"exact_match": 0.0, "bleu": 0.0, "chrf": 0.0, "rouge_l": 0.0}
