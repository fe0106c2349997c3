"""A recipe that was made of a TRL configuration trains what TRL's own command trains with it: the same held-out loss."""

from __future__ import annotations

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


def trl_trainer(config: Path) -> Any:
    """What `trl sft --config FILE` makes of a file."""
    from datasets import load_dataset
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
        script, arguments, model = parser.parse_args_and_config(["--config", str(config)])
        base = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32)
        return SFTTrainer(
            model=base,
            args=arguments,
            train_dataset=load_dataset(script.dataset_name)["train"],
            processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
            peft_config=get_peft_config(model),
        )


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
    config = tmp_path / "trl.yaml"
    text = CONFIG.format(
        model=model, data=data.parent, scheduler=scheduler, decay=decay, more=more, out=tmp_path / "theirs"
    )
    config.write_text(text, encoding="utf-8")
    theirs = trl_trainer(config)

    converted = convert(config)
    assert not converted.of_kind("lost")
    overrides = (f"output_dir={tmp_path / 'ours'}", "dataset.chat=false", "eval.samples=0")
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
