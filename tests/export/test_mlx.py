"""Adapters for mlx-lm: the documented names and shapes, and, where mlx-lm is installed, the logits of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth, in_double
from safetensors.torch import load_file, save_file
from tiny_gguf import CONFIGS, add, make, random_layers
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.adapters.write import lora_config
from dynlora_cli.adapters.write import write_adapter as write_peft
from dynlora_cli.commands import export
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.export.targets import mlx

IDS = torch.randint(2, 300, (1, 20), generator=torch.Generator().manual_seed(2))


def exported(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A base in `folder`/base, an adapter of mixed ranks and with gaps, and its export in `folder`/out."""
    make(folder / "base", kind, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    layers = random_layers(model)
    ranks = {name: a_CI.shape[0] for name, (a_CI, _) in layers.items()}
    tensors = {f"{PREFIX}{n}.lora_{x}.weight": f for n, fs in layers.items() for x, f in zip("AB", fs, strict=True)}
    (folder / "adapter").mkdir()
    config = lora_config(ranks, base_model=str(folder / "base"), revision=None, task="causal-lm")
    write_peft(folder / "adapter", config | {"fan_in_fan_out": kind == "gpt2"}, tensors)
    summary = export.run(folder / "adapter", "mlx", folder / "out")
    add(model, layers)
    return summary | {"model": model.eval(), "layers": layers}


def test_the_documented_names_and_shapes(tmp_path):
    """https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md, and what its `load_adapters` asks of a folder."""
    made = exported("qwen3", tmp_path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "rank": 5,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": [
            *("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
            *(f"self_attn.{letter}_proj" for letter in "koqv"),
        ],
    }
    assert len(tensors) == 2 * 2 * 7, "every layer of both blocks, those without components too"
    assert tensors["model.layers.0.self_attn.q_proj.lora_a"].shape == (64, 5)
    assert tensors["model.layers.0.self_attn.q_proj.lora_b"].shape == (5, 128)
    a_CI, b_OC = made["layers"]["model.layers.0.self_attn.q_proj"]
    a_IC, b_CO = (tensors[f"model.layers.0.self_attn.q_proj.lora_{x}"] for x in "ab")
    torch.testing.assert_close(a_IC @ b_CO, (b_OC @ a_CI).T)
    filled = set(_layers(tensors)) - made["layers"].keys()
    assert len(filled) == made["filled_layers"] == 2
    assert all(not tensors[f"{name}.lora_b"].any() for name in filled)
    assert made["check"]["kl"] < 1e-6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("adapter_config.json", "adapters.safetensors", "export.json")
    ]


def _layers(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]


def test_only_the_blocks_that_are_adapted_are_named(tmp_path):
    made = exported("gemma3", tmp_path)
    assert made["num_layers"] == 7
    names = [f"model.layers.{block}.self_attn.q_proj" for block in (5, 6)]
    layers = {name: made["layers"].get(name, (torch.ones(1, 64), torch.ones(96, 1))) for name in names}
    tensors = {f"{PREFIX}{n}.lora_{x}.weight": f for n, fs in layers.items() for x, f in zip("AB", fs, strict=True)}
    (tmp_path / "late").mkdir()
    ranks = {name: a_CI.shape[0] for name, (a_CI, _) in layers.items()}
    base = str(tmp_path / "base")
    write_peft(tmp_path / "late", lora_config(ranks, base_model=base, revision=None, task="causal-lm"), tensors)
    late = export.run(tmp_path / "late", "mlx", tmp_path / "late-out")
    assert (late["num_layers"], late["keys"], late["filled_layers"]) == (2, ["self_attn.q_proj"], 0)


def test_what_mlx_lm_does_not_read_is_refused(tmp_path):
    made = exported("llama", tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    out = tmp_path / "out"
    kept = load_file(out / "adapters.safetensors")
    save_file({k: v for k, v in kept.items() if "layers.1.mlp.up_proj.lora_b" not in k}, out / "adapters.safetensors")

    shapes = {name: (a_CI.shape[1], b_OC.shape[0]) for name, (a_CI, b_OC) in made["layers"].items()}
    job: Any = SimpleNamespace(base_config=config | {"model_type": "bert"}, linear_layers=shapes)
    with pytest.raises(DynloraError, match="mlx-lm would find no factors"):
        mlx.read_back(job, out)
    with pytest.raises(UsageError, match="model_type 'bert'"):
        mlx._check_model(job)


def as_on_the_hub(folder: Path) -> None:
    """Write the keys of config.json as files on the hub have them; mlx-lm does not read all that transformers 5 writes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    near = rope.get("sliding_attention", {}).get("rope_theta")
    rope = rope.get("full_attention", rope)
    if rope:
        config |= {"rope_theta": rope["rope_theta"]} | ({"rope_local_base_freq": near} if near else {})
        config |= {"rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}
    config |= {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    config |= {"n_ctx": config["n_positions"]} if "n_positions" in config else {}
    path.write_text(json.dumps(config))
    if config["model_type"] == "gpt2":  # OpenAI's own file begins its names later
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_model_that_is_said_to_fit_was_tried():
    assert {config.model_type for config in CONFIGS.values()} == mlx.MODEL_TYPES


# Without those whose base mlx-lm computes otherwise: windows in another order, LongRoPE.
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("gemma3-pattern", "phi3-long")])
def test_the_real_mlx_lm_has_our_logits(kind, tmp_path):
    core = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]' mlx-lm")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    made = exported(kind, tmp_path)
    as_on_the_hub(tmp_path / "base")
    plain, _ = utils.load_model(tmp_path / "base")
    adapted = utils.load_adapters(utils.load_model(tmp_path / "base")[0], str(tmp_path / "out"))
    ids = core.array(IDS.tolist())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    core.set_default_device(core.cpu)
    for theirs, ours in ((plain, base), (adapted, made["model"])):
        theirs.eval()
        with torch.no_grad():
            found = torch.tensor(theirs(ids).tolist())
            assert_close_to_truth(found, in_double(ours)(IDS).logits, terms=2 * (64 + 128) * 8)
    assert made["filled_layers"] > 0
