"""Arrow against stock PEFT's Arrow, with equal tensors; and where PEFT refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import in_double
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from peft_adapters import base_model, ids, load

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.options import given
from dynlora_cli.routing.router import Context, open_router

# PEFT's prototypes are the result of a power iteration in fp32.
SAME_AS_PEFT = 1e-5


def save(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A LoRA whose strongest direction stands out in every layer, so that PEFT's power iteration comes to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            load(base), LoraConfig(**({"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options))
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1, generator=generator)
                if "lora_B" in name:
                    parameter[:, 0] *= 6
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def of_peft(base: Path, folders: list[Path], config: ArrowConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = create_arrow_model(load(base), [str(folder) for folder in folders], config).eval()
        return in_double(model)(ids()).logits


@torch.no_grad()
def of_ours(base: Path, folders: list[Path], *options: str) -> torch.Tensor:
    model = load(base)
    adapters = {f"task_{n}": read_adapter(folder) for n, folder in enumerate(folders)}
    with Bank(model, adapters) as bank:
        router: Any = open_router("arrow", Context(bank=bank, options=given("routers", "arrow", options)))
        with bank.routed(router):
            return model(ids()).logits


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (2, 0.5), (1, 1.0)])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], "all-linear"], ids=["some", "all"])
def test_the_same_as_peft_s(top_k: int, temperature: float, targets: Any, tmp_path: Path):
    base = base_model("llama", tmp_path)
    folders = [save(base, tmp_path / f"adapter-{n}", n, target_modules=targets) for n in range(4)]
    truth = of_peft(base, folders, ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0))
    ours = of_ours(base, folders, f"top_k={top_k}", f"router_temperature={temperature}")
    assert (ours.double() - truth).abs().max() <= SAME_AS_PEFT * truth.abs().max()
    assert (ours.double() - in_double(load(base))(ids()).logits).abs().max() > 0.05 * truth.abs().max()


def test_its_defaults_are_peft_s():
    options, theirs = given("routers", "arrow", ()), ArrowConfig()
    assert (options.top_k, options.router_temperature) == (theirs.top_k, theirs.router_temperature)  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", [{"r": 2, "lora_alpha": 4}, {"target_modules": ["q_proj", "down_proj"]}])
def test_what_peft_refuses_is_taken(other: dict[str, Any], tmp_path: Path):
    """tests/routing/test_spectral.py compares such adapters with dense updates."""
    base = base_model("llama", tmp_path)
    targets = {"target_modules": ["q_proj", "v_proj"]}
    folders = [save(base, tmp_path / "one", 1, **targets), save(base, tmp_path / "other", 2, **(targets | other))]
    with pytest.raises(ValueError, match="mismatch"):
        of_peft(base, folders, ArrowConfig(top_k=2))
    assert of_ours(base, folders).isfinite().all()


def test_the_mean_that_peft_subtracts_is_not_the_mean_of_the_updates(tmp_path: Path):
    """GenKnowSub with two general adapters: PEFT's (mean A, mean B) is another update than ours, the exact mean."""
    base = base_model("llama", tmp_path)
    folders = [save(base, tmp_path / f"adapter-{n}", n, target_modules=["q_proj", "v_proj"]) for n in range(4)]
    config = ArrowConfig(top_k=2, use_gks=True, rng_seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = create_arrow_model(
            load(base), [str(f) for f in folders[:2]], config, [str(f) for f in folders[2:]]
        )
        theirs = in_double(model.eval())(ids()).logits
    ours = of_ours(base, folders, "top_k=2", "general=task_2+task_3")
    assert (ours.double() - theirs).abs().max() > 0.01 * theirs.abs().max()
