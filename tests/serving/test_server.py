"""The server's addresses on a real port, asked with OpenAI's own client; the engine is a fake."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import openai
import pytest
from fake_engine import FakeEngine, answer_of
from serving_helpers import Server, serving

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(FakeEngine()) as server:
        yield server


def test_models_are_listed_as_vllm_lists_them(server: Server):
    models = {model.id: model for model in server.client().models.list()}
    assert list(models) == ["some/base", "a", "b", "auto"]
    assert (models["a"].parent, models["some/base"].parent) == ("some/base", None)
    assert models["some/base"].root == "some/base"
    assert server.client().models.retrieve("some/base").max_model_len == 1000
    with pytest.raises(openai.NotFoundError, match="no model 'c'"):
        server.client().models.retrieve("c")


@pytest.mark.parametrize("model", ["a", "base", "0.7*a+0.3*b"])
def test_a_chat_is_answered(server: Server, model: str):
    answer = server.client().chat.completions.create(model=model, messages=USER, max_completion_tokens=4)
    assert answer.choices[0].message.content == answer_of(model, "hi", 4)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", model, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 4, 6)


def test_the_base_answers_to_its_own_name(server: Server):
    answer = server.client().chat.completions.create(model="some/base", messages=USER, max_tokens=3)
    assert answer.choices[0].message.content == answer_of("base", "hi", 3)


def test_a_router_says_whom_it_has_chosen(server: Server):
    raw = server.client().chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "one for b"}], max_tokens=3
    )
    assert (raw.headers["x-dynlora-mix"], raw.headers["x-dynlora-router"]) == ("b", "embedding")
    answer = raw.parse()
    assert answer.model == "b"
    assert answer.dynlora["confidence"] == {"b": 0.75}
    stream = server.client().chat.completions.create(model="auto", messages=USER, max_tokens=3, stream=True)
    assert {chunk.dynlora["mix"] for chunk in stream} == {"a"}


def test_a_router_by_token_names_no_mix():
    with serving(FakeEngine(router="arrow")) as server:
        _, answer, headers = server.ask("/v1/completions", {"model": "auto", "prompt": "x", "max_tokens": 2})
    assert (answer["model"], answer["dynlora"]["mix"], answer["dynlora"]["router"]) == ("auto", None, "arrow")
    assert headers["x-dynlora-router"] == "arrow"
    assert "x-dynlora-mix" not in headers


def test_a_stream_is_the_answer_in_pieces(server: Server):
    stream = server.client().chat.completions.create(
        model="a", messages=USER, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == answer_of("a", "hi", 5)
    assert len([text for text in texts if text]) == 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.total_tokens == 7


def test_texts_are_written_on(server: Server):
    client = server.client()
    answer = client.completions.create(model="b", prompt=["one", "two"], max_tokens=3, n=2)
    assert [choice.text for choice in answer.choices] == [
        answer_of("b", word, 3) for word in ("one", "one", "two", "two")
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
    stream = client.completions.create(model="b", prompt="one", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer_of("b", "one", 16)  # OpenAI's own default


WRONG = [
    ({"model": "c", "messages": USER}, 404, "model", "no adapter 'c'"),
    ({"model": "a*b", "messages": USER}, 404, "model", "a*b"),
    ({"messages": USER}, 400, "model", "model is missing"),
    ({"model": "a"}, 400, "messages", "messages is missing"),
    ({"model": "a", "messages": []}, 400, "messages", "at least 1"),
    ({"model": "a", "messages": [{"role": "judge", "content": "x"}]}, 400, "messages.0.role", "role"),
    ({"model": "a", "messages": [{"role": "user"}]}, 400, None, "content is missing"),
    ({"model": "a", "messages": USER, "chat_template_kwargs": {"tokenize": True}}, 400, None, "tokenize is no variable"),
    ({"model": "a", "messages": USER, "tool_choice": "required"}, 400, "tool_choice", "'none' or 'auto'"),
    ({"model": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "type"),
    ({"model": "a", "messages": USER, "temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"model": "a", "messages": USER, "temperature": "1"}, 400, "temperature", "number"),
    ({"model": "a", "messages": USER, "max_tokens": 0}, 400, "max_tokens", "greater"),
    ({"model": "a", "messages": USER, "n": 100}, 400, "n", "at most 64"),
    ({"model": "a", "messages": USER, "stop": [""]}, 400, "stop", "characters"),
    ({"model": "a", "messages": USER, "tools": [{"type": "function"}]}, 400, None, "tools.0.function is missing"),
    ({"model": "a", "messages": USER, "logprobs": True}, 400, "logprobs", "not supported"),
    ({"model": "a", "messages": USER, "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"model": "a", "messages": USER, "logit_bias": {"1": 2}}, 400, "logit_bias", "not supported"),
    ({"model": "a", "messages": USER, "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    ({"model": "a", "messages": [{"role": "user", "content": "too long"}]}, 400, None, "shorten it"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "words"), WRONG, ids=[str(wrong[3]) for wrong in WRONG])
def test_what_is_wrong_is_named(server: Server, body: dict, status: int, param: str | None, words: str):
    for more in ({}, {"stream": True}):
        got, answer, _ = server.ask("/v1/chat/completions", body | more)
        assert got == status
        assert words in answer["error"]["message"]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert param is None or answer["error"]["param"] == param


def test_what_changes_no_answer_is_taken(server: Server):
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "tools": [], "logprobs": False, "stop": None,
                "response_format": {"type": "text"}, "presence_penalty": 0.0, "stream": None, "tool_choice": "none"}  # fmt: skip
    body = {"model": "a", "messages": USER, "max_tokens": 3, **harmless}
    assert server.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == answer_of("a", "hi", 3)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = '<think>\nlet me\n</think>\n\nI ask. <tool_call>\n{"name": "f", "arguments": {"x": "y z"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_and_calls_are_fields_of_their_own(server: Server, stream: bool):
    body = {"model": "a", "messages": [{"role": "user", "content": f"say {CALLED}"}], "tools": [TOOL]}
    asked = server.client().chat.completions.create(**body, max_tokens=30, stream=stream)
    deltas = [chunk.choices[0].delta for chunk in asked] if stream else [asked.choices[0].message]
    assert "".join(delta.content or "" for delta in deltas) == "I ask."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "let me"
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"x": "y z"})
    if not stream:
        assert asked.choices[0].finish_reason == "tool_calls"
    assert server.engine.told[-1][1] == {"tools": [TOOL]}


@pytest.mark.parametrize("stream", [False, True])
def test_without_tools_a_call_is_text_and_thoughts_come_as_they_are_written(server: Server, stream: bool):
    body = {"model": "a", "messages": [{"role": "user", "content": f"say {CALLED}"}], "tools": [TOOL]}
    asked = server.client().chat.completions.create(**body, tool_choice="none", max_tokens=30, stream=stream)
    deltas = [chunk.choices[0].delta for chunk in asked] if stream else [asked.choices[0].message]
    assert "".join(delta.content or "" for delta in deltas) == CALLED.partition("\n\n")[2]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "let me"
    assert server.engine.told[-1][1] == {}


def test_a_conversation_with_calls_comes_to_the_engine_whole(server: Server):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "refusal": None}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "7"}]}
    body = {"model": "a", "messages": [*USER, answer, result], "max_tokens": 2}
    status, _, _ = server.ask("/v1/chat/completions", body | {"chat_template_kwargs": {"enable_thinking": False}})
    assert status == 200
    assert server.engine.told[-1] == (
        [
            *USER,
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
        ],
        {"kwargs": {"enable_thinking": False}},
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"model": NaN}'])
def test_bad_json_is_answered(server: Server, body: bytes):
    status, answer, _ = server.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_other_addresses_and_methods(server: Server):
    assert server.ask("/v1/embeddings", {})[0] == 404
    assert server.ask("/v1/chat/completions")[0] == 405
    assert server.ask("/health")[:2] == (200, {"status": "ok"})
    headers = server.ask("/v1/models")[2]
    assert not {name.lower() for name in headers} & {"access-control-allow-origin", "server"}


def test_a_body_may_not_be_huge(server: Server):
    status, answer, _ = server.ask("/v1/completions", b" " * (5 << 20))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_a_huge_body_in_pieces_is_refused_too(server: Server):
    with server.raw() as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        for _ in range(5):
            line.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        line.sendall(b"0\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_a_slow_body_does_not_wait_for_ever():
    with serving(FakeEngine(), seconds=0.2) as server, server.raw() as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 10\r\n\r\n{")  # fmt: skip
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_slow_heads_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch):
    from dynlora_cli.serving.heads import Impatient

    monkeypatch.setattr(Impatient, "seconds", 0.2)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with serving(FakeEngine()) as server:
        for begun in (b"", head):
            with server.raw() as line:
                line.sendall(begun)
                assert line.recv(100) == b""
        with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as line:
            for _ in range(2):
                line.request("GET", "/health")
                answer = line.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
                time.sleep(0.4)  # between requests it may be silent
            line.sock.sendall(head)
            assert line.sock.recv(100) == b""


def test_a_page_of_another_site_cannot_ask(server: Server):
    assert server.ask("/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    for host in ("evil.example", "localhost.evil.example", "10.0.0.1:8000"):
        assert server.ask("/v1/models", headers={"Host": host})[0] == 403
    for host in ("localhost", "localhost:1", "127.0.0.1:80", "[::1]:80"):
        assert server.ask("/v1/models", headers={"Host": host})[0] == 200


def test_a_key_opens():
    with serving(FakeEngine(), key="right key") as server:
        assert server.ask("/v1/models")[0] == 200
        assert server.ask("/v1/models", headers={"Host": "my.name"})[0] == 200
        for wrong in ("Bearer wrong", "Bearer", "Bearer right key2", "Basic right key", ""):
            for path, body in (
                ("/v1/models", None),
                ("/metrics", None),
                ("/v1/completions", {}),
                ("/v1/nothing", None),
            ):
                status, answer, headers = server.ask(path, body, {"Authorization": wrong})
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        assert server.ask("/health", headers={"Authorization": ""})[0] == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_requests_of_different_adapters_share_batches():
    engine = FakeEngine(seconds=0.002)
    with serving(engine) as server, ThreadPoolExecutor(16) as pool:
        models = ["a", "b", "base", "0.5*a+b"] * 4

        def ask(number: int) -> str:
            answer = server.client().completions.create(model=models[number], prompt=f"p{number}_", max_tokens=20)
            return answer.choices[0].text

        texts = list(pool.map(ask, range(16)))
        assert texts == [answer_of(models[n], f"p{n}_", 20) for n in range(16)]
        assert max(len(batch) for batch in engine.batches) > 4
        assert server.metric("dynlora_queue_length") == server.metric("dynlora_running") == 0
        assert server.metric('dynlora_requests_total{model="blend",status="200"}') == 4
        assert server.metric('dynlora_generated_tokens_total{model="a"}') == 80


def test_the_queue_has_an_end():
    engine = FakeEngine(seconds=0.02)
    with serving(engine, max_queue=2, max_batch=1) as server, ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(server.ask, "/v1/completions", {"model": "a", "prompt": f"{n}", "max_tokens": 30})
            for n in range(8)
        ]
        results = [future.result() for future in asked]
        codes = [status for status, _, _ in results]
        assert set(codes) == {200, 429}
        full = next(result for result in results if result[0] == 429)
        assert full[1]["error"]["code"] == "queue_full"
        assert int(full[2]["retry-after"]) >= 1
        assert server.ask("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 3})[0] == 200


def test_time_is_limited():
    with serving(FakeEngine(seconds=0.05), timeout=0.4) as server:
        body = {"model": "a", "prompt": "x", "max_tokens": 1000}
        status, answer, _ = server.ask("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        status, stream, _ = server.ask("/v1/completions", body | {"stream": True})
        events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line]
        assert status == 200
        assert events[0]["choices"][0]["text"]
        assert events[-1]["error"]["code"] == "timeout"
        server.until(lambda: server.worker.running == 0)
        assert server.metric('dynlora_requests_total{model="a",status="504"}') == 2


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_not_written_for(stream: bool):
    with serving(FakeEngine(seconds=0.01)) as server:
        body = json.dumps({"model": "a", "prompt": "x", "max_tokens": 100_000, "stream": stream}).encode()
        line = server.raw()
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        server.until(lambda: server.worker.running == 1)
        if stream:
            line.recv(10)
        line.close()
        server.until(lambda: server.worker.running == 0, 2.0)
        server.until(lambda: server.metric('dynlora_requests_total{model="a",status="499"}') == 1)


def test_a_request_that_breaks_its_batch_breaks_no_other():
    engine = FakeEngine(seconds=0.002)
    with serving(engine) as server, ThreadPoolExecutor(8) as pool:
        gate = threading.Event()
        engine.at_step = lambda step: gate.wait(10) and None
        first = pool.submit(server.ask, "/v1/completions", {"model": "a", "prompt": "f", "max_tokens": 20})
        server.until(lambda: server.worker.running == 1)
        prompts = ["one", "crash", "two"]
        rest = [
            pool.submit(server.ask, "/v1/completions", {"model": "b", "prompt": p, "max_tokens": 9}) for p in prompts
        ]
        server.until(lambda: server.worker.waiting == 3)
        gate.set()
        statuses = [future.result()[0] for future in rest]
        assert statuses == [200, 500, 200]
        assert "secret" not in json.dumps(rest[1].result()[1])
        assert any("secret" in line for line in server.said)
        assert first.result()[1]["choices"][0]["text"] == answer_of("a", "f", 20)


@pytest.mark.slow
def test_a_new_request_does_not_wait_for_a_long_answer():
    with serving(FakeEngine(seconds=0.005, alone=("b",))) as server, ThreadPoolExecutor(2) as pool:
        long = pool.submit(server.ask, "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 900})
        server.until(lambda: server.worker.running == 1)
        for model in ("a", "b"):  # one joins the batch, the other interrupts it
            assert server.ask("/v1/completions", {"model": model, "prompt": "y", "max_tokens": 4})[0] == 200
        assert not long.done()
        assert long.result()[1]["choices"][0]["text"] == answer_of("a", "x", 900)


def test_labels_are_bounded(server: Server):
    for number in range(5):
        server.ask("/v1/completions", {"model": f"made-up-{number}", "prompt": "x"})
    assert "made-up" not in server.ask("/metrics")[1]
    assert server.metric('dynlora_requests_total{model="other",status="404"}') >= 5


def test_loading_is_off_by_default(server: Server):
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "c"})[0] == 403
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "a"})[0] == 403
