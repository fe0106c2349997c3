"""`dynlora train --model M --dataset D`: the recipe that `init` would write is trained, and kept where it is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora, contents

from dynlora_cli.config.load import load_recipe, load_text
from dynlora_cli.drafts.named import settled

NAMED = ("--model", "builtin:tiny", "--dataset", "my rows.jsonl")
SMALL = ("--set", "train.max_steps=2", "--set", "train.learning_rate=1e-3", "--set", "dataset.max_length=64")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{number} + 1 =", "answer": f"{number + 1}"} for number in range(20)]
    Path("my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "dynlora.json").read_text())


@pytest.mark.slow
def test_it_trains_and_keeps_its_recipe_which_repeats_it(dynlora: Dynlora):
    answer = dynlora("train", *NAMED, "--budget", "2", *SMALL, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["recipe"] == "out/my-rows/recipe.yaml"
    assert "columns known by their names" in answer.err
    recipe = load_recipe(Path("out/my-rows/recipe.yaml"))
    assert (recipe.rank.budget, recipe.train.max_steps, recipe.output_dir) == (2, 2, "out/my-rows")
    assert recipe.dataset.train[0].columns == {"prompt": "question", "completion": "answer"}
    assert recipe.model_dump(mode="json") == record("out/my-rows")["recipe"]
    again = "dynlora train out/my-rows/recipe.yaml --output-dir out/my-rows-again"
    assert answer.json["next"][-1] == again
    assert dynlora(*again.split()[1:]).code == 0
    assert record("out/my-rows-again")["summary"]["loss_after"] == answer.json["loss_after"]
    # on top of it: --resume goes on, --overwrite keeps the recipe that lies in the folder
    assert "finished already" in dynlora("train", *NAMED, "--budget", "2", *SMALL, "--resume").err
    refused = dynlora("train", *NAMED, "--budget", "2", *SMALL)
    assert (refused.code, "is not empty" in refused.err) == (2, True)
    anew = dynlora("train", "out/my-rows/recipe.yaml", "--overwrite", "--set", "seed=3")
    assert (anew.code, load_recipe(Path("out/my-rows/recipe.yaml")).seed) == (0, 3)


def test_a_dry_run_writes_nothing(dynlora: Dynlora):
    before = contents(Path())
    answer = dynlora("train", *NAMED, "--dry-run", "--output-dir", "elsewhere", "--json")
    assert answer.code == 0, answer.err
    assert "output_dir: elsewhere" in answer.json["plan"]["recipe_yaml"]
    assert contents(Path()) == before


WRONG = {
    "nothing": ([], "without a recipe, --model and --dataset must be given"),
    "no model": (["--dataset", "my rows.jsonl"], "without a recipe, --model must be given"),
    "no rows": (["--model", "builtin:tiny"], "without a recipe, --dataset must be given"),
    "an empty name": (["--model", "builtin:tiny", "--dataset", ""], "--dataset is empty"),
    "no such model": (["--model", "builtin:huge", "--dataset", "my rows.jsonl"], "no built-in model 'builtin:huge'"),
    "no such file": (["--model", "builtin:tiny", "--dataset", "my row.jsonl"], "no file or folder my row.jsonl"),
    "no such size": ([*NAMED, "--budget", "0"], "--budget 0: got 0"),
    "columns of no form": ([*NAMED, "--columns", "prompt"], "'prompt' is not OURS=THEIRS"),
    "a wrong setting": ([*NAMED, "--set", "rank.budgett=3"], "did you mean 'budget'?"),
    "a recipe as well": (["r.yaml", "--model", "m", "--budget", "4"], "write --set model=... --set rank.budget=..."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_and_nothing_is_written(case: str, dynlora: Dynlora):
    arguments, message = WRONG[case]
    answer = dynlora("train", *arguments)
    assert (answer.code, message in answer.err, Path("out").exists()) == (2, True, False), answer.err


def test_wrong_names_are_answered_before_torch():
    code = (
        "import sys\nfrom dynlora_cli.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    for names in (("--model", "builtin:huge", "--dataset", "my rows.jsonl"), (*NAMED[:3], "no.jsonl")):
        done = subprocess.run([sys.executable, "-c", code, "train", *names], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["2", "False"], done.stderr


RECIPE = """\
# Purpose: a test
model:
  name_or_path: builtin:tiny
dataset:
  train: [{path: rows.jsonl}]
  val_size: 0.05                  # held out
train:
  # gradient_checkpointing: true
  epochs: 1
output_dir: out/r
"""


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=3", "dataset.val_size=0.1", "seed=4", "output_dir=x", "rank.budget=4", "dataset.packing=true",
        "train.report_to=[wandb]", "dataset.chat_template='# {{ x }}'", "model=other", "dataset=other.jsonl",
        "dataset.train.0.columns={prompt: q}", "eval.also=[{name: a, path: b}]", "dataset.separator='a: b'",
    ],
)  # fmt: skip
def test_settings_are_written_into_the_text_so_that_it_says_the_same(setting: str):
    text = settled(RECIPE, "r.yaml", [setting])
    assert load_text(text, "r.yaml") == load_text(RECIPE, "r.yaml", [setting])
    assert text.startswith("# Purpose: a test\n")
    if setting.startswith("dataset.val_size"):
        assert "val_size: 0.1" in text
        assert "# held out" in text
