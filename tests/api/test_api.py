"""The Python face: what each function returns, that it checks as the commands do, and how it shows itself."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pico import pico_recipe

from dynlora_cli import api
from dynlora_cli.errors import RecipeError, UsageError
from dynlora_cli.runs.report import notebook


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 6 steps, as a dict."""
    folder = tmp_path_factory.mktemp("api")
    return json.loads(pico_recipe(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(recipe: dict[str, Any]) -> Any:
    return api.train(recipe)


def test_importing_it_loads_nothing_heavy():
    code = "import sys; from dynlora_cli import api; print(sorted({'torch', 'transformers', 'typer', 'rich', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run(run: Any, recipe: dict[str, Any]):
    assert run.folder == Path(recipe["output_dir"])
    assert (run.folder / "adapter_config.json").is_file()
    assert run.summary["steps"] == 6
    assert sum(run.ranks.values()) == run.summary["components"]
    assert [event["step"] for event in run.metrics if event["event"] == "train"] == [2, 4, 6]
    assert [event["event"] for event in run.rank_events].count("prune") == 2


def test_a_recipe_is_checked_as_the_file_is(recipe: dict[str, Any]):
    with pytest.raises(RecipeError) as error:
        api.train(recipe | {"rank": {"budgett": 2}, "train": {"max_steps": "many"}})
    assert error.value.exit_code == 2
    assert "recipe: rank.budgett: unknown key; did you mean 'budget'?" in error.value.problems
    assert any(problem.startswith("recipe: train.max_steps: got 'many'") for problem in error.value.problems)
    with pytest.raises(UsageError, match="a recipe is a file or a dict, and no int"):
        api.train(3)  # type: ignore[arg-type]


def test_an_occupied_folder_is_refused_as_by_the_command(run: Any, recipe: dict[str, Any]):
    with pytest.raises(UsageError, match="is not empty"):
        api.train(recipe)
    with pytest.raises(UsageError, match="exclude each other"):
        api.train(recipe, overwrite=True, resume=True)
    assert api.train(recipe, resume=True).summary["output_dir"] == str(run.folder)


def test_the_other_commands(run: Any, tmp_path: Path):
    smaller = api.prune(run, budget=0.5, out=tmp_path / "smaller", measure=False)
    assert 0 < sum(smaller.ranks.values()) < sum(run.ranks.values())
    looked = api.inspect([run, smaller])
    assert len(looked.summary["adapters"]) == 2
    assert looked.ranks == {name: rank for name, rank in run.ranks.items() if rank} | {
        name: 0 for name in looked.ranks if not run.ranks.get(name)
    }
    assert (api.merge(smaller, out=tmp_path / "model").folder / "model.safetensors").is_file()
    exported = api.export(run, to="peft", out=tmp_path / "peft")
    assert (exported.folder / "adapter_model.safetensors").is_file()
    found = api.evaluate([run, smaller], generate=0)
    assert found.ok
    assert list(found.losses) == ["base", run.folder.name, "smaller"]
    for result in (run, smaller, looked, exported, found):
        assert str(result)
        assert any(tag in result._repr_html_() for tag in ("<svg", "<pre", "<table"))


def test_values_are_checked_as_the_commands_options_are(run: Any, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--budget 1\.5: got 1\.5, must be an average rank"):
        api.prune(run, budget=1.5, out=tmp_path / "x")
    with pytest.raises(UsageError, match="--policy magnitud: there is none; did you mean 'magnitude'"):
        api.prune(run, budget=2, out=tmp_path / "x", policy="magnitud")
    with pytest.raises(UsageError, match="--to peftt"):
        api.export(run, to="peftt", out=tmp_path / "x")
    with pytest.raises(UsageError, match="an adapter is a folder or a Run, and no int"):
        api.merge(3)  # type: ignore[arg-type]


def test_an_adapter_in_memory(run: Any):
    with api.load(run) as loaded:
        one = loaded.generate("def sort_words_3():", max_new_tokens=8)
        assert loaded.generate(["def sort_words_3():", "def join_lines():"], max_new_tokens=8)[0] == one
        ids = loaded.tokenizer("def sort_words_3():", return_tensors="pt")
        with_adapter = loaded.model(**ids).logits
        with loaded.engine.bank.active([{}]):
            assert (loaded.model(**ids).logits - with_adapter).abs().max() > 1e-3
        with pytest.raises(UsageError, match="generate has no option 'max_tokens'"):
            loaded.generate("x", max_tokens=3)


def test_what_comes_from_outside_is_escaped():
    shown = notebook.rank_map({"layers.0.<b>": 3}, {"layers.0.<b>": 4}) + notebook.page("", ["<script>"])
    assert "<b>" not in shown
    assert "<script>" not in shown


# -- keywords are the options of the commands --------------------------------------------------------------------------

# Of the terminal alone; and what is a type in Python, or another function.
NOT_IN_PYTHON = {
    "context", "as_json", "dry_run", "devices", "overrides",
    # of `dynlora eval`: thresholds are an `if` over `losses`; a library and its routers stay with the command
    "fail_above", "fail_below", "baseline", "max_regression", "library", "router", "explain", "set",
}  # fmt: skip
# In Python a recipe may be a dict, which needs no file, and a loop over dicts is a sweep.
OF_A_DICT = {"model", "dataset", "budget", "columns", "sweep", "dtype", "files", "together"}


@pytest.mark.parametrize("name", ["train", "prune", "merge", "export", "inspect", "evaluate"])
def test_keywords_are_the_options_of_the_commands(name: str):
    module = importlib.import_module(f"dynlora_cli.cli.{'eval' if name == 'evaluate' else name}")
    options = {option.rstrip("_") for option in inspect.signature(getattr(module, name)).parameters}
    keywords = set(inspect.signature(getattr(api, name)).parameters)
    of_dicts = OF_A_DICT if name == "train" else set()
    assert options - keywords <= (NOT_IN_PYTHON - (set() if name == "evaluate" else {"library", "set"})) | of_dicts
    assert keywords - options <= {"progress"} | ({"set", "recipe"} if name == "train" else set())


def test_values_that_nobody_gives_are_those_of_the_commands():
    for name in ("train", "prune", "merge", "export"):
        module = importlib.import_module(f"dynlora_cli.cli.{name}")
        theirs = {
            key.rstrip("_"): one.default for key, one in inspect.signature(getattr(module, name)).parameters.items()
        }
        ours = {key: one.default for key, one in inspect.signature(getattr(api, name)).parameters.items()}
        both = theirs.keys() & ours.keys() - {"adapter", "born", "recipe"}  # which Python may be given otherwise
        assert {key: ours[key] for key in both} == {key: theirs[key] for key in both}, name
