"""Names, scales and files of adapters as others write them: wrapped models, copies, alpha 0, mlx-lm, several in one."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from numeric import assert_close_to_truth, in_double
from peft import LoraConfig, get_peft_model
from peft_adapters import TERMS, base_model, ids, load, make, peft_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter_reader import edit, rewrite
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.agreement import agreement

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRAPPED = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "activation checkpointing": lambda key: key.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "DistributedDataParallel": lambda key: f"module.{key}",
    "DistributedDataParallel and torch.compile": lambda key: f"module._orig_mod.{key}",
}


def renamed(folder: Path, name) -> None:
    def change(tensors: dict) -> None:
        new = {name(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors |= new

    rewrite(folder, change)


@torch.no_grad()
def ours(base: Path, adapter: Path) -> torch.Tensor:
    with attached(model := load(base), read_adapter(adapter)):
        return model(ids()).logits


@pytest.mark.parametrize("what", WRAPPED)
def test_wrappers_are_taken_off_the_names(what: str, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make("patterns", tmp_path)
    plain = read_adapter(adapter)
    renamed(adapter, WRAPPED[what])
    edit(adapter, target_modules=["_orig_mod.model.layers.0.self_attn.q_proj"])
    found = read_adapter(adapter)
    assert found.layers.keys() == plain.layers.keys()
    assert all(torch.equal(found.layers[name].b_OC, plain.layers[name].b_OC) for name in plain.layers)
    assert what.removesuffix(" inside").split(" and ")[0] in str(found.note)
    answer = dynlora("prune", "--adapter", adapter, "--budget", "0.5", "--out", tmp_path / "pruned", "--no-measure")
    assert answer.code == 0, answer.err
    modules = dict(load(base).named_modules()).keys()
    assert set(json.loads((tmp_path / "pruned/adapter_config.json").read_text())["target_modules"]) <= modules


def test_a_module_that_is_named_so_keeps_its_name(tmp_path: Path):
    """Only what all names begin with is DistributedDataParallel's."""
    _, adapter = make("lora", tmp_path)
    renamed(adapter, lambda key: key.replace("base_model.model.", "module.") if "layers.0" in key else key)
    assert any(name.startswith("module.") for name in read_adapter(adapter).layers)


def test_the_name_of_an_adapter_in_the_names(tmp_path: Path):
    base, adapter = make("lora", tmp_path)
    truth = peft_logits(base, adapter)
    renamed(adapter, lambda key: key.replace(".weight", ".chosen.weight"))
    assert_close_to_truth(ours(base, adapter), truth, terms=TERMS)
    rewrite(adapter, lambda tensors: tensors.update({FIRST.replace(".weight", ".other.weight"): torch.ones(4, 32)}))
    with pytest.raises(UsageError, match="holds several adapters: chosen, other"):
        read_adapter(adapter)


def test_two_names_of_one_tensor(tmp_path: Path):
    _, adapter = make("lora", tmp_path)
    rewrite(adapter, lambda tensors: tensors.update({f"_orig_mod.{FIRST}": torch.ones(4, 32)}))
    with pytest.raises(UsageError, match="which name one tensor"):
        read_adapter(adapter)


def test_untrained_copies_are_left_out(tmp_path: Path, dynlora: Dynlora):
    """PEFT saves them beside a trained table and head, where the vocabulary has grown."""
    base = base_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves the table
        model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert any("original_module" in key for key in file.keys())  # noqa: SIM118
    answer = dynlora("merge", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "merged")
    assert (answer.code, "left out" in answer.err) == (0, True), answer.err
    names = load_file(tmp_path / "merged/model.safetensors").keys()
    assert names == AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().keys()
    with torch.no_grad():
        truth = in_double(model.eval())(ids()).logits
        assert_close_to_truth(load(tmp_path / "merged")(ids()).logits, truth, terms=TERMS)


OFF = {"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0}}, {"alpha_pattern": {"v_proj": 0}, "use_rslora": True}


@pytest.mark.slow
@pytest.mark.parametrize("changes", OFF)
@pytest.mark.parametrize("kind", ["patterns", "dora", "embedding"])
def test_an_alpha_of_0_switches_off(kind: str, changes: dict, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make(kind, tmp_path)
    edit(adapter, **changes)
    close = partial(assert_close_to_truth, terms=2 * TERMS)
    truth = peft_logits(base, adapter)
    close(ours(base, adapter), truth)
    for command in (["merge"], ["export", "--to", "peft"], ["prune", "--budget", "0.9"]):
        answer = dynlora(*command, "--adapter", adapter, "--out", tmp_path / command[0])
        assert answer.code == 0, answer.err
    with torch.no_grad():
        close(load(tmp_path / "merge")(ids()).logits, truth)
    close(peft_logits(base, tmp_path / "export"), truth, dtype=torch.float32)  # B is rounded with the scale in it


def test_merged_with_an_alpha_of_0_nothing_changes(tmp_path: Path, dynlora: Dynlora):
    base, adapter = make("lora", tmp_path)
    edit(adapter, lora_alpha=0)
    assert dynlora("merge", "--adapter", adapter, "--out", tmp_path / "merged").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    assert dynlora("inspect", "--adapter", adapter).code == 0


def test_a_rank_of_0_is_refused_by_name(tmp_path: Path):
    _, adapter = make("lora", tmp_path)
    edit(adapter, rank_pattern={"q_proj": 0})
    with pytest.raises(UsageError, match=r"q_proj has rank 4 in adapter_model.safetensors and 0"):
        read_adapter(adapter)


def as_mlx(adapter: Path, folder: Path, **changes: object) -> Path:
    """The same adapter as mlx-lm writes it: transposed, scaled without the rank."""
    tensors, names = load_file(adapter / "adapter_model.safetensors"), {"A.weight": "a", "B.weight": "b"}
    folder.mkdir()
    found = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("base_model.model.").replace("lora_magnitude_vector", "m")
        for old, new in names.items():
            key = key.replace(f"lora_{old}", f"lora_{new}")
        found[key] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    save_file(found, folder / "adapters.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    written = {
        "fine_tune_type": "dora" if config["use_dora"] else "lora",
        "model": config["base_model_name_or_path"],
        "num_layers": 3,
        "lora_parameters": {"rank": 4, "scale": config["lora_alpha"] / config["r"], "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | changes))
    return folder


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_mlx(dora: bool, tmp_path: Path, dynlora: Dynlora):
    base, adapter = make("dora" if dora else "lora", tmp_path)
    if dora:  # mlx-lm has one rank
        edit(adapter, rank_pattern={})
        rewrite(adapter, lambda t: [t.update({k: torch.ones(s)}) for k, s in padded(t)])
    mlx, truth = as_mlx(adapter, tmp_path / "mlx"), peft_logits(base, adapter)
    assert_close_to_truth(ours(base, mlx), truth, terms=2 * TERMS)
    assert "mlx-lm" in dynlora("inspect", "--adapter", mlx).err
    answer = dynlora("merge", "--adapter", mlx, "--out", tmp_path / "merged")
    assert answer.code == 0, answer.err
    with torch.no_grad():
        assert_close_to_truth(load(tmp_path / "merged")(ids()).logits, truth, terms=2 * TERMS)


def padded(tensors: dict) -> list[tuple[str, list[int]]]:
    """Names of factors that have a rank of 2, and their shapes with a rank of 4."""
    return [(k, [4 if n == 2 else n for n in t.shape]) for k, t in tensors.items() if t.ndim == 2 and 2 in t.shape]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full' is no LoRA"),
        ({"lora_parameters": {"rank": 4}}, "do not say how its factors are scaled"),
        ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, "do not say how its factors are scaled"),
        ({"lora_parameters": {"rank": 8, "scale": 10.0}}, "rank 4 in adapter_model.safetensors and 8"),
    ],
)
def test_adapters_of_mlx_that_are_refused(changes: dict, message: str, tmp_path: Path):
    _, adapter = make("lora", tmp_path)
    with pytest.raises(UsageError, match=message):
        read_adapter(as_mlx(adapter, tmp_path / "mlx", **changes))


def test_several_adapters_below_one_folder(tmp_path: Path, dynlora: Dynlora):
    """PEFT saves the adapters of one model side by side, by their names, and the one called default above them."""
    base = base_model("llama", tmp_path)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config, adapter_name="first")
    model.add_adapter("second", config)
    model.save_pretrained(tmp_path / "saved")
    answer = dynlora("inspect", "--adapter", tmp_path / "saved")
    assert (answer.code, "side by side: first, second" in " ".join(answer.err.split())) == (2, True), answer.err
    assert "--adapter" in answer.err
    assert dynlora("inspect", "--adapter", tmp_path / "saved/first").code == 0
    shutil.copytree(tmp_path / "saved/first", tmp_path / "saved", dirs_exist_ok=True)
    answer = dynlora("inspect", "--adapter", tmp_path / "saved")
    assert (answer.code, "there are others: first, second" in " ".join(answer.err.split())) == (0, True), answer.err


def test_choices_that_change_are_counted():
    """Where they were as good as level, rounding explains it; a flat distribution hides the others from KL."""
    before = torch.tensor([[1.0, 0.99, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
    after = torch.tensor([[0.99, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, 0.5, 0.0]])
    found = agreement([before], [after], [torch.zeros(1, 1)], rounding=2.0**-7)
    assert found.same_choice == pytest.approx(1 / 3)
    assert found.changed == pytest.approx(1 / 3)
    assert agreement([before], [after], [torch.zeros(1, 1)]).changed == pytest.approx(2 / 3)


def test_a_merge_that_changes_choices_fails(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    """Also where KL is as good as nothing."""
    _, adapter = make("lora", tmp_path)
    monkeypatch.setattr(
        "dynlora_cli.evaluation.agreement._other_choices", lambda before, after, rounding: len(before) // 7
    )
    command = ["merge", "--adapter", adapter, "--out", tmp_path / "out"]
    answer = dynlora(*command)
    assert (answer.code, "--max-changed" in answer.err) == (4, True), answer.err
    assert not (tmp_path / "out").exists()
    assert dynlora(*command, "--max-changed", "20%").code == 0
