"""Which adapters the proxy finds and chooses, whose key goes where, and the real OpenAI client."""

from __future__ import annotations

import json
import re

import httpx2
import pytest
from hand_made_library import APART, Places, library
from openai import OpenAI
from proxy_helpers import (
    CHAT,
    VLLM_CARDS,
    FakeUpstream,
    asked,
    post,
    proxied,
    reply,
)

from dynlora_cli.routing.router import Asked, Context, open_router
from dynlora_cli.serving.choosing import Chooser
from dynlora_cli.serving.proxy import MODELS
from dynlora_cli.serving.upstreams import Upstream


def test_an_adapter_that_the_upstream_lacks_is_never_chosen():
    fake = FakeUpstream()
    with proxied(fake, wanted=["law", "cooking", "gone"]) as (address, proxy):
        alone = post(address, asked("gone"))
        beside = post(address, asked("gone law"))
    assert proxy.upstream.has == {"law": "law", "cooking": "cooking"}
    assert [each.form["model"] for each in fake.received] == ["the-base", "law"]
    assert "does not have gone: base" in alone.headers["x-dynlora-decision"]
    assert beside.headers["x-dynlora-model"] == "law"


def test_two_at_once_are_more_than_vllm_takes():
    with proxied(FakeUpstream()) as (address, _):
        answer = post(address, asked("law and cooking"))
    assert answer.json()["model"] == "law"
    assert "cooking is left out" in answer.headers["x-dynlora-decision"]


def test_the_upstream_is_asked_again(monkeypatch):
    fake = FakeUpstream(cards=VLLM_CARDS[:2])
    with proxied(fake) as (address, proxy):
        assert post(address, asked("cooking")).json()["model"] == "the-base"
        fake.cards = VLLM_CARDS
        assert post(address, asked("cooking")).json()["model"] == "the-base", "the last answer is fresh"
        monkeypatch.setattr("dynlora_cli.serving.proxy.FRESH_SECONDS", 0)
        assert post(address, asked("cooking")).json()["model"] == "cooking"
    assert fake.asked_for_models == 2
    assert any("has changed" in line for line in proxy.lines)


def test_models_are_the_upstreams_and_auto():
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        listed = httpx2.get(address + MODELS, trust_env=False).json()
        one = httpx2.get(f"{address}{MODELS}/auto", trust_env=False).json()
        other = httpx2.get(f"{address}{MODELS}/law", trust_env=False)
    assert listed["data"][:-1] == VLLM_CARDS
    assert listed["data"][-1]["id"] == one["id"] == "auto"
    assert one["owned_by"] == "dynlora"
    assert fake.received[0].path == b"/v1/models/law"
    assert other.status_code == 200


def test_an_upstream_that_refuses_a_key_says_so_itself():
    fake = FakeUpstream()
    with proxied(fake) as (address, _):
        fake.answers = {MODELS: lambda _s, _r, send: reply(send, 401, {"error": "theirs"})}
        answer = httpx2.get(address + MODELS, headers={"Authorization": "Bearer wrong"}, trust_env=False)
    assert (answer.status_code, answer.json()) == (401, {"error": "theirs"})
    assert [each.header("authorization") for each in fake.received] == [[b"Bearer wrong"]] * 2


@pytest.mark.parametrize(
    ("options", "arrives"),
    [
        ({}, [b"Bearer tenant"]),
        ({"keeps_key": True}, []),
        ({"key": "own"}, [b"Bearer tenant"]),
        ({"key": "own", "keeps_key": True}, [b"Bearer own"]),
    ],
)
def test_whose_key_reaches_the_upstream(options, arrives):
    fake = FakeUpstream()
    with proxied(fake, **options) as (address, _):
        post(address, asked("law"), headers={"Authorization": "Bearer tenant"})
        httpx2.get(address + "/health", headers={"Authorization": "Bearer tenant"}, trust_env=False)
    assert [each.header("authorization") for each in fake.received] == [arrives, arrives]


def test_nobody_gets_in_with_the_proxys_own_key_for_the_upstream():
    """It is for the proxy's own questions, unless the proxy asks its clients for a key."""
    fake = FakeUpstream()
    for keeps_key, arrives in ((False, []), (True, [b"Bearer own"])):
        with proxied(fake, key="own", keeps_key=keeps_key) as (address, _):
            fake.answers = {MODELS: lambda _s, _r, send: reply(send, 200, {"data": []})}
            httpx2.get(address + MODELS, trust_env=False)
            httpx2.post(address + CHAT, json=asked("law"), trust_env=False)
        assert [each.header("authorization") for each in fake.received] == [arrives, arrives]
        fake.received, fake.answers = [], {}


def test_a_calibrated_library_decides(tmp_path):
    places = {"of law": (1, 0.1, 0), "of neither": (0, 0, 1)}
    context = Context(library=library(tmp_path / "lib", APART), encoder=Places(places))
    router = open_router("calibrated", context)
    fake = FakeUpstream()
    with proxied(fake, wanted=["law", "news"]) as (address, proxy):
        proxy.chooser = Chooser(lambda texts: router.decide([Asked(text) for text in texts]))
        law, neither = (post(address, asked(text)) for text in places)
    assert [each.form["model"] for each in fake.received] == ["law", "the-base"]
    assert re.fullmatch(
        r"law: confidence 0\.99, evidence \d\.\d+ \(needed: more than .*\)", law.headers["x-dynlora-decision"]
    )
    assert neither.headers["x-dynlora-decision"].startswith("base: the most likely is ")


def test_the_openai_client():
    fake = FakeUpstream()
    with proxied(fake) as (address, _), OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["the-base", "law", "cooking", "auto"]
        assert client.models.retrieve("auto").id == "auto"
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": "law?"}]
        )
        assert raw.headers["x-dynlora-model"] == "law"
        assert raw.parse().choices[0].message.content == "I am law."
        fake.answers = {CHAT: lambda *of: fake.events(*of, pieces=4, pause=0)}
        stream = client.chat.completions.create(
            model="auto", stream=True, messages=[{"role": "user", "content": "cooking?"}]
        )
        assert "".join(chunk.choices[0].delta.content for chunk in stream) == "w0 w1 w2 w3 "
        assert fake.received[-1].form["model"] == "cooking"


def test_a_mix_is_for_llama_server_alone():
    vllm = Upstream("vllm", "b", {"a": "a", "c": "c"})
    with pytest.raises(ValueError, match="one adapter"):
        vllm.values({"a": 0.5})
    llama = Upstream("llama-server", "b", {"a": 1, "c": 0}, (0, 1, 2))
    assert llama.values({"a": 0.5, "c": 2.0})["lora"] == [
        {"id": 0, "scale": 2.0},
        {"id": 1, "scale": 0.5},
        {"id": 2, "scale": 0.0},
    ]
    assert (
        json.dumps(llama.values({})["lora"])
        == '[{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}, {"id": 2, "scale": 0.0}]'
    )
