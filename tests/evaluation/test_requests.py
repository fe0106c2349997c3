"""What a person asks, taken out of rows and prompts."""

from __future__ import annotations

from array import array

import pytest
from data_helpers import CHATML, LLAMA3, MISTRAL, byte_tokenizer

from dynlora_cli.data.chat.template import write
from dynlora_cli.data.examples import IGNORED, Classified, OneText, TwoTexts
from dynlora_cli.evaluation.requests import RequestTexts

QUESTION = "How many games\nwere sold?"


def row(tokenizer, prompt: str, answer: str) -> OneText:
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    return OneText(array("i", before + after), array("i", [IGNORED] * len(before) + after), 0)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama 3", "mistral"])
@pytest.mark.parametrize("turns", [1, 2])
def test_the_request_is_the_last_turn_without_the_template(template: str, turns: int):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}] if turns == 2 else []
    prompt = write(tokenizer, [*before, {"role": "user", "content": QUESTION}], None, answer=True)
    assert RequestTexts(tokenizer).of(row(tokenizer, prompt, "12 of them")) == QUESTION


def test_the_request_of_bare_texts():
    tokenizer = byte_tokenizer()
    texts = RequestTexts(tokenizer)
    assert texts.of(row(tokenizer, f"{QUESTION} ", "12 of them")) == QUESTION
    ids = array("i", tokenizer(QUESTION)["input_ids"])
    assert texts.of(OneText(ids, ids, 0)) == QUESTION, "a text to be continued from its first token"
    assert texts.of(Classified(ids, 1, 0)) == QUESTION
    assert texts.of(TwoTexts(ids, array("i", [5, 6]), 0)) == QUESTION


def test_a_template_that_refuses_is_done_without():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert RequestTexts(tokenizer).of(row(tokenizer, QUESTION, " 12")) == QUESTION


def test_of_a_prompt_the_last_question_is_shown():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and then?"},
    ]
    texts = RequestTexts(tokenizer)
    assert texts.in_prompt(write(tokenizer, turns, None, answer=True)) == "and then?"
    assert texts.in_prompt("bare text: ") == "bare text:"
