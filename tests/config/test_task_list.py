"""The shorthand `tasks`: sources with descriptions, and its faults at their lines."""

from __future__ import annotations

import pytest

from dynlora_cli.config.load import check_recipe, to_yaml

from recipe_helpers import load, problems

TASKS = """model: builtin:tiny
tasks:
  - description: Add numbers.
    dataset: sums.jsonl
  - descriptions: [Say it nicely., Be polite.]
    dataset: {path: plays.txt, format: text, rows: 5}
  - descriptions: words.txt
    dataset: [a.jsonl, {path: b.jsonl, descriptions: [Of its own.]}]
dataset: {val_size: 0.1}
"""


def test_tasks_are_sources_with_descriptions() -> None:
    recipe = load(TASKS)
    found = [(source.path, source.descriptions) for source in recipe.dataset.train]
    assert found == [
        ("sums.jsonl", ["Add numbers."]),
        ("plays.txt", ["Say it nicely.", "Be polite."]),
        ("a.jsonl", "words.txt"),
        ("b.jsonl", ["Of its own."]),
    ]
    assert (recipe.dataset.train[1].format, recipe.dataset.train[1].rows, recipe.dataset.val_size) == ("text", 5, 0.1)
    assert load(to_yaml(recipe)) == recipe
    assert "tasks" not in to_yaml(recipe)


def test_a_program_may_give_them_as_well_and_overrides_name_sources_by_number() -> None:
    tasks = [{"description": "Add.", "dataset": "sums.jsonl"}, {"description": "Take.", "dataset": ["a", "b"]}]
    recipe = check_recipe({"model": "builtin:tiny", "tasks": tasks}, ["dataset.train.1.rows=3"])
    assert [source.rows for source in recipe.dataset.train] == [None, 3, None]
    assert load(TASKS, "tasks=[{description: Else., dataset: c.jsonl}]").dataset.train[0].path == "c.jsonl"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tasks: 5", "recipe.yaml:2: tasks: got 5, must be a list"),
        ("dataset: {val_size: 0.1}\ntasks: 5", "recipe.yaml:3: tasks: got 5, must be a list"),
        ("tasks: []", "recipe.yaml:2: tasks: got an empty list, must be a list"),
        ("tasks: [x.jsonl]", "recipe.yaml:2: tasks.0: got 'x.jsonl', must be a section with `description` and"),
        ("tasks:\n- {description: a, dataset: b}\n- {dataset: c}", "recipe.yaml:4: tasks.1.description: missing"),
        ("tasks:\n- description: a", "recipe.yaml:3: tasks.0.dataset: missing; the rows of the task"),
        ("tasks:\n- description: a\n  dataset: []", "recipe.yaml:3: tasks.0.dataset: missing"),
        ("tasks:\n- description: a\n  descriptions: [b]\n  dataset: c", "recipe.yaml:3: tasks.0.description: both are"),
        ("tasks:\n- description: ' '\n  dataset: c", "recipe.yaml:3: tasks.0.description: got ' ', must be a text"),
        (
            "tasks:\n- description: a\n  datset: c",
            "recipe.yaml:4: tasks.0.datset: unknown key; did you mean 'dataset'?",
        ),
        ("tasks:\n- description: a\n  dataset: c\n  rows: 5", "recipe.yaml:5: tasks.0.rows: unknown key; what else"),
        (
            "tasks:\n- description: a\n  dataset: {path: c, formatt: text}",
            "recipe.yaml:4: dataset.train.0.formatt: unk",
        ),
        (
            "tasks:\n- descriptions: [a, a]\n  dataset: c",
            "recipe.yaml:3: dataset.train.0.descriptions: text 2 of 2, 'a', is the same as text 1",
        ),
        (
            "tasks:\n- descriptions: [a, ' ']\n  dataset: c",
            "dataset.train.0.descriptions: text 2 of 2, ' ', says nothing",
        ),
        (
            "tasks:\n- descriptions: [a, '']\n  dataset: c",
            "dataset.train.0.descriptions: text 2 of 2, '', says nothing",
        ),
        (
            "dataset: b\ntasks:\n- {description: a, dataset: c}",
            "recipe.yaml:3: tasks: they bring the rows to train on, and",
        ),
    ],
)
def test_faults_are_told_at_their_lines(line: str, said: str) -> None:
    found = problems(f"model: builtin:tiny\n{line}\n")
    assert any(said in problem for problem in found), found
    assert len(found) == 1, "one fault, one problem"


def test_what_does_not_go_with_a_network_that_writes_adapters() -> None:
    text = TASKS + "adapter: {variant: text-gated, init_weights: pissa}\n"
    wrong = (
        ("dataset.packing=true", "dataset.packing: variant text-gated writes an adapter for each row"),
        ("rank.budget=auto", "rank.budget: a written adapter is cut to a number"),
        ("pruning.policy=magnitude", "pruning.policy: variant text-gated prunes nothing while it trains"),
        ("train.compile=true", "train.compile: variant text-gated is not compiled"),
        ("adapter.library=[x]", "adapter.library: variant text-gated does not choose among adapters"),
        ("adapter.target_modules=experts", "adapter.target_modules: experts get tokens of all rows"),
        ("rank.elastic=true", "rank.elastic"),
        ("adapter.freeze_a=true", "adapter.freeze_a: variant text-gated has no use for it"),
        ("adapter.orthogonality=0.1", "adapter.orthogonality: variant text-gated begins without old components"),
        ("adapter.save_dtype=bf16", "adapter.save_dtype"),
        ("eval.also=[{name: a, path: b}]", "eval.also: variant text-gated writes an adapter for each row"),
        ("dataset.replay={from: x}", "dataset.replay: rows of earlier runs come without descriptions"),
        ("train.objective=dpo", "train.objective: dpo compares with a model that starts alike"),
    )
    found = problems(text, *(setting for setting, _ in wrong))
    for _, said in (*wrong, ("", "adapter.init_weights: variant text-gated does not start as pissa")):
        assert any(said in problem for problem in found), said


def test_every_source_needs_a_description_for_it() -> None:
    text = "model: builtin:tiny\nadapter: {variant: text-gated}\ndataset:\n  train:\n  - {path: a, descriptions: [b]}\n  - c\n"
    assert problems(text) == [
        "recipe.yaml:6: dataset.train.1: variant text-gated writes adapters from texts; give this source "
        "`descriptions: [TEXT]`"
    ]
    assert load(text, "adapter.variant=lora").dataset.train[0].descriptions == ["b"], "lora reads none, and minds none"
