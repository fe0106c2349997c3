"""What a model wrote, taken apart: thoughts, words and calls, in the forms of well-known models."""

from __future__ import annotations

import json

import pytest

from dynlora_cli.generation.parsed import Call, Parsed, Split, parse

ARGUMENTS = {"city": "Paris", "days": 2}
CALL = Call("weather", json.dumps(ARGUMENTS))
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        HERMES,
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "days": 2}, "id": "call00001"}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}',
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}<|call|>',
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 2}<|call|>',
    ],
    ids=["hermes, qwen", "qwen 3.5", "llama", "mistral", "ministral", "gpt-oss", "gpt-oss by its template"],
)
def test_a_call_in_every_form(text: str) -> None:
    assert parse(text, text, tools=["weather"]) == Parsed("", "", [CALL])


def test_several_calls_and_words_beside_them() -> None:
    found = parse(f"I look.\n{HERMES}\n{HERMES}", "", tools=["weather"])
    assert found == Parsed("I look.", "", [CALL, CALL])


@pytest.mark.parametrize(
    "text", [HERMES.replace("}}", "}"), '{"name": "other", "parameters": {}}', "[TOOL_CALLS]weather[ARGS]{", "[1, 2]"]
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse(text, text, tools=["weather"]) == Parsed(text)


def test_nothing_is_a_call_where_there_are_no_tools() -> None:
    assert parse(HERMES, HERMES) == Parsed(HERMES)


def test_thoughts_in_brackets() -> None:
    raw = '[THINK]hm[/THINK]yes[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}'
    assert parse("hmyes", raw.partition("[TOOL")[0]) == Parsed("yes", "hm")
    assert parse("", raw, tools=["weather"]) == Parsed("yes", "hm", [CALL])


def test_channels_of_gpt_oss() -> None:
    raw = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It rains."
    assert parse("analysishmfinalIt rains.", raw) == Parsed("It rains.", "hm")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("hm\n</think>\n\nyes", True, ("hm", "yes")),
        ("<think>\nhm", False, ("hm", "")),
        ("hm, cut off", True, ("hm, cut off", "")),
        ("see </think> yes", False, ("", "see </think> yes")),
        (" yes ", False, ("", " yes ")),
        ("<thin", False, ("", "<thin")),
        ("<think>\n\n</think>\n\nyes <b", False, ("", "yes <b")),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stream_gives_what_the_whole_gives(text: str, opened: bool, expected: tuple[str, str], size: int) -> None:
    found = parse(text, "", opened=opened)
    assert (found.reasoning, found.content) == expected
    split = Split(opened=opened)
    pieces = [piece for at in range(0, len(text), size) for piece in split.feed(text[at : at + size])] + split.close()
    assert "".join(piece for thought, piece in pieces if thought) == expected[0]
    assert "".join(piece for thought, piece in pieces if not thought) == expected[1]
