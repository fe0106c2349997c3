"""An importer is one new file: the tutorial's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tutorials import code_of

from dynlora_cli.config import foreign_names
from dynlora_cli.config.load import load_text
from dynlora_cli.drafts.convert import convert

from recipe_helpers import MINIMAL, problems

CONFIG = """\
checkpoint_dir: checkpoints/pythia
lora_r: 4
data:
  class_path: litgpt.data.JSON
  init_args: {json_path: rows.json}
devices: 2
num_nodes: 2
"""


def test_it_reads_the_files_of_its_tool_and_answers_its_keys(tmp_path: Path, plug_in: Any) -> None:
    (code,) = code_of("importers").values()
    plug_in("importers", "litgpt", code)
    path = tmp_path / "lora.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    found = convert(path)
    recipe = load_text(found.text("dynlora train r.yaml"), "r.yaml")
    assert (found.tool, recipe.model.name_or_path) == ("litgpt", "checkpoints/pythia")
    assert (recipe.rank.init, recipe.rank.budget, recipe.adapter.alpha, recipe.adapter.dropout) == (4, 4, 16, 0.05)
    assert recipe.dataset.train[0].path == "rows.json"
    assert [one.entry.key for one in found.of_kind("lost")] == ["num_nodes"]
    foreign_names.keys_of.cache_clear()
    answer = problems(MINIMAL, "num_nodes=2")
    assert any("`num_nodes` is litgpt's name" in line for line in answer), answer


@pytest.mark.parametrize("key", ["pissa_iter", "gptq", "lorap_lr_ratio", "low_cpu_ram"])
def test_keys_of_one_tool_are_answered_in_a_wrong_recipe(key: str) -> None:
    answer = foreign_names.tool_hint(["train", key])
    assert answer is not None
    assert key in answer
