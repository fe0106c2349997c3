"""What the proxy makes of faults: of the upstream, of a router, of a request."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import httpx2
import pytest
from proxy_helpers import (
    CHAT,
    FakeUpstream,
    asked,
    by_word,
    listening,
    post,
    proxied,
    proxy_of,
)

from dynlora_cli.library.activation import Decision
from dynlora_cli.serving.choosing import Chooser
from dynlora_cli.serving.proxy import MODELS
from dynlora_cli.serving.upstreams import Upstream


def test_an_upstream_that_is_down():
    fake = FakeUpstream()
    with listening(fake) as url:
        proxy = proxy_of(url)
    with listening(proxy, "on") as address:
        answer = post(address, asked("law"))
        models = httpx2.get(address + MODELS, trust_env=False)
        other = httpx2.get(address + "/health", trust_env=False)
    for each in (answer, models, other):
        assert each.status_code == 502
        error = each.json()["error"]
        assert error["code"] == "upstream_unreachable"
        assert error["type"] == "server_error"
        assert url in error["message"]
    assert answer.headers["x-dynlora-model"] == "law"


def test_an_upstream_that_is_silent():
    async def silent(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with proxied(FakeUpstream(answers={CHAT: silent}), seconds=0.2) as (address, _):
        answer = post(address, asked("law"))
    assert answer.status_code == 504
    assert "silent for 0.2 seconds" in answer.json()["error"]["message"]


def test_an_upstream_that_ends_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def close() -> None:
            connection, _ = taken.accept()
            connection.recv(1000)
            connection.close()

        thread = threading.Thread(target=close)
        thread.start()
        proxy = proxy_of_card(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with listening(proxy, "on") as address:
            answer = post(address, asked("law"))
        thread.join()
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_broke_off"


def proxy_of_card(url: str) -> Any:
    """A proxy that knows its upstream without having asked it."""
    with listening(FakeUpstream()) as known:
        proxy = proxy_of(known)
    proxy.through.url = httpx2.URL(url)
    return proxy


def test_half_an_answer_is_never_taken_for_a_whole_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def half() -> None:
            connection, _ = taken.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
            connection.close()

        thread = threading.Thread(target=half)
        thread.start()
        proxy = proxy_of_card(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with listening(proxy, "on") as address, pytest.raises(httpx2.RemoteProtocolError):
            post(address, asked("law"))
        thread.join()
    assert "broke off its answer" in proxy.lines[-1]


def test_a_router_that_fails_is_told_to_its_client_alone():
    def decide(texts: Any) -> list[Decision]:
        if "bad" in texts[0]:
            raise RuntimeError("no")
        return by_word(texts)

    with proxied(FakeUpstream()) as (address, proxy):
        proxy.chooser = Chooser(decide)
        bad = post(address, asked("bad"))
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "router_failed")
        assert post(address, asked("law")).json()["model"] == "law"
    assert "RuntimeError: no" in proxy.lines[0]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"model": "auto", "prompt": [1, 2, 3]}, "token ids"),
        ({"model": "auto", "prompt": ["law", "cooking"]}, "different adapters (law, cooking)"),
    ],
)
def test_what_cannot_be_routed(form, words):
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        answer = post(address, form, "/v1/completions")
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert fake.received == []


def test_prompts_that_agree_go_out_together():
    with proxied(FakeUpstream()) as (address, _):
        answer = post(address, {"model": "auto", "prompt": ["law one", "law two"]}, "/v1/completions")
    assert answer.json()["model"] == "law"


def test_a_body_beyond_reason(monkeypatch):
    monkeypatch.setattr("dynlora_cli.serving.proxy.LARGEST_BODY", 1 << 20)
    with proxied(FakeUpstream()) as (address, _):
        answer = httpx2.post(address + CHAT, content=b"x" * (2 << 20), trust_env=False)
    assert answer.status_code == 413


def raw(address: str, request: bytes) -> tuple[int, bytes]:
    """Send bytes as they are; the status of the answer, and all of it."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        found = b""
        while part := connection.recv(65536):
            found += part
    return int(found.split(b" ", 2)[1]), found


END = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize("target", [b"http://elsewhere/x", b"*"])
def test_what_is_no_path(target: bytes):
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        status, answer = raw(address, b"OPTIONS " + target + END + b"\r\n")
    assert (status, fake.received) == (400, [])
    assert b"begins with /" in answer


def test_a_path_goes_on_to_the_letter():
    fake = FakeUpstream()
    paths = [b"/a/../b", b"/./x//y", b"/%2e%2E/%7Ez?q=%20[]{}|^", b"/a#b", b"//elsewhere/x"]
    with proxied(fake) as (address, _):
        for path in paths:
            assert raw(address, b"GET " + path + END + b"\r\n")[0] == 200
    assert [received.path.partition(b"#")[0] for received in fake.received] == [
        path.partition(b"#")[0] for path in paths
    ]


@pytest.mark.parametrize("path", [b"/../secret", b"/v1/%2e%2e/%2E./secret", b"/a/..%2fsecret", b"/..%5csecret"])
def test_no_path_leads_out_of_the_upstreams_address(path: bytes):
    fake = FakeUpstream()
    with listening(fake) as url:
        proxy = proxy_of(url)
        proxy.through.url = httpx2.URL(url + "/tenant")
        with listening(proxy, "on") as address:
            assert raw(address, b"GET " + path + END + b"\r\n")[0] == 400
            assert raw(address, b"GET /a..b/x" + END + b"\r\n")[0] == 200
    assert [received.path for received in fake.received] == [b"/tenant/a..b/x"]


def test_a_length_beside_chunks_is_not_passed_on():
    fake = FakeUpstream()
    told = b"Content-Type: text/html\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    with proxied(fake) as (address, _):
        assert raw(address, b"POST /x" + END + told + b"4\r\nabcd\r\n9\r\nGET / HTT\r\n0\r\n\r\n")[0] == 200
    (received,) = fake.received
    assert (received.body, received.header("content-length")) == (b"abcdGET / HTT", [])


def test_half_a_character_can_be_routed():
    fake = FakeUpstream()
    with proxied(fake) as (address, proxy):
        proxy.chooser = Chooser(lambda texts: by_word([text.encode().decode() for text in texts]))
        answer = httpx2.post(address + CHAT, content=b'{"model": "auto", "prompt": "law \\ud800"}', trust_env=False)
    assert answer.json()["model"] == "law"
    assert fake.received[0].form["prompt"] == "law \ud800"


def test_a_text_that_breaks_the_router_breaks_no_other():
    """They are decided on together."""
    together: list[int] = []

    def decide(texts: Any) -> list[Decision]:
        together.append(len(texts))
        if any("bad" in text for text in texts):
            raise RuntimeError("no")
        return by_word(texts)

    async def ask() -> list[Any]:
        chooser = Chooser(decide)
        upstream = Upstream("vllm", "the-base", {"law": "law"})
        questions = [chooser.choose([text], upstream) for text in ("law", "bad", "more law")]
        return await asyncio.gather(*questions, return_exceptions=True)

    first, bad, last = asyncio.run(ask())
    assert (first.name, last.name, type(bad)) == ("law", "law", RuntimeError)
    assert together[0] == 3
