"""`dynlora adapt --hypernet` and `api.adapt(hypernet=...)`: from the recipe to an adapter that every command takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from cli_helpers import Dynlora
from hypernet_runs import hypernet_recipe, texts_of
from tiny_run import train

from dynlora_cli import api
from dynlora_cli.config.load import to_yaml
from dynlora_cli.errors import UsageError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a hypernetwork; not to be changed."""
    folder = tmp_path_factory.mktemp("hypernet")
    train(hypernet_recipe(folder, "train.learning_rate=3e-2"))
    return folder / "out"


def test_from_a_recipe_file_to_an_adapter_that_commands_take(tmp_path: Path, dynlora: Dynlora):
    recipe = tmp_path / "hyper.yaml"
    recipe.write_text(to_yaml(hypernet_recipe(tmp_path)), encoding="utf-8")
    plan = dynlora("train", recipe, "--dry-run", "--json").json["plan"]
    assert plan["parameters"]["written adapter"] == 2048
    assert len(plan["modules"]) == 14
    run = dynlora("train", recipe, "--json")
    assert run.code == 0, run.err
    assert run.json["parameters"] == plan["parameters"]["network"], "a dry run knows how large the network is"
    measure, adapt, report = run.json["next"]
    assert measure == f"dynlora eval --adapter {tmp_path / 'out'}"
    assert adapt == f"dynlora adapt --hypernet {tmp_path / 'out'} --description TEXT --out FOLDER"
    assert report.endswith("report.html")
    made = dynlora(
        "adapt", "--hypernet", tmp_path / "out", "--description", "Say twos.", "--out", tmp_path / "a", "--json"
    )
    assert made.code == 0, made.err
    assert made.json["description"] == "Say twos."
    assert made.json["peft_check"]["problem"] is None
    assert made.json["next"]
    assert any("library add" in command for command in made.json["next"])
    for command in (
        ("eval", "--generate", 0, "--data", tmp_path / "twos.jsonl"),
        ("inspect",),
        ("merge", "--out", tmp_path / "merged"),
        ("prune", "--budget", 1, "--out", tmp_path / "small", "--data", tmp_path / "twos.jsonl"),
    ):
        answer = dynlora(*command, "--adapter", tmp_path / "a", "--json")
        assert answer.code == 0, answer.err
    # what is left after a cut is still known, and found, by its description
    (told,) = dynlora("inspect", "--adapter", tmp_path / "small", "--json").json["adapters"]
    assert told["provenance"]["written_by"]["description"] == "Say twos."
    added = dynlora("library", "add", tmp_path / "library", "--adapter", tmp_path / "small", "--json")
    assert added.code == 0, added.err
    assert (added.json["update"]["keys"], added.json["update"]["sources"]) == (1, [])
    (key,) = (tmp_path / "library" / "keys").glob("*.jsonl")
    assert json.loads(key.read_text()) == {"text": "Say twos.", "source": "description"}


def test_what_a_person_sees(trained: Path, tmp_path: Path, dynlora: Dynlora):
    out = tmp_path / "a"
    answer = dynlora("adapt", "--hypernet", trained, "--description", texts_of("ones")[0], "--budget", 1, "--out", out)
    assert answer.code == 0
    said = " ".join(answer.err.split())
    assert "written from Answer with ones. by text-gated" in said
    assert "dynlora chat --adapter" in said


def test_it_is_asked_as_the_rows_of_its_network_were_written(tmp_path: Path, dynlora: Dynlora):
    """The built-in model has a chat template, and these rows are bare text with a separator."""
    recipe = hypernet_recipe(
        tmp_path, "train.max_steps=2", "dataset.chat=false", "dataset.separator=' =>'", model="builtin:tiny"
    )
    train(recipe)
    made = dynlora("adapt", "--hypernet", tmp_path / "out", "--description", "Say ones.", "--out", tmp_path / "a")
    assert made.code == 0, made.err
    with api.load(tmp_path / "a") as loaded:
        voice = loaded.engine.voice({"a": 1.0})
    assert not voice.notes
    assert not voice.chat
    assert voice.prompt_ids("say 3") == voice.text_ids("say 3 =>")


def test_python_does_the_same(trained: Path, tmp_path: Path, dynlora: Dynlora):
    made = api.adapt(hypernet=trained, description="Say ones.", out=tmp_path / "api", budget=1, progress=None)
    dynlora("adapt", "--hypernet", trained, "--description", "Say ones.", "--budget", 1, "--out", tmp_path / "cli")
    one, other = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("api", "cli"))
    assert one == other
    assert made.summary["description"] == "Say ones."
    with pytest.raises(UsageError, match="nothing is"):
        api.adapt(hypernet=trained, out=tmp_path / "b", progress=None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "from a description or from documents, and nothing is"),
        (("--description", "a", "--document", "b.txt"), "and both are given"),
        (("--description", " "), "--description says nothing"),
        (("--description", "a", "--model", "builtin:tiny"), "--model is for adapters that are trained"),
        (("--description", "a", "--set", "seed=1"), "--set is for adapters that are trained"),
        (("--description", "a", "--questions", "3"), "--questions is for adapters that are trained"),
        (("--description", "a", "--dry-run"), "--dry-run is for adapters that are trained"),
        (("--description", "a", "--budget", "auto"), "--budget auto measures rows"),
        (("--description", "a", "--budget", "x"), "--budget x: "),
        (("--description", "a", "--base", "/nowhere/there"), "/nowhere/there"),
        (("--document", "/nowhere.txt"), "/nowhere.txt"),
    ],
)
def test_what_does_not_go_is_answered(
    trained: Path, tmp_path: Path, dynlora: Dynlora, arguments: tuple[str, ...], words: str
):
    answer = dynlora("adapt", "--hypernet", trained, *arguments, "--out", tmp_path / "a")
    assert answer.code in (2, 3)
    assert words in " ".join(answer.err.split())
    assert not (tmp_path / "a").exists()


def test_a_network_must_be_named_by_its_folder(trained: Path, tmp_path: Path, dynlora: Dynlora):
    for folder, words in ((tmp_path, "holds no hypernetwork"), (tmp_path / "no", "is no folder")):
        answer = dynlora("adapt", "--hypernet", folder, "--description", "a", "--out", tmp_path / "a")
        assert (answer.code, words in answer.err) == (2, True)
    answer = dynlora("adapt", "--description", "a", "--out", tmp_path / "a")
    assert "--description goes with a network that writes adapters" in answer.err


def test_a_document_is_for_networks_that_read_them(trained: Path, tmp_path: Path, dynlora: Dynlora):
    (tmp_path / "text.txt").write_text("A text about something.", encoding="utf-8")
    answer = dynlora("adapt", "--hypernet", trained, "--document", tmp_path / "text.txt", "--out", tmp_path / "a")
    assert answer.code == 2
    assert "writes adapters from descriptions" in answer.err


def test_the_recipe_on_record_is_without_the_shorthand(trained: Path):
    assert "tasks" not in yaml.safe_load((trained / "dynlora.json").read_text())["recipe"]
