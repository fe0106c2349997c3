"""Components per expert: the experts' slices as layers, in training, in PEFT's files and back, and in the base's."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from test_architectures import logits
from tiny_architectures import write_model
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapter_base import Place
from dynlora_cli.adapter_reader import read_adapter
from dynlora_cli.attach import attached
from dynlora_cli.experts import fuse, fused_experts, join, split, unfuse
from dynlora_cli.fold import plan_merge, write_merged
from dynlora_cli.recipe_settings import Model
from dynlora_cli.weights import Weights

SHORT = ("train.max_steps=3", "pruning.start=0.3", "pruning.end=0.7", "pruning.events=1", "eval.steps=3")
# What is adapted, and how many layers that makes: 2 blocks, 4 experts.
WANTED = {
    "mixtral": ("[all-linear, experts]", 8 + 16),
    "olmoe": ("experts", 16),
    "qwen2_moe": ("['*.experts.*.down_proj']", 8),
}


def base(folder: Path, kind: str):
    return AutoModelForCausalLM.from_pretrained(folder / kind)


@pytest.fixture(scope="module", params=WANTED)
def trained(request, tmp_path_factory):
    """A folder with a model, its kind, and the summary of a run on it with one pruning event."""
    folder, kind = tmp_path_factory.mktemp("experts"), request.param
    write_model(folder / kind, kind)
    recipe = make_recipe(folder, *SHORT, f"adapter.target_modules={WANTED[kind][0]}", kind=kind)
    summary, _ = train(recipe)
    return folder, kind, summary


@pytest.mark.parametrize("kind", WANTED)
def test_split_experts_compute_what_fused_ones_do(tmp_path, kind):
    write_model(tmp_path / kind, kind)
    model = base(tmp_path, kind)
    before, names = logits(model), [name for name, _ in model.named_modules()]
    split(model)
    split(model)  # once more changes nothing
    down = model.get_submodule("model.layers.1.mlp.experts.2.down_proj")
    torch.testing.assert_close(down.weight, model.model.layers[1].mlp.experts.down_proj[2])
    torch.testing.assert_close(logits(model), before)
    with torch.no_grad():
        down.weight.zero_()
    assert (logits(model) - before).abs().max() > 1e-4, "the slices do not take part"
    join(model)
    assert [name for name, _ in model.named_modules()] == names
    assert set(fused_experts(model).values()) == {4}


def test_factors_fused_and_unfused_again():
    torch.manual_seed(0)
    shapes = {
        "m.experts.0.down_proj": (2, 5, 3),
        "m.experts.3.down_proj": (1, 5, 3),
        "m.experts.1.gate_up_proj": (3, 4, 5),
    }
    factors = {
        name: (torch.randn(rank, d_in), torch.randn(d_out, rank)) for name, (rank, d_in, d_out) in shapes.items()
    }
    tensors = fuse(factors, dict.fromkeys(factors, 4))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "m.experts.lora_A.weight": (8, 5),
        "m.experts.lora_B.weight": (3, 8),
        "m.experts.base_layer.lora_A.weight": (12, 4),
        "m.experts.base_layer.lora_B.weight": (5, 12),
    }
    back = unfuse("m.experts.down_proj", tensors["m.experts.lora_A.weight"], tensors["m.experts.lora_B.weight"], 2)
    inner = (tensors[f"m.experts.base_layer.lora_{part}.weight"] for part in "AB")
    back |= unfuse("m.experts.gate_up_proj", *inner, 3)
    assert back.keys() == factors.keys()
    for name, pair in factors.items():
        torch.testing.assert_close(back[name], pair)


def test_trained_and_pruned_with_a_rank_for_each_expert(trained):
    folder, kind, summary = trained
    ranks = {name: rank for name, rank in summary["ranks"].items() if ".experts." in name}
    assert len(summary["ranks"]) == WANTED[kind][1]
    assert len(set(ranks.values())) > 1
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert summary["loss_after"] != summary["loss_before"]
    config = json.loads((folder / "out/adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(
        {".".join((*name.split(".")[:-2], name.split(".")[-1])) for name, rank in ranks.items() if rank}
    )


@pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module.*:RuntimeWarning")  # see lora_config
def test_peft_reads_it_and_so_do_we(trained):
    folder, kind, summary = trained
    model = base(folder, kind)
    untouched = logits(model)
    adapter = read_adapter(folder / "out")
    assert adapter.ranks == {name: rank for name, rank in summary["ranks"].items() if rank}
    with attached(model, adapter):
        ours = logits(model)
    torch.testing.assert_close(logits(model), untouched, rtol=0, atol=0)
    theirs = logits(peft.PeftModel.from_pretrained(model, folder / "out"))
    assert (theirs - untouched).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("adapter.init_weights=pissa", "experts do not start as pissa"),
        ("rank.allocation=eva", "experts start alike"),
    ],
)
def test_refused_in_the_recipe(tmp_path, setting, problem):
    with pytest.raises(Exception, match=problem):
        make_recipe(tmp_path, "adapter.target_modules=experts", setting)


@pytest.mark.parametrize("whole", [False, True])
def test_merged_into_the_files_of_the_base(trained, tmp_path, whole):
    """The files hold each expert apart, as they do on the hub, or all experts in one tensor, as the model does."""
    folder, kind, _ = trained
    if whole:
        (tmp_path / kind).mkdir()
        base(folder, kind).save_pretrained(tmp_path / kind, save_original_format=False)
        assert "model.layers.0.mlp.experts.down_proj" in Weights(tmp_path / kind).entries
    adapter = read_adapter(folder / "out")
    with attached(model := base(folder, kind), adapter):
        expected = logits(model)
    place = Place(Model(name_or_path=str(folder / kind)), (tmp_path if whole else folder) / kind, None, True)
    (tmp_path / "merged").mkdir()
    write_merged(plan_merge(adapter, place), adapter, place, tmp_path / "merged")
    torch.testing.assert_close(logits(base(tmp_path, "merged")), expected, rtol=1e-4, atol=1e-5)
    assert Weights(tmp_path / "merged").entries.keys() == Weights(place.folder).entries.keys()


def test_commands_that_carry_it_out_and_those_that_say_what_does(trained, tmp_path, dynlora):
    folder, kind, summary = trained
    merged = dynlora("merge", "--adapter", folder / "out", "--out", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["check"]["kl"] < 1e-6
    assert merged.json["modules"] == sum(rank > 0 for rank in summary["ranks"].values())
    measured = dynlora("eval", "--adapter", folder / "out", "--json")
    assert measured.code == 0, measured.err
    for form in ("gguf", "vllm", "ollama", "uniform", "lorax"):
        refused = dynlora("export", "--adapter", folder / "out", "--to", form, "--out", tmp_path / form)
        assert refused.code == 2
        assert "has components for each expert" in refused.err
        assert "--to merged" in refused.err
    for command in (
        ("prune", "--adapter", folder / "out", "--budget", "1"),
        ("merge", "--adapter", folder / "out", "--adapter", folder / "out", "--into", "adapter"),
    ):
        refused = dynlora(*command, "--out", tmp_path / "none")
        assert refused.code == 2, refused.err
        assert "has components for each expert" in refused.err
        assert "dynlora merge --adapter" in refused.err
