"""The proxy on real sockets: what reaches the upstream, what comes back, and what becomes of faults."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from proxy_helpers import (
    CHAT,
    FakeUpstream,
    asked,
    event,
    post,
    proxied,
    reply,
    until,
)


@pytest.mark.parametrize(
    ("text", "model", "name"),
    [("a question of law", "law", "law"), ("on cooking", "cooking", "cooking"), ("the weather", "the-base", "base")],
)
def test_auto_becomes_the_adapter_and_the_answer_says_so(text, model, name):
    fake = FakeUpstream()
    with proxied(fake) as (address, proxy):
        answer = post(address, asked(text))
    assert answer.json()["model"] == fake.received[0].form["model"] == model
    assert answer.headers["x-dynlora-model"] == name
    assert answer.headers["x-dynlora-decision"] == f"{name}: by its word"
    assert proxy.lines == [f"POST {CHAT}: auto -> {name} ({name}: by its word)"]


def test_everything_but_the_model_reaches_the_upstream_byte_for_byte():
    fake = FakeUpstream()
    raw = b'{ "temperature":1.0,  "seed": 12345678901234567890,"model":\t"auto",\n "prompt":"law \\u00e9 \\/", "x":{"model":"auto"} }'
    headers = {
        "X-Own": "a  b",
        "Authorization": "Bearer tenant-1",
        "Cookie": "a=b",
        "Accept-Encoding": "br",
        "User-Agent": "mine",
    }
    with proxied(fake) as (address, _):
        httpx2.post(f"{address}/v1/completions?a=%2F&b=c+d", content=raw, headers=headers, trust_env=False)
    got = fake.received[0]
    assert got.path == b"/v1/completions?a=%2F&b=c+d"
    assert got.body == raw.replace(b'\t"auto"', b'\t"law"')
    for name, value in headers.items():
        assert got.header(name.lower()) == [value.encode()]
    assert got.header("content-length") == [str(len(got.body)).encode()]
    assert got.header("host") != [address.removeprefix("http://").encode()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [b'{"model": "law"}', b"not json", b"", b'{"model": "auto"', b'["auto"]', os.urandom(200_000)]
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/some/%2Fpath%20?q=%26"])
def test_what_is_not_auto_passes_as_it_is(body, path):
    fake = FakeUpstream()
    fake.answers = dict.fromkeys(
        ["/v1/chat/completions", "/tokenize", "/some//path "], lambda _s, _r, send: reply(send, 200, b"{}")
    )
    with proxied(fake) as (address, proxy):
        answer = httpx2.post(address + path, content=body, trust_env=False)
    assert answer.status_code == 200
    assert "x-dynlora-model" not in answer.headers
    assert fake.received[0].body == body
    assert fake.received[0].path == path.encode()
    assert proxy.lines == []


@pytest.mark.parametrize("kind", ["audio/wav", "application/octet-stream", "multipart/form-data; boundary=x"])
def test_what_says_that_it_is_no_json_is_not_looked_into(kind, monkeypatch):
    monkeypatch.setattr("dynlora_cli.serving.proxy.LARGEST_BODY", 1000)
    fake = FakeUpstream(answers={"/v1/audio": lambda _s, _r, send: reply(send, 200, b"{}")})
    with proxied(fake) as (address, _):
        answer = httpx2.post(
            f"{address}/v1/audio", content=b"{" * 5000, headers={"Content-Type": kind}, trust_env=False
        )
    assert answer.status_code == 200
    assert fake.received[0].body == b"{" * 5000


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"]
)
def test_clients_that_forget_to_say_that_it_is_json(kind):
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        httpx2.post(
            address + CHAT,
            content=json.dumps(asked("law")),
            headers={"Content-Type": kind} if kind else {},
            trust_env=False,
        )
    assert fake.received[0].form["model"] == "law"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_other_methods_and_paths(method):
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        direct = httpx2.request(method, address + "/metrics", trust_env=False)
    assert direct.status_code == 200
    assert fake.received[0].method == method
    assert fake.received[0].body == b""


def test_status_headers_and_packed_bodies_come_back_as_they_are():
    packed = gzip.compress(b'{"error": {"message": "no such model"}}')
    more = [(b"content-encoding", b"gzip"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-request-id", b"7"),
            (b"keep-alive", b"timeout=5"), (b"date", b"some day"), (b"server", b"theirs")]  # fmt: skip
    fake = FakeUpstream(answers={CHAT: lambda _s, _r, send: reply(send, 404, packed, *more)})
    with (
        proxied(fake) as (address, _),
        httpx2.stream("POST", address + CHAT, json=asked("law"), trust_env=False) as answer,
    ):
        raw = b"".join(answer.iter_raw())
    assert answer.status_code == 404
    assert raw == packed
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert answer.headers["x-request-id"] == "7"
    assert (answer.headers["date"], answer.headers["server"]) == ("some day", "theirs")
    assert "keep-alive" not in answer.headers
    assert answer.headers["x-dynlora-model"] == "law"


def test_headers_about_the_connection_stay_there():
    fake = FakeUpstream()
    headers = {
        "Connection": "keep-alive, X-Mine",
        "X-Mine": "1",
        "TE": "trailers",
        "Proxy-Authorization": "Basic eA==",
        "X-Other": "2",
    }
    with proxied(fake) as (address, _):
        httpx2.get(address + "/metrics", headers=headers, trust_env=False)
    got = fake.received[0]
    assert not any(got.header(name) for name in ("x-mine", "te", "proxy-authorization"))
    assert got.header("x-other") == [b"2"]


@pytest.mark.parametrize("body", [b'{"model": "auto", "prompt": "law"}', os.urandom(300_000)])
def test_a_body_without_a_known_length(body):
    fake = FakeUpstream(answers={"/upload": lambda _s, _r, send: reply(send, 200, b"{}")})
    packed = {"Content-Encoding": "zip"}  # so it is not looked into
    with proxied(fake) as (address, _):
        pieces = (body[start : start + 7000] for start in range(0, len(body), 7000))
        answer = httpx2.post(address + "/upload", content=pieces, headers=packed, trust_env=False)
    assert answer.status_code == 200
    assert fake.received[0].body == body


def test_an_event_stream_arrives_piece_by_piece():
    """The upstream sends a piece only when the client has read the one before: whoever holds one back ends in a time-out."""
    read = threading.Semaphore(0)
    sent = [event(f"w{number} ") for number in range(5)] + [b": a comment\n", b"\n", b"data: [DONE]\n\n"]

    async def slowly(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in sent:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            assert await asyncio.to_thread(read.acquire, timeout=5)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    fake = FakeUpstream(answers={CHAT: slowly})
    got = []
    with (
        proxied(fake) as (address, _),
        httpx2.stream("POST", address + CHAT, json=asked("law", stream=True), timeout=10, trust_env=False) as answer,
    ):
        for piece in answer.iter_raw():
            got.append(piece)
            read.release()
    assert got == sent
    assert answer.headers["content-type"] == "text/event-stream"


def test_a_client_that_hangs_up_takes_its_request_along():
    fake = FakeUpstream()
    fake.answers = {CHAT: lambda *of: fake.events(*of, pieces=400)}
    with proxied(fake) as (address, _):
        with httpx2.stream("POST", address + CHAT, json=asked("law", stream=True), trust_env=False) as answer:
            next(answer.iter_raw())
        until(lambda: fake.hung_up == 1)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_client_that_hangs_up_and_has_sent_no_body(method: str):
    fake = FakeUpstream()
    fake.answers = {"/events": lambda *of: fake.events(*of, pieces=400)}
    with proxied(fake) as (address, _):
        with httpx2.stream(method, address + "/events", trust_env=False) as answer:
            next(answer.iter_raw())
        until(lambda: fake.hung_up == 1)


def test_a_client_that_hangs_up_before_the_answer_begins():
    gone = threading.Event()

    async def never(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    fake = FakeUpstream(answers={CHAT: never})
    with proxied(fake) as (address, proxy):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(address + CHAT, json=asked("law"), timeout=0.3, trust_env=False)
        assert gone.wait(5)
    assert not [line for line in proxy.lines if "->" not in line], "a client that goes is no fault"


@pytest.mark.slow
def test_sixty_four_clients_half_of_which_hang_up():
    fake = FakeUpstream()
    fake.answers = {CHAT: lambda *of: fake.events(*of, pieces=40, pause=0.02)}
    wholes = []

    def one(address: str, number: int) -> None:
        text = ["law", "cooking", "neither"][number % 3]
        with httpx2.stream(
            "POST", address + CHAT, json=asked(text, stream=True), timeout=30, trust_env=False
        ) as answer:
            assert answer.status_code == 200
            assert answer.headers["x-dynlora-model"] == ["law", "cooking", "base"][number % 3]
            if number % 2:
                next(answer.iter_raw())
                return
            wholes.append(b"".join(answer.iter_raw()))

    with proxied(fake) as (address, proxy), ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda number: one(address, number), range(64)))
        until(lambda: fake.hung_up == 32)
        assert post(address, asked("law"), "/v1/completions").json()["model"] == "law", "it still serves"
        assert not proxy.chooser._waiting
    assert len(wholes) == 32
    assert set(wholes) == {b"".join(event(f"w{number} ") for number in range(40)) + b"data: [DONE]\n\n"}
    models = [each.form["model"] for each in fake.received[:64]]
    assert {name: models.count(name) for name in set(models)} == {"law": 22, "cooking": 21, "the-base": 21}
