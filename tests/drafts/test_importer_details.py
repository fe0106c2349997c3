"""Details of other tools' configurations that change what is trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynlora_cli.config.load import load_text
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.drafts.convert import Converted, convert
from dynlora_cli.drafts.files.entries import LARGEST
from dynlora_cli.errors import UsageError

AXOLOTL = "base_model: builtin:tiny\nsequence_len: 64\nadapter: lora\nlora_r: 4\nlora_alpha: 8\n"
ROWS = "datasets: [{path: a.jsonl}]\n"


def made(tmp_path: Path, name: str, text: str) -> tuple[Converted, Recipe]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    found = convert(path)
    return found, load_text(found.text("dynlora train r.yaml"), "r.yaml")


def texts(found: Converted, kind: str) -> str:
    return "\n".join(map(str, found.of_kind(kind)))


def test_a_batch_size_of_axolotl_becomes_passes(tmp_path: Path):
    _, recipe = made(tmp_path, "a.yml", AXOLOTL + ROWS + "batch_size: 16\nmicro_batch_size: 4\n")
    assert (recipe.train.micro_batch_size, recipe.train.gradient_accumulation_steps) == (4, 4)


def test_steps_that_unsloth_does_not_limit_are_no_finding(tmp_path: Path):
    """It trains three passes where its file names neither; that is said, and 0 steps are not complained of."""
    text = (
        "model: builtin:tiny\ndata:\n  local_dataset: [a.jsonl]\ntraining:\n  training_type: lora\nlora:\n  lora_r: 8\n"
    )
    found, recipe = made(tmp_path, "u.yaml", text)
    assert (recipe.train.epochs, recipe.train.max_steps) == (3, None)
    assert not any("max_steps" in texts(found, kind) for kind in ("lost", "differs", "needless"))


def test_orpo_alpha_of_axolotl_is_beta(tmp_path: Path):
    _, recipe = made(tmp_path, "a.yml", AXOLOTL + ROWS + "rl: orpo\norpo_alpha: 0.25\n")
    assert recipe.train.model_dump()["beta"] == 0.25


@pytest.mark.parametrize(
    ("roles", "kind"), [("{user: [human], assistant: [gpt]}", "needless"), ("{user: [customer]}", "lost")]
)
def test_roles_by_other_names_are_not_called_needless(tmp_path: Path, roles: str, kind: str):
    text = AXOLOTL + f"datasets: [{{path: a.jsonl, type: chat_template, roles: {roles}}}]\n"
    assert "roles" in texts(made(tmp_path, "a.yml", text)[0], kind)


def test_what_the_file_says_is_never_replaced_by_the_tools_own_default(tmp_path: Path):
    text = "swift sft --model builtin:tiny --dataset a.jsonl --max_length 64 --truncation_strategy split\n"
    found, _ = made(tmp_path, "s.sh", text)
    assert not set(found.settings) & set(found.unasked)
    assert "truncation_strategy" in texts(found, "lost")


@pytest.mark.parametrize(
    ("more", "kind", "train_on"),
    [
        ("", "differs", "auto"),
        ("assistant_only_loss: false\n", "differs", "auto"),
        ("assistant_only_loss: true\n", "converted", "assistant"),
        ("completion_only_loss: false\n", "converted", "all"),
    ],
)
def test_where_trl_has_loss_is_said_where_it_may_be_elsewhere_here(tmp_path: Path, more: str, kind: str, train_on: str):
    text = f"model_name_or_path: builtin:tiny\ndataset_name: a/b\nuse_peft: true\n{more}"
    found, recipe = made(tmp_path, "t.yaml", text)
    assert recipe.dataset.train_on == train_on
    assert "only_loss" in texts(found, kind)
    assert ("only_loss" in texts(found, "differs")) == (kind == "differs")


@pytest.mark.parametrize(
    "passes", ["$(expr 16 / $NPROC_PER_NODE)", "$((16/$NPROC_PER_NODE))", "$(( 16 / ${NPROC_PER_NODE} ))"]
)
def test_the_passes_and_processes_of_a_script_are_read(tmp_path: Path, passes: str):
    text = f"export NPROC_PER_NODE=4\nswift sft --model builtin:tiny --dataset a.jsonl --gradient_accumulation_steps {passes}\n"
    found, recipe = made(tmp_path, "s.sh", text)
    assert recipe.train.gradient_accumulation_steps == 4
    assert "--devices 4" in texts(found, "differs")


@pytest.mark.parametrize(
    "launch", ["accelerate launch --num_processes 2", "torchrun --nproc-per-node=2", "NPROC_PER_NODE=2"]
)
def test_a_launcher_that_makes_the_batch_larger_is_said(tmp_path: Path, launch: str):
    found, _ = made(
        tmp_path, "s.sh", f"{launch} trl/scripts/sft.py --model_name_or_path x/y --dataset_name a/b --use_peft\n"
    )
    assert "--devices 2" in texts(found, "differs")


def test_columns_of_ms_swift_are_columns(tmp_path: Path):
    text = 'model: builtin:tiny\ntuner_type: lora\ndataset: [a.jsonl]\ncolumns: \'{"q": "query", "a": "response"}\'\n'
    _, recipe = made(tmp_path, "s.yaml", text)
    assert recipe.dataset.train[0].columns == {"instruction": "q", "output": "a"}


def test_lists_of_data_sets_are_looked_for_in_data(tmp_path: Path):
    (tmp_path / "data").mkdir()
    place = tmp_path / "data" / "dataset_info.json"
    place.write_text(json.dumps({"mine": {"file_name": "rows.json"}}), encoding="utf-8")
    text = "model_name_or_path: builtin:tiny\nstage: sft\ndataset: mine\nmix_strategy: concat\n"
    found, recipe = made(tmp_path, "l.yaml", text)
    assert recipe.dataset.train[0].path == "data/rows.json"
    assert not found.of_kind("differs")
    place.write_bytes(b" " * (LARGEST + 1))
    assert "larger" in texts(made(tmp_path, "l.yaml", text)[0], "lost")


def test_trl_measures_on_the_split_test(tmp_path: Path):
    text = "model_name_or_path: x/y\ndataset_name: a/b\nuse_peft: true\neval_strategy: steps\neval_steps: 5\n"
    _, recipe = made(tmp_path, "t.yaml", text)
    assert (recipe.dataset.val[0].split, recipe.eval.steps) == ("test", 5)
    _, recipe = made(tmp_path, "t.yaml", text.replace("steps\n", "'no'\n", 1))
    assert recipe.dataset.val == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("", ("fp4", False)), (", bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True", ("nf4", True))],
)
def test_a_scripts_quantization_is_taken(tmp_path: Path, given: str, wanted: tuple[str, bool]):
    text = f"""
bnb = BitsAndBytesConfig(load_in_4bit=True{given})
model = AutoModelForCausalLM.from_pretrained("x/y", quantization_config=bnb)
data = load_dataset("a/b", split="train")
SFTTrainer(model=model, train_dataset=data, args=SFTConfig(max_steps=3), peft_config=LoraConfig(r=4))
"""
    _, recipe = made(tmp_path, "t.py", text)
    assert (recipe.model.bnb_4bit_quant_type, recipe.model.bnb_4bit_use_double_quant) == wanted


def test_a_system_prompt_of_torchtune_is_kept(tmp_path: Path):
    text = """
model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b, lora_attn_modules: [q_proj], lora_rank: 4, lora_alpha: 8}
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, prompt_template: torchtune.data.ChatMLTemplate}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: base}
dataset: {_component_: torchtune.datasets.chat_dataset, source: a/b, conversation_style: sharegpt, new_system_prompt: Add.}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-4}
epochs: 1
batch_size: 2
"""
    found, recipe = made(tmp_path, "o.yaml", text)
    assert recipe.dataset.train[0].system == "Add."
    assert "ChatMLTemplate" in texts(found, "lost")
    assert "conversation_style" not in texts(found, "lost")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.yml")
    with pytest.raises(UsageError, match="no file"):
        convert(tmp_path / "a.yml")


def test_signs_that_steer_a_terminal_stay_out_of_the_recipe(tmp_path: Path):
    found, recipe = made(tmp_path, "a.yml", AXOLOTL + ROWS + '"a\\e[31m": 3\n')
    assert "\x1b" not in found.text("dynlora train r.yaml")
    assert recipe.rank.init == 4


@pytest.mark.parametrize(("key", "shown"), [("eos_token", "<end>"), ("hub_token", "***")])
def test_only_secrets_are_hidden(tmp_path: Path, key: str, shown: str):
    text = f"model_name_or_path: x/y\ndataset_name: a/b\nuse_peft: true\n{key}: <end>\n"
    found: Any = [one for one in made(tmp_path, "t.yaml", text)[0].findings if one.entry.key == key]
    assert found[0].shown == shown


@pytest.mark.parametrize("columns", ["5", "[a, b]", "'{'", "'[1]'"])
def test_columns_that_are_no_mapping_are_listed(tmp_path: Path, columns: str):
    text = f"model: builtin:tiny\ntuner_type: lora\ndataset: [a.jsonl]\ncolumns: {columns}\n"
    found, recipe = made(tmp_path, "s.yaml", text)
    assert recipe.dataset.train[0].columns == {}
    assert any(one.entry.key == "columns" and one.kind != "converted" for one in found.findings)
