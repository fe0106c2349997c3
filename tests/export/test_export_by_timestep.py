"""A T-LoRA's file through the commands: kept with its rule, at one timestep, in parts, and refused where neither is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_rank_in_pipeline import write_adapter

from dynlora_cli.adapters.images.by_timestep import at_step
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.lora.timesteps.schedule import Schedule

PLAN = Schedule(terms=2)


@pytest.fixture
def file(tmp_path):
    write_adapter(tmp_path / "lora", PLAN, 8)
    return tmp_path / "lora" / "pytorch_lora_weights.safetensors"


def same(one, two):
    assert one.schedule == two.schedule
    assert one.layers.keys() == two.layers.keys()
    assert all(torch.allclose(f.delta_OI(), two.layers[n].delta_OI(), atol=1e-6) for n, f in one.layers.items())
    return True


def test_it_keeps_its_rule_and_says_what_that_needs(file, tmp_path, dynlora):
    done = dynlora("export", "--adapter", file, "--to", "diffusers", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert any("api.rank_by_timestep" in note for note in json.loads(done.out)["notes"])
    assert same(read_adapter(tmp_path / "out", images=True), read_adapter(file, images=True))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_at_one_timestep_it_is_a_plain_lora(file, tmp_path, dynlora, to):
    done = dynlora("export", "--adapter", file, "--to", to, "--out", tmp_path / "out", "--set", "at_step=640")
    assert done.code == 0, done.err
    found = read_adapter(tmp_path / "out", images=True)
    assert found.schedule is None
    assert same(found, at_step(read_adapter(file, images=True), 640))


def test_parts_of_the_timesteps_are_files_beside_the_whole(file, tmp_path, dynlora):
    done = dynlora(
        "export", "--adapter", file, "--to", "diffusers", "--out", tmp_path / "o", "--set", "bands=4", "--json"
    )
    assert done.code == 0, done.err
    whole = read_adapter(file, images=True)
    for number, part in enumerate(json.loads(done.out)["bands"]):
        assert (part["file"], part["from"], part["to"]) == (
            f"band-{number}.safetensors",
            250 * number,
            250 * number + 250,
        )
        found = read_adapter(tmp_path / "o" / part["file"], images=True)
        assert same(found, at_step(whole, 250 * number + 125))
        assert found.parameters == part["parameters"]
    assert same(read_adapter(tmp_path / "o", images=True), whole)


def test_pruning_cuts_pairs_from_the_end_and_keeps_the_rule(file, tmp_path, dynlora):
    done = dynlora("prune", "--adapter", file, "--budget", "0.5", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    whole, smaller = read_adapter(file, images=True), read_adapter(tmp_path / "out", images=True)
    assert smaller.schedule == PLAN
    assert smaller.parameters <= whole.parameters / 2
    for name, factors in smaller.layers.items():
        assert factors.rank % 2 == 0
        assert torch.equal(factors.a_CI, whole.layers[name].a_CI[: factors.rank])


def test_inspect_says_what_it_is(file, dynlora):
    done = dynlora("inspect", "--adapter", file)
    assert done.code == 0, done.err
    assert "T-LoRA" in done.err
    assert "(T - t) / T of a layer's, 1 at least; T = 1000" in done.err
    assert ", 0 B" not in done.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("export", "--to", "kohya"), "so there is no single update"),
        (("export", "--to", "kohya", "--set", "at_step=2000"), "there is no timestep 2000"),
        (("export", "--to", "kohya", "--set", "at_step=-1"), "must be"),
        (("export", "--to", "diffusers", "--set", "at_step=9", "--set", "bands=2"), "is at one timestep then"),
        (("merge", "--base", "builtin:tiny-image", "--into", "base"), "so there is no single update"),
    ],
)
def test_what_needs_a_timestep_says_so(file, tmp_path, dynlora, command, says):
    done = dynlora(*command, "--adapter", file, "--out", tmp_path / "out")
    assert done.code == 2
    assert says in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_a_plain_lora_has_no_timesteps(tmp_path, dynlora, file):
    done = dynlora("export", "--adapter", file, "--to", "diffusers", "--out", tmp_path / "p", "--set", "at_step=0")
    assert done.code == 0, done.err
    for more in (("--set", "at_step=3"), ("--set", "bands=3")):
        done = dynlora("export", "--adapter", tmp_path / "p", "--to", "diffusers", "--out", tmp_path / "o", *more)
        assert done.code == 2
        assert "uses all" in " ".join(done.err.split())


def test_several_are_put_together_at_one_timestep(file, tmp_path, dynlora):
    both = ("merge", "--adapter", file, "--adapter", file, "--out", tmp_path / "both")
    done = dynlora(*both)
    assert done.code == 2
    assert "--at-step" in done.err
    done = dynlora(*both, "--at-step", "250")
    assert done.code == 0, done.err
    found, once = read_adapter(tmp_path / "both", images=True), at_step(read_adapter(file, images=True), 250)
    assert all(torch.allclose(f.delta_OI(), 2 * once.layers[n].delta_OI(), atol=1e-5) for n, f in found.layers.items())
    assert "dynlora_rank_by_timestep" not in str(
        load_file(tmp_path / "both" / "pytorch_lora_weights.safetensors").keys()
    )
