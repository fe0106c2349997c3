"""A recipe that was made of a TRL configuration trains what TRL's own command trains with it: the same held-out loss."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, rows
from tiny_run import assembled
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.config.load import load_text
from dynlora_cli.drafts.convert import convert
from dynlora_cli.training.loop import fit

# All rows in each step, so that their order says nothing.
CONFIG = """\
model_name_or_path: {model}
dataset_name: {data}
dtype: float32
bf16: false
use_cpu: true
use_peft: true
lora_r: 3
lora_alpha: 9
lora_dropout: 0.0
lora_target_modules: [q_proj, v_proj, gate_proj, down_proj]
per_device_train_batch_size: 12
max_steps: 8
learning_rate: 0.02
lr_scheduler_type: {scheduler}
weight_decay: {decay}
max_grad_norm: 0.5
gradient_checkpointing: false
report_to: none
{more}output_dir: {out}
"""


def trl_trainer(config: Path, method: str) -> Any:
    """What `trl sft --config FILE` makes of a file, or `trl dpo`."""
    import trl
    from datasets import load_dataset

    settings, maker = getattr(trl, f"{method.upper()}Config"), getattr(trl, f"{method.upper()}Trainer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = trl.TrlParser((trl.ScriptArguments, settings, trl.ModelConfig))
        script, arguments, model = parser.parse_args_and_config(["--config", str(config)])
        return maker(
            model=AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32),
            args=arguments,
            train_dataset=load_dataset(script.dataset_name)["train"],
            processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
            peft_config=trl.get_peft_config(model),
        )


def both(folder: Path, data: Path, method: str, **options: Any) -> tuple[Any, Any]:
    """Our run of the converted recipe, and TRL's of the file, both trained, from the same A."""
    config = folder / "trl.yaml"
    given = {"scheduler": "linear", "decay": 0.0, "more": ""} | options
    text = CONFIG.format(model=folder / "pico", data=data.parent, out=folder / "theirs", **given)
    config.write_text(text, encoding="utf-8")
    theirs = trl_trainer(config, method)
    converted = convert(config)
    assert not converted.of_kind("lost")
    overrides = (f"output_dir={folder / 'ours'}", "dataset.chat=false", "eval.samples=0")
    run = assembled(load_text(converted.text("dynlora train r.yaml"), "r.yaml", overrides), fill=False)
    inside = theirs.model.base_model.model
    with torch.no_grad():  # what is random: A
        for name, layer in run.trained.layers.items():
            layer.a_CI.copy_(inside.get_submodule(name).lora_A["default"].weight)
            assert (layer.scale, layer.count) == (inside.get_submodule(name).scaling["default"], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.train()
    fit(run)
    return run, theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "decay", "more"),
    [("linear", 0.0, ""), ("cosine", 0.1, "use_rslora: true\n")],
    ids=["plain", "rslora"],
)
def test_it_ends_with_the_loss_of_trls_own_run(
    scheduler: str, decay: float, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = pico_model(tmp_path)
    (tmp_path / "data").mkdir()
    data = rows(tmp_path / "data", count=12)
    run, theirs = both(tmp_path, data, "sft", scheduler=scheduler, decay=decay, more=more)

    held_out = rows(tmp_path, count=40)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer(line, return_tensors="pt").input_ids for line in held_out.read_text().splitlines()[20:]]

    def loss(of: Any) -> float:
        of.eval()
        with torch.no_grad():
            return sum(float(of(input_ids=ids, labels=ids).loss) for ids in tokens) / len(tokens)

    untrained = loss(AutoModelForCausalLM.from_pretrained(model))
    assert loss(run.model) == pytest.approx(loss(theirs.model), abs=1e-5)
    assert abs(loss(run.model) - untrained) > 0.05


@pytest.mark.slow
def test_a_preference_recipe_ends_with_trls_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pico_model(tmp_path)
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "rows.jsonl"
    pairs = [{"prompt": f"say {i}", "chosen": f" yes {i} {i % 3}", "rejected": f" no {i % 5}"} for i in range(12)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    run, theirs = both(tmp_path, data, "dpo", more="beta: 0.3\n")
    assert run.recipe.train.objective == "dpo"
    for name, layer in run.trained.layers.items():
        other = theirs.model.base_model.model.get_submodule(name).lora_B["default"].weight
        assert layer.b_OC.detach().abs().max() > 0.01
        # As a whole: Adam makes a full step of a gradient next to zero, whose sign is a matter of rounding.
        assert (layer.b_OC - other).norm() < 1e-3 * other.norm()
