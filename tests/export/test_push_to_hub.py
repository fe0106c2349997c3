"""What `--push-to-hub` sends, seen from the other side: a fake hub, and the real client of huggingface_hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cli_helpers import Dynlora
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from pico import pico_model, pico_recipe

from dynlora_cli.commands import train
from dynlora_cli.config.load import load_recipe
from dynlora_cli.errors import DynloraError
from dynlora_cli.export.hub.private import refuse_places, text_without_paths, without_paths

REPO = "acme/answers"
# Of the client, which uploads in a way that its HTTP library has given another name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe names its base, its rows and its output by absolute paths."""
    folder = tmp_path_factory.mktemp("secret-project")
    train.run(load_recipe(pico_recipe(folder)))
    return folder / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


def metadata(files: dict[str, bytes]) -> dict:
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_the_files_and_a_card_and_nothing_else(run, tmp_path, hub: FakeHub, dynlora: Dynlora):
    answer = dynlora(
        "export", "--adapter", run, "--to", "peft", "--out", tmp_path / "out", "--push-to-hub", REPO, "--json"
    )
    assert answer.code == 0, answer.err
    assert hub.repos == {REPO: True}, "private"
    assert {hub.tokens[asked] for asked in hub.tokens if "/api/models/" in asked or "/api/repos" in asked} == {
        f"Bearer {TOKEN}"
    }
    files = hub.files[REPO]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {*local, "README.md"}
    assert "adapter_model.safetensors" in files
    assert not [name for name in files if "checkpoint" in name or "optimizer" in name or name == "dynlora.json"]
    for name, content in files.items():
        assert b"secret-project" not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name
        if name not in ("README.md", "export.json", "adapter_config.json", "tokenizer_config.json"):
            assert content == local[name], name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "pico"
    config = json.loads(files["adapter_config.json"])
    assert {k: v for k, v in json.loads(local["adapter_config.json"]).items() if v != config[k]}.keys() == {
        "base_model_name_or_path"
    }
    assert answer.json["pushed"]["private"] is True
    assert answer.json["pushed"]["url"] == f"{hub.url}/{REPO}"
    assert answer.json["pushed"]["files"] == {name: len(content) for name, content in files.items()}


def test_what_is_sent_is_said_before_anything_is(run, tmp_path, hub: FakeHub, dynlora: Dynlora):
    hub.refuse = 403
    answer = dynlora("export", "--adapter", run, "--to", "uniform", "--out", tmp_path / "out", "--push-to-hub", REPO)
    assert answer.code == 2
    said = " ".join(answer.err.split())
    assert f"to {hub.url}/{REPO} (private)" in said
    assert "adapter_model.safetensors" in said
    assert "the license of the base is not known" in said
    assert "the hub refuses acme/answers (403)" in said
    assert "the export is in" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not hub.files
    hub.refuse = 401
    answer = dynlora(
        "export", "--adapter", run, "--to", "uniform", "--out", tmp_path / "out", "--overwrite", "--push-to-hub", REPO
    )
    assert answer.code == 3
    assert "hf auth login" in answer.err


def test_the_card_has_what_hubs_read(run, tmp_path, hub: FakeHub, dynlora: Dynlora):
    """The license is what the base's own card says; what was measured stands in the model-index."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((run / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "acme/pico"}))
    hub.cards["acme/pico"] = {"license": "apache-2.0"}
    answer = dynlora(
        "export", "--adapter", tmp_path / "run", "--base", config["base_model_name_or_path"], "--to", "vllm",
        "--out", tmp_path / "out", "--push-to-hub", REPO,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    found, text = metadata(hub.files[REPO]), hub.files[REPO]["README.md"].decode()
    assert found.pop("model-index")[0]["results"][0]["metrics"][0]["type"] == "loss"
    assert found == {
        "base_model": "acme/pico",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "dynlora", "vllm"],
    }
    assert "vllm serve acme/pico --enable-lora --lora-modules name=adapter --max-lora-rank 8" in text
    assert "| held-out loss |" in text
    assert "name_or_path: acme/pico" in text, "the recipe, with the names that others know"
    assert "report.html" not in text
    assert json.loads(hub.files[REPO]["export.json"])["base_model"] == "acme/pico"


def test_a_public_repository_is_not_written_to_by_accident(run, tmp_path, hub: FakeHub, dynlora: Dynlora):
    hub.repos[REPO], hub.files[REPO] = False, {}
    common = ("export", "--adapter", run, "--to", "peft", "--out", tmp_path / "out", "--overwrite", "--push-to-hub")
    answer = dynlora(*common, REPO)
    assert answer.code == 2
    assert "is there and public; nothing was sent" in answer.err
    assert not hub.files[REPO]
    answer = dynlora(*common, REPO, "--public")
    assert answer.code == 0, answer.err
    assert "adapter_config.json" in hub.files[REPO]
    assert "public: everybody may see it" in " ".join(answer.err.split())


@pytest.mark.parametrize(
    ("changes", "words", "code", "said"),
    [
        ({"HF_HUB_OFFLINE": True}, (REPO,), 3, "HF_HUB_OFFLINE is set"),
        ({}, ("answers",), 2, "a repository is called ORG/NAME"),
        ({}, ("acme/../x",), 2, "a repository is called ORG/NAME"),
        ({"token": ""}, (REPO,), 3, "needs a login"),
    ],
)
def test_what_is_known_before_is_said_before(
    changes, words, code, said, run, tmp_path, hub: FakeHub, dynlora: Dynlora, monkeypatch
):
    if "token" in changes:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", changes.get("HF_HUB_OFFLINE", False))
    answer = dynlora("export", "--adapter", run, "--to", "peft", "--out", tmp_path / "out", "--push-to-hub", *words)
    assert answer.code == code
    assert said in answer.err
    assert not hub.asked
    assert not (tmp_path / "out").exists()


def test_public_without_a_push_and_a_push_of_a_library(run, tmp_path, dynlora: Dynlora):
    answer = dynlora("export", "--adapter", run, "--to", "peft", "--out", tmp_path / "out", "--public")
    assert answer.code == 2
    assert "--push-to-hub ORG/NAME" in answer.err


def test_paths_become_names_and_addresses_stay():
    names = {"/data/bases/pico": "acme/pico"}
    value = {"a": "/data/bases/pico", "b": ["/home/Jane Doe/rows.jsonl", "~/x/y.txt", "https://x.org/a/b", "a/b/c"]}
    value |= {"c": "{% if x %}\n/think/it/over\n{% endif %}", "d": "C:\\Users\\jane\\m.bin", "e": 3, "f": "/no_think"}
    assert without_paths(value, names) == {
        **value,
        "a": "acme/pico",
        "b": ["rows.jsonl", "y.txt", "https://x.org/a/b", "a/b/c"],
        "d": "m.bin",
    }
    text = "path: /srv/rows/a.jsonl, base /data/bases/pico, see https://x.org/a/b/c, and/or </s>/n, 1/2/3\n"
    expected = "path: a.jsonl, base acme/pico, see https://x.org/a/b/c, and/or </s>/n, 1/2/3\n"
    assert text_without_paths(text, names) == expected


def test_a_file_that_still_names_a_folder_is_not_sent(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM /srv/jane/model.gguf\n")
    files = {"Modelfile": tmp_path / "Modelfile", "x.safetensors": b"..."}
    refuse_places(files, ["/srv/john"])
    with pytest.raises(DynloraError, match="Modelfile names /srv/jane, a folder of this machine; nothing was sent"):
        refuse_places(files, ["/srv/jane"])


@pytest.mark.slow
def test_from_a_shell_with_another_address(tmp_path):
    """HF_ENDPOINT and HF_TOKEN as a CI job sets them; nothing is asked, and no bar is drawn."""
    folder = tmp_path / "work"
    folder.mkdir()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico_model(folder))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    with FakeHub() as hub:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "dynlora_cli", "export", "--adapter", "adapter", "--to", "merged"]
        done = subprocess.run(
            [*command, "--out", "merged", "--push-to-hub", REPO], cwd=folder, env=environment, capture_output=True,
            text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = hub.files[REPO]
    assert {"config.json", "model.safetensors", "README.md", "export.json"} <= set(files)
    assert metadata(files)["library_name"] == "transformers"
    assert b"These files are the whole model" in files["README.md"]
    assert b"plain PEFT LoRA" not in files["README.md"]
    assert f"{hub.url}/{REPO}, private" in " ".join(done.stderr.split())
    assert "%|" not in done.stderr
    assert not [name for name, content in files.items() if str(folder).encode() in content]
