"""Loading and unloading over HTTP: vLLM's bodies and answers, and nothing from outside the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import FakeEngine, answer_of
from library_helpers import Made
from serving_helpers import Server, serving

from dynlora_cli.errors import UsageError
from dynlora_cli.serving.loading import entry_at


@pytest.fixture
def server(made: Made) -> Iterator[Server]:
    with serving(FakeEngine(), library=made.root) as server:
        yield server


@pytest.mark.parametrize("form", ["first", "adapters/first", "{root}/adapters/first", "./first"])
def test_an_update_of_the_library_is_loaded_and_unloaded(server: Server, made: Made, form: str):
    path = form.format(root=made.root)
    status, text, _ = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": path})
    assert (status, text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    card = server.client().models.retrieve("mine")
    assert (card.parent, Path(card.root).name) == ("some/base", "first")
    assert server.client().completions.create(model="mine", prompt="x", max_tokens=3).choices[0].text == answer_of(
        "mine", "x", 3
    )
    status, answer, _ = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": path})
    assert (status, answer["error"]["message"]) == (400, "The lora adapter 'mine' has already been loaded.")
    status, text, _ = server.ask("/v1/unload_lora_adapter", {"lora_name": "mine", "lora_int_id": 1})
    assert (status, text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    status, answer, _ = server.ask("/v1/unload_lora_adapter", {"lora_name": "mine"})
    assert (status, answer["error"]["message"]) == (404, "The lora adapter 'mine' cannot be found.")
    assert server.ask("/v1/completions", {"model": "mine", "prompt": "x"})[0] == 404


def outside(made: Made) -> list[str]:
    """Ways out of the library, all of them to real adapters."""
    (made.root / "adapters" / "link").symlink_to(made.other)
    shutil.copytree(made.other, made.root / "adapters" / "copied")  # in the folder, and not in library.json
    return [
        str(made.other),
        "../../other",
        f"adapters/../../{made.other.name}",
        f"{made.root}/adapters/../../{made.other.name}",
        "link",
        "adapters/link",
        "copied",
        "first/../first",
        "adapters",
        ".",
        "",
        "/",
        "/etc/passwd",
        "first\0",
        "adapters/first/adapter_config.json",
        "hub/name",
    ]


def test_no_path_leads_out_of_the_library(server: Server, made: Made):
    for path in outside(made):
        status, answer, _ = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": path})
        assert status == 400, path
        assert "error" in answer
    assert server.engine.names == ["a", "b"]


def test_an_update_with_a_link_or_another_file_in_it_is_not_loaded(made: Made, tmp_path: Path):
    config = made.root / "adapters" / "first" / "adapter_config.json"
    (tmp_path / "secret.json").write_bytes(config.read_bytes())
    config.unlink()
    config.symlink_to(tmp_path / "secret.json")
    with pytest.raises(UsageError, match="link out of its folder"):
        entry_at(made.root, "first")
    config.unlink()
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UsageError, match="has changed since it was added"):
        entry_at(made.root, "first")


@pytest.mark.parametrize("name", ["base", "auto", "some/base", "a", "", "x/y", "a+b", "..", "x" * 300])
def test_names_that_mean_something_else_are_refused(server: Server, name: str):
    assert server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "first"})[0] == 400


def test_an_adapter_that_is_in_use_goes_when_its_answers_are_complete(made: Made):
    engine = FakeEngine(seconds=0.01)
    with serving(engine, library=made.root) as server, ThreadPoolExecutor(4) as pool:
        long = pool.submit(server.ask, "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 100})
        server.until(lambda: server.worker.running == 1)
        unloading = pool.submit(server.ask, "/v1/unload_lora_adapter", {"lora_name": "a"})
        again = pool.submit(server.ask, "/v1/unload_lora_adapter", {"lora_name": "a"})
        server.until(lambda: "a" in server.worker.leaving)
        assert server.ask("/v1/completions", {"model": "a", "prompt": "y"})[0] == 404
        assert server.ask("/v1/completions", {"model": "0.5*a+0.5*b", "prompt": "y"})[0] == 404
        assert server.ask("/v1/completions", {"model": "b", "prompt": "y", "max_tokens": 2})[0] == 200
        assert not unloading.done()
        assert long.result()[1]["choices"][0]["text"] == answer_of("a", "x", 100)
        assert sorted([unloading.result()[0], again.result()[0]]) == [200, 404]
        assert engine.names == ["b"]
