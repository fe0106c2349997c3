"""`dynlora serve` as people start it: real run folders in a process of its own, OpenAI's client over loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from cli_helpers import Dynlora
from eval_helpers import Run, foreign
from library_helpers import silent
from server_process import ServerProcess, server_process

from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.generation.engine import Engine, Wanted
from dynlora_cli.library.add import add
from dynlora_cli.library.addition import Addition
from dynlora_cli.models.quiet import quiet

PROMPTS = [f"{number}: sort words lines -> " for number in range(40)]


class Served(NamedTuple):
    """A library of three adapters on one base, and a DoRA on it that shares no batch."""

    library: Path
    dora: Path
    base: Path
    models: list[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, runs: Callable[[str], Run]) -> Served:
    root, run = tmp_path_factory.mktemp("served"), runs("llama").folder
    base = run.parent / "llama"
    others = {"second": {"target_modules": ["q_proj", "up_proj"]}, "third": {"target_modules": ["down_proj"]}}
    with quiet:
        add(root / "lib", Addition(run, name="first"), silent)
        for name, config in others.items():
            folder = foreign(base, root / name, **config)
            add(root / "lib", Addition(folder, name=name, data=run.parent / "llama.jsonl"), silent)
    dora = foreign(base, root / "dora", target_modules=["v_proj"], use_dora=True)
    return Served(root / "lib", dora, base, ["first", "second", "third", "dora", "base", "0.5*first+0.5*second"])


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[ServerProcess]:
    arguments = ["--library", served.library, "--adapter", served.dora, "--max-batch", 8, "--allow-loading"]
    with server_process(*arguments) as server:
        yield server


def ask(server: ServerProcess, model: str, prompt: str, tokens: int = 24, **options: object) -> str:
    answer = server.client().completions.create(model=model, prompt=prompt, max_tokens=tokens, **options)
    return answer.choices[0].text


@pytest.mark.slow
def test_the_library_is_listed(server: ServerProcess, served: Served):
    models = {model.id: model for model in server.client().models.list()}
    assert {"first", "second", "third", "dora", str(served.base)} <= set(models)
    assert models["first"].parent == str(served.base)
    assert Path(models["first"].root) == served.library / "adapters" / "first"


@pytest.mark.slow
def test_different_models_answer_differently(server: ServerProcess, served: Served):
    texts = [ask(server, model, PROMPTS[0]) for model in served.models]
    assert len(set(texts)) == len(texts)
    assert texts == [ask(server, model, PROMPTS[0]) for model in served.models]  # greedy, and nothing is left behind


@pytest.mark.slow
def test_chance_depends_on_the_seed_alone(server: ServerProcess):
    client = server.client()

    def draw(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(
            model="first", prompt=PROMPTS[1], max_tokens=20, temperature=1.5, seed=seed, n=n, extra_body={"top_k": 50}
        )
        return [choice.text for choice in answer.choices]

    three = draw(7, 3)
    assert len(set(three)) == 3
    assert [*draw(7), *draw(8), *draw(9)] == three
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, [7] * 8)) == [[three[0]]] * 8


@pytest.mark.slow
def test_a_stream_over_the_async_client(server: ServerProcess):
    async def stream() -> str:
        async with server.async_client() as client:
            chunks = await client.completions.create(model="second", prompt=PROMPTS[2], max_tokens=24, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

    assert asyncio.run(stream()) == ask(server, "second", PROMPTS[2])


@pytest.mark.slow
def test_64_clients_of_which_half_hang_up(server: ServerProcess, served: Served):
    """All others get what they would get alone, and nothing is left: no queue, no memory, no label."""
    models = [served.models[number % len(served.models)] for number in range(32)]
    alone = [ask(server, model, PROMPTS[number]) for number, model in enumerate(models)]

    def stay(number: int) -> str:
        if number % 2:
            return ask(server, models[number], PROMPTS[number])
        chunks = server.client().completions.create(
            model=models[number], prompt=PROMPTS[number], max_tokens=24, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    def hang_up(number: int) -> None:
        client = server.client()
        if number % 4 == 0:  # before an answer
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.05).completions.create(
                    model="dora", prompt=PROMPTS[number], max_tokens=90
                )
            return
        chunks = client.completions.create(model=models[number], prompt="1 2 3 4 ->", max_tokens=90, stream=True)
        for _ in range(number % 3):
            next(iter(chunks), None)
        chunks.close()
        client.close()

    def wave() -> list[str]:
        with ThreadPoolExecutor(64) as pool:
            staying = [pool.submit(stay, number) for number in range(32)]
            leaving = [pool.submit(hang_up, number) for number in range(32)]
            [future.result() for future in leaving]
            return [future.result() for future in staying]

    assert wave() == alone
    before = server.memory
    assert wave() == alone
    end = time.monotonic() + 20
    while server.metric("dynlora_queue_length") or server.metric("dynlora_running"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.memory - before < 40 << 20
    assert [ask(server, model, PROMPTS[number]) for number, model in enumerate(models[:6])] == alone[:6]
    assert not [line for line in server.said if "failed" in line or "Traceback" in line]


@pytest.mark.slow
def test_nothing_of_one_tenant_reaches_another(server: ServerProcess):
    """A secret in one tenant's prompts, others beside it in the same batches: their answers do not change by a letter."""
    secret = "the secret word is reverse copy reverse copy "
    plain = {model: ask(server, model, "tell the secret: ", 40) for model in ("first", "second", "base")}
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            ask(server, "third", secret, 40)

    with ThreadPoolExecutor(4) as pool:
        tenants = [pool.submit(keep_asking) for _ in range(3)]
        for _ in range(6):
            for model, text in plain.items():
                assert ask(server, model, "tell the secret: ", 40) == text
        stop.set()
        [tenant.result() for tenant in tenants]
    assert {model: ask(server, model, "tell the secret: ", 40) for model in plain} == plain


@pytest.mark.slow
def test_what_no_number_can_stand_harms_its_client_alone(server: ServerProcess):
    """A weight that overflows is one client's fault, also where others share the batch."""
    alone = ask(server, "first", PROMPTS[3], 60)
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(ask, server, "first", PROMPTS[3], 60) for _ in range(4)]
        bad = [pool.submit(ask, server, "3e38*second+3e38*third", PROMPTS[3], 60) for _ in range(4)]
        assert [future.result() for future in good] == [alone] * 4
        for future in bad:
            with pytest.raises(openai.InternalServerError, match="not finite"):
                future.result()


@pytest.mark.slow
def test_an_adapter_comes_and_goes(server: ServerProcess, served: Served):
    client = server.client()
    first = ask(server, "first", PROMPTS[4])
    client.post("/load_lora_adapter", body={"lora_name": "again", "lora_path": "first"}, cast_to=str)
    assert ask(server, "again", PROMPTS[4]) == first
    with pytest.raises(openai.BadRequestError, match="from the library's folder alone"):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": str(served.dora)}, cast_to=str)
    client.post("/unload_lora_adapter", body={"lora_name": "again"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        ask(server, "again", PROMPTS[4])
    assert ask(server, "first", PROMPTS[4]) == first


@pytest.mark.slow
def test_auto_is_decided_by_the_librarys_router(server: ServerProcess, served: Served):
    client = server.client()
    raw = client.completions.with_raw_response.create(model="auto", prompt=PROMPTS[5], max_tokens=24)
    answer = raw.parse()
    assert answer.dynlora["router"] == raw.headers["x-dynlora-router"] == "embedding"
    assert raw.headers["x-dynlora-mix"] == answer.model
    assert answer.choices[0].text == ask(server, answer.model, PROMPTS[5])
    assert set(answer.dynlora["confidence"]) <= {"first", "second", "third", "dora"}
    assert PROMPTS[0].strip() not in str(answer.dynlora)  # no text of anybody's training rows
    chunks = list(client.completions.create(model="auto", prompt=PROMPTS[5], max_tokens=24, stream=True))
    assert {chunk.model for chunk in chunks} == {answer.model}


@pytest.mark.slow
def test_auto_does_not_choose_what_is_unloaded(server: ServerProcess):
    """The router chooses among what is loaded, also where its library has more."""
    client = server.client()

    def chosen() -> set[str]:
        answers = [client.completions.create(model="auto", prompt=prompt, max_tokens=2) for prompt in PROMPTS[:8]]
        return {answer.model for answer in answers}

    before = chosen()
    gone = sorted(before - {"base"})[0]
    client.post("/unload_lora_adapter", body={"lora_name": gone}, cast_to=str)
    assert gone not in chosen()
    client.post("/load_lora_adapter", body={"lora_name": gone, "lora_path": gone}, cast_to=str)
    assert chosen() == before


@pytest.mark.slow
def test_what_leaves_no_room_is_refused(server: ServerProcess):
    with pytest.raises(openai.BadRequestError, match="no room is left"):
        ask(server, "first", "x" * 200)
    with pytest.raises(openai.BadRequestError, match="bare text"):
        server.client().chat.completions.create(
            model="first", messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_lets_answers_end(served: Served, number: int, code: int):
    key = "a-key-that-nobody-knows"
    with server_process("--model", served.base, environment={"DYNLORA_API_KEY": key}) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        client = server.client(key)
        chunks = client.completions.create(model="base", prompt="1", max_tokens=100, stream=True, seed=1, temperature=2)
        first = next(iter(chunks))
        server.process.send_signal(number)
        rest = [chunk.choices[0] for chunk in chunks]
        assert rest[-1].finish_reason in ("stop", "length")
        assert first.model == "base"
        ended, printed = server.wait()
        assert ended == code
        assert printed["ok"] == (code == 0)
        assert code or printed["answered"] == 1


@pytest.mark.slow
def test_a_chat_is_written_with_its_runs_template(chat_run: Run):
    messages = [{"role": "user", "content": "sort 3"}]
    with server_process("--adapter", chat_run.folder) as server, Engine.open(Wanted([chat_run.folder])) as engine:
        (name,) = engine.names
        (expected,) = engine.generate([engine.request(engine.use(name), messages, Sampling(max_new_tokens=20))])
        parts = [{"role": "user", "content": [{"type": "text", "text": "sort 3"}]}]
        for asked in (messages, parts):
            answer = server.client().chat.completions.create(model=name, messages=asked, max_tokens=20)
            assert answer.choices[0].message.content == expected.text
            assert answer.usage.prompt_tokens == expected.prompt_tokens
        chunks = server.client().chat.completions.create(model=name, messages=messages, max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
        routed = server.client().chat.completions.create(model="auto", messages=messages, max_tokens=20)
        assert routed.dynlora["router"] == "likelihood"
        assert any(line.startswith("note: there is no library") for line in server.said)


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(served: Served):
    with server_process("--model", served.base, "--max-batch", 1) as server, ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(ask, server, "base", "1", 120, temperature=2) for _ in range(30)]
        while server.metric("dynlora_running") == 0:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        began = time.monotonic()
        ended, _ = server.end(signal.SIGINT)
        assert ended == 130
        assert time.monotonic() - began < 15
        statuses = [getattr(future.exception(), "status_code", 200) for future in asked]
        assert set(statuses) <= {200, 503}
        assert 503 in statuses


# -- refused at once -------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_at_once(dynlora: Dynlora, tmp_path: Path):
    for arguments, words in [
        ((), "nothing to serve is named"),
        (("--model", tmp_path / "none"), "none"),
        (("--library", tmp_path), "library.json"),
        (("--model", "builtin:tiny", "--host", "0.0.0.0"), "there is no API key"),
        (("--model", "builtin:tiny", "--host", "::", "--api-key", ""), "the API key is empty"),
        (("--model", "builtin:tiny", "--allow-loading"), "--library"),
        (("--model", "builtin:tiny", "--router", "embedding"), "there are none"),
        (("--model", "builtin:tiny", "--host", "no.such.name.invalid", "--api-key", "x"), "is no address"),
    ]:
        code, out, err = dynlora("serve", *arguments)
        assert (code, out) == (2, ""), arguments
        assert words in err


def test_a_port_that_is_taken_is_said_before_the_model_loads(dynlora: Dynlora):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = dynlora("serve", "--model", "builtin:tiny", "--port", port)
    assert code == 2
    assert f"port {port} of 127.0.0.1 is in use" in err


def test_a_missing_package_is_named_with_its_command(dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else real(name, *a))
    code, _, err = dynlora("serve", "--model", "builtin:tiny")
    assert code == 3
    assert "needs uvicorn" in err
    assert 'pip install "dynlora[serve]"' in err
