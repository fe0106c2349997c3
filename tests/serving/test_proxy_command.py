"""`dynlora serve --upstream` as a command: what it says, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cli_helpers import Dynlora
from library_helpers import Made, silent
from openai import OpenAI
from proxy_helpers import FakeUpstream, asked, listening, post, unused_port

from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.models.quiet import quiet

CARDS = [
    {"id": "the-base", "object": "model", "owned_by": "vllm", "root": "the-base", "parent": None},
    {"id": "first", "object": "model", "owned_by": "vllm", "root": "/adapters/first", "parent": "the-base"},
]


@pytest.fixture(scope="module")
def library(made_once: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose keys were made by a model that is not its base; not to be changed."""
    folder = tmp_path_factory.mktemp("own-encoder")
    encoder = shutil.copytree(made_once.base, folder / "encoder")
    with quiet:
        for name, adapter in (("first", made_once.run), ("other", made_once.other)):
            add(folder / "own", Addition(adapter, name=name, data=made_once.rows, encoder=str(encoder)), silent)
    return folder / "own"


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The command in a process of its own, once it answers: its address, and what it has said."""
    command = [sys.executable, "-m", "dynlora_cli", "serve", "--port", "0", "--json", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        said: list[str] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"answers at (\S+)/v1", line):
                    break
            assert found, "".join(said)
            yield process, found[1], said
        finally:
            process.kill()


@pytest.mark.slow
def test_it_finds_its_adapters_routes_and_ends(library: Path, made: Made, tmp_path: Path):
    made.base.rename(tmp_path / "gone")  # the base is the upstream's
    try:
        fake = FakeUpstream(cards=CARDS)
        with (
            listening(fake) as url,
            started("--upstream", f"{url}/v1/", "--library", library) as (process, address, said),
        ):
            text = " ".join("".join(said).split())
            assert "the upstream is vllm with the base the-base and first" in text
            assert "it lacks other, which no request is sent to" in text
            assert "is not calibrated" in text
            with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                assert [model.id for model in client.models.list()] == ["the-base", "first", "auto"]
                answer = client.chat.completions.with_raw_response.create(model="auto", **messages("sort"))
            assert answer.headers["x-dynlora-model"] in ("first", "base")
            assert "cosine" in answer.headers["x-dynlora-decision"]
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
    finally:
        (tmp_path / "gone").rename(made.base)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["upstream"] == {"kind": "vllm", "base": "the-base", "adapters": ["first"]}
    assert result["router"] == "embedding"
    assert "auto -> " in err
    assert "Traceback" not in err


def messages(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.mark.slow
def test_a_fixed_router_keys_and_ctrl_c(library: Path):
    fake = FakeUpstream(cards=CARDS)
    keys = {"DYNLORA_API_KEY": "mine", "DYNLORA_UPSTREAM_API_KEY": "theirs"}
    fixed = ("--router", "fixed", "--set", "mix=first")
    with (
        listening(fake) as url,
        started("--upstream", url, "--library", library, *fixed, **keys) as (process, address, _),
    ):
        assert post(address, asked("anything")).status_code == 401
        assert fake.received == []
        answer = post(address, asked("anything"), headers={"Authorization": "Bearer mine"})
        assert answer.json()["model"] == "first"
        assert fake.received[0].header("authorization") == [b"Bearer theirs"]
        with httpx2.stream(
            "POST",
            f"{address}/v1/audio",
            content=iter([b"x" * 1000] * 9),
            headers={"Authorization": "Bearer mine", "Content-Type": "multipart/form-data"},
            trust_env=False,
        ) as up:
            assert up.status_code == 200
        assert fake.received[1].body == b"x" * 9000
        assert [len(answer.headers.get_list(name)) for name in ("date", "server")] == [0, 0], (
            "the upstream has sent none"
        )
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["error"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--router", "arrow"], 2, "decides on every token"),
        (["--router", "likelihood"], 2, "not in memory here"),
        (["--router", "nonsense"], 2, "choose one of"),
        (["--router", "fixed"], 2, "must be told which adapters"),
        (["--router", "fixed", "--set", "mix=other"], 2, "does not have other"),
        (["--router", "fixed", "--set", "mix=0.5*first"], 2, "one adapter, as it was trained"),
        (["--set", "nonsense=1"], 2, "no option 'nonsense'"),
        (["--upstream-kind", "tgi"], 2, "--upstream-kind"),
        (["--upstream-kind", "llama-server"], 1, "does not answer /lora-adapters"),
        (["--model", "x"], 2, "--model and --upstream do not go together"),
        (["--max-batch", "4"], 2, "--max-batch and --upstream do not go together"),
        (["--host", "0.0.0.0"], 2, "there is no API key"),
    ],
)
def test_what_is_refused(arguments: list[str], code: int, words: str, library: Path, dynlora: Dynlora):
    with listening(FakeUpstream(cards=CARDS)) as url:
        answer = dynlora("serve", "--upstream", url, "--library", library, "--port", 0, *arguments)
    assert (answer.code, words in " ".join(answer.err.split())) == (code, True), answer.err


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("127.0.0.1:8000", 2, "no address of a server"),
        ("ftp://x", 2, "no address of a server"),
        ("http://name:password@x", 2, "holds a name or a password"),
        ("http://127.0.0.1:{port}", 3, "cannot be reached"),
    ],
)
def test_an_upstream_that_is_none(url: str, code: int, words: str, library: Path, dynlora: Dynlora):
    url = url.format(port=unused_port())
    answer = dynlora("serve", "--upstream", url, "--library", library, "--port", 0)
    assert (answer.code, words in " ".join(answer.err.split())) == (code, True), answer.err
    assert "password" not in answer.err.replace("a name or a password", "")


def test_keys_of_the_base_itself_are_refused_in_words(made: Made, dynlora: Dynlora):
    with listening(FakeUpstream(cards=CARDS)) as url:
        answer = dynlora("serve", "--upstream", url, "--library", made.root, "--port", 0)
    assert answer.code == 2
    assert "--encoder minilm" in answer.err


def test_what_is_of_a_proxy_alone(dynlora: Dynlora, tmp_path: Path):
    for option, value in (("--upstream-kind", "vllm"), ("--upstream-api-key", "x")):
        answer = dynlora("serve", "--model", tmp_path, option, value)
        assert (answer.code, "name it: --upstream URL" in answer.err) == (2, True)
    answer = dynlora("serve", "--upstream", "http://127.0.0.1:1")
    assert (answer.code, "--library LIB" in answer.err) == (2, True)
