"""`--sweep KEY=A,B`: what it means, what its runs are called, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.sweep import make_grid, name_of, read_axes
from dynlora_cli.errors import RecipeError
from dynlora_cli.files.names import is_name


@pytest.fixture
def grid(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: builtin:tiny\ndataset: builtin:stdlib-docs\noutput_dir: out/mine\n", encoding="utf-8")

    def make(*texts: str, changes: tuple[str, ...] = (), out: str | None = None):
        load = lambda settings, folder: load_recipe(recipe, changes, folder or out, settings)  # noqa: E731
        return make_grid(read_axes(texts, changes), load)

    return make


def problems(make, *texts: str, **how) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        make(*texts, **how)
    return refused.value.problems


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("rank.budget=2,4, 8", (2, 4, 8)),
        ("rank.budget=0.5,2M,auto", (0.5, "2M", "auto")),
        ("train.learning_rate=1e-4,auto", (1e-4, "auto")),
        ("adapter.target_modules=[q_proj, v_proj],all-linear", (["q_proj", "v_proj"], "all-linear")),
        ("dataset.chat_template='a, b',null", ("a, b", None)),
        ("train.fused=true,false", (True, False)),
    ],
)
def test_values_parse_as_after_set(text, values):
    (axis,) = read_axes([text])
    assert axis.values == values
    assert [type(one) for one in axis.values] == [type(one) for one in values]


def test_all_combinations_are_runs_of_their_own(grid):
    made = grid("rank.budget=2,4", "seed=0,1,2", changes=("train.epochs=2",), out="elsewhere")
    assert [member.name for member in made.members] == [f"budget-{b}_seed-{s}" for b in (2, 4) for s in (0, 1, 2)]
    assert made.folder == Path("elsewhere")
    for member in made.members:
        alone = member.recipe
        assert (alone.rank.budget, alone.seed) == (member.values["rank.budget"], member.values["seed"])
        assert alone.train.epochs == 2
        assert member.folder == Path("elsewhere") / member.name


def test_the_recipe_says_where_they_go_unless_told_otherwise(grid):
    assert grid("seed=0,1").folder == Path("out/mine")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"rank.budget": 8, "seed": 0}, "budget-8_seed-0"),
        ({"train.learning_rate": 2e-5}, "learning-rate-2e-05"),
        ({"dataset": "data/a b.jsonl"}, r"dataset-data-a-b.jsonl-[0-9a-f]{4}"),
        ({"adapter.target_modules": ["q", "v"]}, r"target-modules-q-v-[0-9a-f]{4}"),
        ({"pruning.start": 0.1, "other.start": 0.2}, "pruning.start-0.1_other.start-0.2"),
        ({"model": "../" * 40}, r"model[\w.-]{1,60}"),
        ({"dataset.chat_template": "/" + "x" * 300}, r"chat-template-x+-[0-9a-f]{8}"),
    ],
)
def test_names_are_safe_and_say_the_values(values, name):
    assert re.fullmatch(name, name_of(values))
    assert is_name(name_of(values)), "so it can be served and put into a library under it"


def test_names_stay_when_a_sweep_grows(grid):
    small, large = grid("rank.budget=2,4"), grid("rank.budget=1,2,4,8")
    assert {member.name for member in small.members} < {member.name for member in large.members}


def test_values_that_look_alike_get_other_folders(grid):
    made = grid("dataset=data/a.jsonl,data-a.jsonl")
    assert len({member.name for member in made.members}) == 2


def test_all_problems_of_all_combinations_are_told_at_once(grid):
    found = problems(grid, "rank.budgett=2,4", "seed=0,x", "adapter.dropout=0.1,7")
    assert len(found) == 4, "a line for each fault, not for each combination"
    assert any("rank.budgett" in line and "did you mean 'budget'" in line for line in found)
    (seed,) = [line for line in found if "seed:" in line]
    assert '--sweep seed="x"' in seed
    assert "(in budgett-2_seed-x" in seed
    assert "and 3 more)" in seed, "of four combinations with it"


def test_settings_that_do_not_go_together_name_their_runs(grid):
    (found,) = problems(grid, "dataset.packing=true,false", "train.objective=sft,dpo")
    assert "(in packing-true_objective-dpo)" in found


@pytest.mark.parametrize(
    ("texts", "changes", "said"),
    [
        (["rank.budget"], (), "must be written section.key=value,value"),
        (["rank.budget="], (), "names no value"),
        (["rank.budget=2,,4"], (), "not valid YAML"),
        (["rank.budget=[2, 4]"], (), "leave out the brackets"),
        (["rank={budget: 2}"], (), "a value may not be a section"),
        (["output_dir=a,b"], (), "a folder of its own"),
        (["seed=0", "seed=1"], (), "given 2 times"),
        (["seed=0,1"], ("seed=3",), "--set gives this key one value as well"),
        (["seed=0,1,0"], (), "are the same run"),
        (["train.learning_rate=1e-4,0.0001"], (), "are the same run"),
        ([f"seed={','.join(map(str, range(1001)))}"], (), "1,001 combinations"),
    ],
)
def test_what_makes_no_sweep_is_refused(grid, texts, changes, said):
    assert said in "\n".join(problems(grid, *texts, changes=changes))
