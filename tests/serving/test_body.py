"""Requests are read, and rewritten without touching a byte that is not meant."""

from __future__ import annotations

import json
import random

import pytest

from dynlora_cli.serving.body import Body, NoTextError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model": "auto"}', b'{"model": "law"}'),
        (b'{"model":"auto","temperature":1.0,"n":1e2}', b'{"model":"law","temperature":1.0,"n":1e2}'),
        (b' \n{\t"a" : {"model": "auto"} , "model" :\n"auto"\t}\r\n', b' \n{\t"a" : {"model": "auto"} , "model" :\n"law"\t}\r\n'),
        (b'{"mod\\u0065l": "au\\u0074o", "s": "\\ud800 \\/ \xc3\xa9"}', b'{"mod\\u0065l": "law", "s": "\\ud800 \\/ \xc3\xa9"}'),
        (b'{"model": "first", "x": 12345678901234567890.10, "model": "auto"}', b'{"model": "law", "x": 12345678901234567890.10, "model": "law"}'),
        (b'{"s": "\\"model\\": \\"auto\\"", "model": "auto"}', b'{"s": "\\"model\\": \\"auto\\"", "model": "law"}'),
    ],
)  # fmt: skip
def test_only_the_model_changes(before, after):
    body = Body.read(before)
    assert body is not None
    assert body.form["model"] == "auto"
    assert body.edited({"model": "law"}) == after


def test_a_key_that_is_not_there_comes_last():
    body = Body.read(b'{"model":"auto" , "x": [1, {"y": 2}] }')
    changed = body.edited({"model": "base", "lora": [{"id": 0, "scale": 0.5}]})
    assert changed == b'{"model":"base" , "x": [1, {"y": 2}], "lora": [{"id": 0, "scale": 0.5}] }'
    assert json.loads(changed)["lora"][0]["scale"] == 0.5


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[1]", b'"auto"', b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b"{a:1}", b'{"a":1}}', b'{"a" 1}',
     b"\xff\xfe{\x00", b'\xef\xbb\xbf{"a":1}', b'{"a": "\n"}', b"[" * 100_000, b'{"a":' * 100_000],
)  # fmt: skip
def test_what_is_no_object_is_none(raw):
    assert Body.read(raw) is None


def test_an_empty_object():
    assert Body.read(b" { } ").form == {}


def test_random_objects_are_read_as_the_standard_library_does():
    chance = random.Random(0)

    def value(depth: int = 0):
        kind = chance.randrange(7 if depth < 3 else 5)
        if kind == 5:
            return [value(depth + 1) for _ in range(chance.randrange(3))]
        if kind == 6:
            return {text(): value(depth + 1) for _ in range(chance.randrange(4))}
        return [text(), chance.random(), chance.randrange(-9, 9), True, None][kind]

    def text():
        return "".join(chance.choice('abö"\\{}[],: \n🙂model') for _ in range(chance.randrange(6)))

    for _ in range(300):
        form = {text(): value(1) for _ in range(chance.randrange(5))} | {"model": "auto"}
        raw = json.dumps(form, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5).encode()
        body = Body.read(raw)
        assert body.form == form
        assert body.edited({}) == raw
        assert json.loads(body.edited({"model": 'l"aw', "lora": []})) == form | {"model": 'l"aw', "lora": []}


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]}, ["two"]),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "tool", "content": "result"}]}, ["one"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]}]}, ["a\nb"]),
        ({"messages": [{"role": "system", "content": "be kind"}]}, [""]),
        ({"messages": "nonsense"}, [""]),
        ({"prompt": "once"}, ["once"]),
        ({"prompt": ["once", "twice"]}, ["once", "twice"]),
        ({"input": "hello"}, ["hello"]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}, ["hi"]),
        ({}, [""]),
        ({"prompt": []}, [""]),
    ],
)  # fmt: skip
def test_what_is_asked(form, asked):
    assert Body.read(json.dumps(form).encode()).asked() == asked


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_no_text(prompt):
    with pytest.raises(NoTextError, match="token ids"):
        Body.read(json.dumps({"prompt": prompt}).encode()).asked()
