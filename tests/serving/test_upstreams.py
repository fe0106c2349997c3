"""What vLLM, SGLang and llama-server answer, and what the proxy makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.library.activation import Decision
from dynlora_cli.serving.choosing import possible
from dynlora_cli.serving.upstreams import Upstream, ask

WANTED = ("law", "cooking")


def card(name: str, owner: str, parent: str | None = None) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": owner, "parent": parent}


def asked(answers: dict[str, Any], kind: str = "auto") -> Upstream:
    async def get(path: str) -> Any:
        return answers.get(path)

    return asyncio.run(ask(get, WANTED, kind))


def models(*cards: dict[str, Any]) -> dict[str, Any]:
    return {"/v1/models": {"object": "list", "data": list(cards)}}


def test_vllm_calls_an_adapter_by_its_name():
    found = asked(models(card("org/base", "vllm"), card("alias", "vllm"), card("law", "vllm", "org/base")))
    assert (found.kind, found.base, found.has) == ("vllm", "org/base", {"law": "law"})
    assert found.values({"law": 1.0}) == {"model": "law"}
    assert found.values({}) == {"model": "org/base"}
    assert found.unless_given == {}


def test_a_base_that_has_an_adapters_name_is_none():
    assert asked(models(card("law", "vllm"))).has == {}


@pytest.mark.parametrize(
    "paths",
    [
        None,
        ["law=/a/law", "tax=/a/tax"],
        {"law": "/a/law"},
        [{"lora_name": "law", "lora_path": "/a/law", "pinned": False}],
    ],
)
def test_sglang_is_asked_for_base_and_adapter(paths: Any):
    answers = models(card("org/base", "sglang"), *([] if paths else [card("law", "sglang", "org/base")]))
    found = asked(answers | {"/get_server_info": {"lora_paths": paths}})
    assert (found.kind, found.has) == ("sglang", {"law": "law"})
    assert found.values({"law": 1.0}) == {"model": "org/base:law"}
    assert found.values({}) == {"model": "org/base"}
    assert found.own_keys == ("lora_path",)


def test_sglang_without_adapters():
    assert asked(models(card("base", "sglang")) | {"/get_server_info": {"lora_paths": None}}).has == {}


def test_sglang_with_a_colon_in_the_bases_name():
    with pytest.raises(UsageError, match="BASE:ADAPTER"):
        asked(models(card("a:b", "sglang")))


@pytest.mark.parametrize(
    ("paths", "has"),
    [
        (["/x/law.gguf", "cooking.gguf"], {"law": 0, "cooking": 1}),
        (["out/cooking/adapter.gguf", "C:\\out\\law\\adapter.gguf"], {"cooking": 0, "law": 1}),
        (["cooking/law.gguf"], {"law": 0}),
        (["adapter.gguf", ""], {}),
    ],
)
def test_llama_server_has_files(paths: list[str], has: dict[str, int]):
    listed = [{"id": number, "path": path, "scale": 0.0} for number, path in enumerate(paths)]
    found = asked(models(card("base.gguf", "llamacpp")) | {"/lora-adapters": listed})
    assert (found.kind, found.base, found.has) == ("llama-server", "base.gguf", has)
    assert [each["id"] for each in found.values({})["lora"]] == list(range(len(paths)))
    assert not any(each["scale"] for each in found.values({})["lora"])


def test_llama_server_with_two_files_of_one_name():
    listed = [{"id": 0, "path": "old/law.gguf", "scale": 1.0}, {"id": 1, "path": "law/adapter.gguf", "scale": 1.0}]
    with pytest.raises(UsageError, match="more than one adapter that may be law"):
        asked(models(card("b", "llamacpp")) | {"/lora-adapters": listed})


@pytest.mark.parametrize(
    ("answers", "kind", "words"),
    [
        (models(card("gpt", "openai")), "auto", "owned by 'openai'"),
        (models(), "auto", "lists no model"),
        ({"/v1/models": None}, "vllm", "lists no model"),
        ({"/v1/models": ["odd"]}, "auto", "lists no model"),
        (models(card("b", "vllm")), "llama-server", "does not answer /lora-adapters"),
    ],
)
def test_answers_of_something_else(answers: dict[str, Any], kind: str, words: str):
    with pytest.raises(DynloraError, match=words):
        asked(answers, kind)


def test_a_kind_that_one_names_is_believed():
    assert asked(models(card("base", "me"), card("law", "me", "base")), "vllm").has == {"law": "law"}


VLLM = Upstream("vllm", "b", {"law": "law", "cooking": "cooking"})
LLAMA = Upstream("llama-server", "b", {"law": 0, "cooking": 1}, (0, 1))


@pytest.mark.parametrize(
    ("upstream", "weights", "mix", "words"),
    [
        (VLLM, {"law": 1.0}, {"law": 1.0}, "why"),
        (VLLM, {"gone": 1.0}, {}, "does not have gone: base"),
        (VLLM, {"law": 1.0, "gone": 1.0}, {"law": 1.0}, "does not have gone"),
        (VLLM, {"law": 0.5, "gone": 0.5}, {}, "does not have gone: base"),
        (VLLM, {"law": 0.5, "cooking": 0.5}, {"cooking": 1.0}, "law is left out"),
        (LLAMA, {"law": 0.5, "cooking": 0.5}, {"law": 0.5, "cooking": 0.5}, "why"),
        (LLAMA, {"law": 0.5, "gone": 0.5}, {}, "does not have gone: base"),
    ],
)
def test_what_of_a_decision_can_be_done(
    upstream: Upstream, weights: dict[str, float], mix: dict[str, float], words: str
):
    decision = Decision(tuple(weights), {"law": 0.6, "cooking": 0.9, "gone": 1.0}, "why", weights=weights)
    choice = possible(decision, upstream)
    assert choice.mix == mix
    assert words in choice.reason


def test_dynlora_itself_needs_no_proxy():
    with pytest.raises(UsageError, match="has a router itself"):
        asked(models(card("base", "dynlora")))
    assert asked(models(card("base", "dynlora")), "vllm").kind == "vllm"
