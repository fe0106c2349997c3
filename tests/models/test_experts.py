"""Components per expert: the experts' slices as layers, in training, in PEFT's files and back, and in the base's."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from numeric import assert_close_to_truth, in_double, rounding, same_loss
from test_architectures import TERMS, logits
from tiny_architectures import write_model
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM, GptOssConfig

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.expert_files import fuse, unfuse
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import evaluate, export
from dynlora_cli.commands.dry_run import plan
from dynlora_cli.commands.merge import into_base
from dynlora_cli.config.sections import Model
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation import options
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.fold import plan_merge, write_merged
from dynlora_cli.merging.method import Way
from dynlora_cli.models.experts import fused_experts, join, split
from dynlora_cli.models.place import Place
from dynlora_cli.models.weights import Weights

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
    exact, names = logits(in_double(model)), [name for name, _ in model.named_modules()]
    split(model)
    split(model)  # once more changes nothing
    down = model.get_submodule("model.layers.1.mlp.experts.2.down_proj")
    assert torch.equal(down.weight, model.model.layers[1].mlp.experts.down_proj[2])
    assert_close_to_truth(logits(model), exact, terms=TERMS)
    with torch.no_grad():
        down.weight.zero_()
    assert (logits(model) - exact).abs().max() > 1e-4, "the slices do not take part"
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
        assert all(torch.equal(found, given) for found, given in zip(back[name], pair, strict=True))


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
    theirs = logits(in_double(peft.PeftModel.from_pretrained(model, folder / "out")))
    assert (theirs - untouched).abs().max() > 1e-3
    assert_close_to_truth(ours, theirs, terms=TERMS)


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
        expected = logits(in_double(model))
    place = Place(Model(name_or_path=str(folder / kind)), (tmp_path if whole else folder) / kind, None, True)
    (tmp_path / "merged").mkdir()
    write_merged(plan_merge(adapter, place), adapter, place, tmp_path / "merged")
    assert_close_to_truth(logits(base(tmp_path, "merged")), expected, terms=TERMS)
    assert Weights(tmp_path / "merged").entries.keys() == Weights(place.folder).entries.keys()


one_kind = pytest.mark.parametrize("trained", ["mixtral"], indirect=True)


@one_kind
def test_commands_that_carry_it_out(trained, tmp_path):
    folder, _, summary = trained
    merged = into_base(read_adapter(folder / "out"), tmp_path / "merged")
    assert merged["check"]["kl"] < rounding(torch.float32, 64)
    assert merged["modules"] == sum(rank > 0 for rank in summary["ranks"].values())
    report = evaluate.run([folder / "out"], None, options.Options(generate=0), print)
    assert report["adapters"][0]["loss"] == same_loss(summary["loss_after"])
    export.run(folder / "out", "peft", tmp_path / "peft")
    again, first = read_adapter(tmp_path / "peft"), read_adapter(folder / "out")
    assert again.experts == first.experts
    for name, factors in first.layers.items():
        torch.testing.assert_close(again.layers[name].delta_OI(), factors.delta_OI())


@one_kind
def test_commands_that_cannot_say_what_can(trained, tmp_path):
    folder = trained[0] / "out"
    adapter = read_adapter(folder)
    for form in ("vllm", "uniform", "lorax", "gguf"):
        with pytest.raises(UsageError, match="has components for each expert") as refused:
            export.run(folder, form, tmp_path / form)
        assert "--to merged" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="model_type 'mixtral' has no GGUF form here") as refused:
        export.run(folder, "ollama", tmp_path / "ollama")
    assert "--to merged" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="has components for each expert") as refused:
        combine([adapter, adapter], Way())
    assert "dynlora merge --adapter" in (refused.value.hint or "")


def test_an_adapter_of_another_tool(tmp_path):
    write_model(tmp_path / "mixtral", "mixtral")
    torch.manual_seed(0)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj"],
        target_parameters=parameters,
        rank_pattern={"experts.down_proj": 2, "q_proj": 4},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # see lora_config
        model = peft.get_peft_model(base(tmp_path, "mixtral"), config)
    expected = logits(in_double(model))
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.layers) == 2 * (1 + 8)
    with attached(ours := base(tmp_path, "mixtral"), adapter):
        assert_close_to_truth(logits(ours), expected, terms=TERMS)


@one_kind
def test_a_stopped_run_goes_on_to_the_same_bytes(trained, tmp_path):
    folder, kind, _ = trained
    shutil.copytree(folder / kind, tmp_path / kind)
    recipe = make_recipe(tmp_path, *SHORT, f"adapter.target_modules={WANTED[kind][0]}", "train.save_steps=1", kind=kind)
    train(recipe)
    whole = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    more = make_recipe(
        tmp_path, *SHORT, f"adapter.target_modules={WANTED[kind][0]}", "train.save_steps=1", kind=kind, out="more"
    )
    train(more, resume_from=tmp_path / "out/checkpoints/step-2")
    assert (tmp_path / "more/adapter_model.safetensors").read_bytes() == whole


def test_dry_run_tells_every_expert(tmp_path):
    write_model(tmp_path / "olmoe", "olmoe")
    found = plan(make_recipe(tmp_path, *SHORT, "adapter.target_modules=experts", kind="olmoe"))
    assert len(found["modules"]) == 16
    assert {"name": "model.layers.1.mlp.experts.3.down_proj", "d_in": 64, "d_out": 32, "components": 8} in found[
        "modules"
    ]
    assert found["memory"]["activations"] > 0
    assert not [note for note in found["notes"] if "experts" in note]


def test_a_variant_that_is_no_lora_in_the_end(tmp_path):
    write_model(tmp_path / "olmoe", "olmoe")
    with pytest.raises(UsageError, match="variant dora is no LoRA when it is saved"):
        plan(make_recipe(tmp_path, "adapter.target_modules=experts", "adapter.variant=dora", kind="olmoe"))


def test_a_model_without_experts(tmp_path):
    with pytest.raises(UsageError, match="'experts' matches no linear layer"):
        plan(make_recipe(tmp_path, "adapter.target_modules=experts"))


def test_experts_of_another_form_are_refused():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = GptOssConfig(vocab_size=64, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, **sizes)
    with pytest.raises(UsageError, match="are not stored as gate_up_proj and down_proj"):
        split(AutoModelForCausalLM.from_config(config))
