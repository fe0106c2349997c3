"""Names and values of other tools are answered in their own words."""

from __future__ import annotations

import pytest

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names
from dynlora_cli.config.load import json_schema
from dynlora_cli.config.options import options

from recipe_helpers import MINIMAL, load, problems, schema_keys


def test_every_alias_leads_to_a_key_that_exists() -> None:
    known = set(dict(schema_keys(json_schema())))
    for kind, (section, _) in plugins.CHOSEN.items():
        known |= {f"{section}.{key}" for name in plugins.names(kind) for key in options(kind, name)}
    assert len(foreign_names.KEYS) >= 80
    for name, alias in foreign_names.KEYS.items():
        assert alias.here.partition(":")[0] in known or (not alias.here and alias.remark), name
    bare = {path.rsplit(".", 1)[-1] for path in known}
    assert not bare & set(foreign_names.KEYS), "a key of ours would be called foreign"


@pytest.mark.parametrize("nested", [False, True])
def test_every_alias_is_answered_in_its_own_words(nested: bool) -> None:
    names = [name for name in foreign_names.KEYS if ("." in name) is nested]
    paths = [name.replace("dataset.train.", "dataset.train.0.") for name in names]
    found = problems(MINIMAL, *(f"{path}=1" for path in paths))
    for name, path in zip(names, paths, strict=True):
        assert f"{path}: {foreign_names.hint(name.split('.'))}" in {line.partition(": ")[2] for line in found}


@pytest.mark.slow
def test_every_value_known_from_elsewhere_is_wrong_here_and_its_translation_right() -> None:
    keys = [path for path, _ in schema_keys(json_schema()) if not path.startswith(("eval.also.", "tasks."))]
    paths = {path.rsplit(".", 1)[-1]: path for path in keys}
    for (key, value), here in foreign_names.VALUES.items():
        path = paths[key].replace("dataset.val.", "dataset.train.0.")
        assert any("write " in problem for problem in problems(MINIMAL, f"{path}={value}")), (key, value)
        if "`" not in here and " " not in here:
            load(MINIMAL, f"{path}={here}")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("cutoff_len", "`cutoff_len` is LLaMA-Factory's name; here it is `dataset.max_length`"),
        ("bf16", "`bf16` is transformers' name; here it is `model.dtype: bfloat16`"),
        ("rank_budget", "`rank_budget` is `rank.budget` here"),
        ("pruning_policy", "`pruning_policy` is `pruning.policy` here"),
        ("qlora", "`qlora` is `model.load_in_4bit: true` here (with `adapter.variant: lora`)"),
        (
            "lora_parameters.scale",
            "`lora_parameters.scale` is mlx-lm's name; here it is `adapter.alpha` (the scale is alpha / r)",
        ),
        ("data", "`data` is litgpt's name; here it is `dataset`"),
    ],
)
def test_alias_sentences(name: str, answer: str) -> None:
    assert foreign_names.hint(name.split(".")) == answer


def test_no_counterpart_says_why() -> None:
    answer = foreign_names.hint(["total_step"])
    assert answer is not None
    assert "no counterpart" in answer
    assert "`pruning.start`" in answer
