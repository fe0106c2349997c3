"""A variant with a recipe key of its own is one new file: the tutorial's, from the recipe to the saved adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from safetensors.torch import load_file
from tiny_run import make_recipe, train
from tutorials import code_of

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.load import to_yaml
from dynlora_cli.errors import Interrupted
from dynlora_cli.runs.folder import read_record


@pytest.fixture(autouse=True)
def bounded(plug_in: Callable[..., Path]) -> None:
    (code,) = code_of("variants").values()
    plug_in("variants", "bounded", code)


def recipe_of(folder: Path, limit: float, out: str) -> Path:
    recipe = make_recipe(folder, "adapter.variant=bounded", f"adapter.limit={limit}", out=out)
    path = folder / f"{out}.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    return path


def largest(folder: Path) -> float:
    tensors = load_file(folder / "adapter_model.safetensors")
    return max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)


@pytest.mark.slow
def test_its_key_has_an_effect_and_every_command_takes_the_run(tmp_path: Path, dynlora: Dynlora):
    for limit, out in ((0.005, "low"), (1.0, "high")):
        answer = dynlora("train", recipe_of(tmp_path, limit, out), "--json")
        assert answer.code == 0, answer.err
        assert answer.json["variant"] == "bounded"
        assert answer.json["parameters"] <= answer.json["budget_parameters"]
        assert read_record(tmp_path / out)["recipe"]["adapter"]["limit"] == limit
    bound = 2 * 0.005  # the scale, by default 2, is saved in B
    assert largest(tmp_path / "low") <= bound < largest(tmp_path / "high")
    run, small = tmp_path / "high", tmp_path / "small"
    for command in (
        ("inspect", "--adapter", run),
        ("eval", "--adapter", run, "--generate", 0),
        ("prune", "--adapter", run, "--budget", 1, "--out", small),
        ("merge", "--adapter", run),
        ("export", "--adapter", run, "--to", "peft", "--out", tmp_path / "peft"),
    ):
        answer = dynlora(*command, "--json")
        assert answer.code == 0, answer.err
    assert read_adapter(small).parameters < read_adapter(run).parameters


@pytest.mark.slow
def test_it_is_resumed_with_its_own_limit_alone(tmp_path: Path, dynlora: Dynlora):
    whole, _ = train(make_recipe(tmp_path, "adapter.variant=bounded", "adapter.limit=0.02", out="whole"))
    with pytest.raises(Interrupted):
        train(make_recipe(tmp_path, "adapter.variant=bounded", "adapter.limit=0.02", out="cut"), interrupt_at=7)
    answer = dynlora("train", recipe_of(tmp_path, 0.03, "cut"), "--resume")
    assert answer.code == 2
    assert "adapter.limit: 0.02 then, 0.03 now" in " ".join(answer.err.split())
    answer = dynlora("train", recipe_of(tmp_path, 0.02, "cut"), "--resume", "--json")
    assert answer.code == 0, answer.err
    assert (answer.json["ranks"], answer.json["loss_after"]) == (whole["ranks"], whole["loss_after"])
    first, second = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapter.variant=bounded", "adapter.limit=0"], "adapter.limit: got 0, must be a number, above 0"),
        (["adapter.variant=bounded", "adapter.limt=1"], "adapter.limt: unknown key; did you mean 'limit'?"),
        (
            ["adapter.limit=1"],
            "adapter.limit: a key of variant bounded; write `adapter.variant: bounded`, or leave it out",
        ),
        (["adapter.variant=bounded", "train.compile=true"], "bounded layers have not been tried with it; leave one"),
        (["adapter.variant=bounded", "adapter.freeze_a=true"], "variant bounded has no use for it"),
    ],
)
def test_wrong_settings_are_answered(tmp_path: Path, dynlora: Dynlora, settings: list[str], words: str):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: builtin:tiny\ndataset: builtin:stdlib-docs\n", encoding="utf-8")
    answer = dynlora("train", path, *(part for text in settings for part in ("--set", text)))
    assert (answer.code, words in " ".join(answer.err.split())) == (2, True), answer.err
