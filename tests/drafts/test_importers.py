"""Configurations of other tools become recipes, and every key of theirs is accounted for."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Dynlora

from dynlora_cli import plugins
from dynlora_cli.config.load import load_recipe, load_text
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.resume import flat
from dynlora_cli.drafts.convert import Converted, convert
from dynlora_cli.drafts.files.entries import read_foreign
from dynlora_cli.drafts.importer import own_keys
from dynlora_cli.errors import UsageError

FOREIGN = Path(__file__).parents[1] / "fixtures" / "foreign"
EACH = sorted(path for path in FOREIGN.rglob("*") if path.is_file() and path.name != "dataset_info.json")


def recipe_of(converted: Converted) -> Recipe:
    return load_text(converted.text("dynlora train r.yaml"), "r.yaml")


def converted(tmp_path: Path, name: str, text: str, **more: Any) -> tuple[Converted, Recipe]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    found = convert(path, **more)
    return found, recipe_of(found)


def found_at(converted: Converted, key: str) -> tuple[str, int | None, str]:
    finding = [one for one in converted.findings if one.entry.key == key][-1]
    return finding.kind, finding.entry.line, finding.text


@pytest.mark.parametrize("path", EACH, ids=lambda path: path.name)
def test_every_key_is_listed_and_the_recipe_says_what_was_converted(path: Path):
    found = convert(path)
    listed = {one.entry.key for one in found.findings}
    assert set(read_foreign(path).entries) <= listed
    values = flat(recipe_of(found).model_dump(mode="json"))
    for key, setting in found.settings.items():
        if key not in ("dataset.train", "dataset.val"):
            assert values[key] == setting.value, key


WANTED = {
    "axolotl.yml": ("axolotl", {
        "model.name_or_path": "NousResearch/Llama-3.2-1B", "dataset.max_length": 2048, "dataset.packing": True,
        "dataset.val_size": 0.1, "rank.init": 16, "rank.budget": 16, "adapter.alpha": 32, "adapter.dropout": 0.05,
        "adapter.target_modules": ["q_proj", "v_proj"], "train.optimizer": "adamw_8bit", "train.warmup_ratio": 0.1,
        "train.micro_batch_size": 2, "train.gradient_checkpointing": True, "output_dir": "./outputs/lora-out",
        "model.dtype": "auto", "model.attn_implementation": "flash_attention_2", "seed": 42, "dataset.overlong": "drop",
    }),
    "axolotl_dpo.yml": ("axolotl", {
        "train.objective": "dpo", "model.load_in_8bit": True, "adapter.target_modules": "all-linear",
        "train.epochs": 4, "adapter.alpha": 16, "dataset.val_size": 0.0, "train.gradient_accumulation_steps": 1,
    }),
    "sft.yaml": ("LLaMA-Factory", {
        "rank.init": 8, "rank.budget": 8, "adapter.alpha": 16, "adapter.target_modules": "all-linear",
        "train.epochs": 3, "train.learning_rate": 1e-4, "model.dtype": "bfloat16", "train.save_steps": 500,
        "model.trust_remote_code": False, "dataset.val_size": 0.0, "train.gradient_checkpointing": True,
    }),
    "trl.yaml": ("TRL", {
        "rank.budget": 8, "adapter.alpha": 32, "adapter.scaling": "rslora", "adapter.target_modules": "qv",
        "train.learning_rate": 1e-4, "train.epochs": 3, "train.micro_batch_size": 8, "adapter.dropout": 0.05,
        "train.warmup_ratio": 0.0, "dataset.max_length": 1024, "train.report_to": [],
    }),
    "trl_dpo.sh": ("TRL", {
        "model.name_or_path": "Qwen/Qwen2.5-0.5B", "train.objective": "dpo", "train.beta": 0.2, "train.loss_type": "ipo",
        "adapter.target_modules": ["q_proj", "v_proj"], "train.learning_rate": 1e-6, "train.lr_scheduler": "linear",
    }),
    "torchtune.yaml": ("torchtune", {
        "model.name_or_path": "/tmp/Llama-3.2-1B-Instruct/", "rank.budget": 64, "adapter.alpha": 128,
        "adapter.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "train.warmup_steps": 100, "train.max_steps": 100, "train.weight_decay": 0.01, "train.max_grad_norm": None,
        "train.micro_batch_size": 4, "train.gradient_accumulation_steps": 8, "model.dtype": "bfloat16",
    }),
    "ms_swift.sh": ("ms-swift", {
        "rank.budget": 8, "adapter.alpha": 32, "adapter.dropout": 0.05, "train.weight_decay": 0.1,
        "train.gradient_accumulation_steps": 16, "train.micro_batch_size": 1, "train.lr_scheduler": "cosine",
        "dataset.overlong": "drop", "model.dtype": "bfloat16", "train.epochs": 1,
    }),
    "unsloth.yaml": ("Unsloth", {
        "rank.budget": 64, "adapter.alpha": 16, "model.load_in_4bit": True, "dataset.train_on": "all",
        "adapter.target_modules": ["q_proj", "k_proj"], "train.warmup_steps": 5, "train.report_to": ["wandb"],
        "train.micro_batch_size": 2, "train.optimizer": "adamw_8bit",
    }),
    "unsloth_notebook.ipynb": ("Unsloth", {
        "model.name_or_path": "unsloth/Llama-3.2-1B", "dataset.max_length": 512, "train.max_steps": 60, "seed": 3407,
        "rank.budget": 16, "dataset.train_on": "auto", "model.load_in_4bit": True, "train.weight_decay": 0.0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("path", EACH, ids=lambda path: path.name)
def test_what_a_file_says_and_what_its_tool_does_unasked(path: Path):
    tool, wanted = WANTED[path.name]
    found = convert(path)
    values = flat(recipe_of(found).model_dump(mode="json"))
    assert found.tool == tool
    assert {key: values[key] for key in wanted} == wanted


def test_rows_keep_their_format_columns_and_number():
    rows = {path.name: recipe_of(convert(path)).dataset.train for path in EACH}
    assert [(one.path, one.format) for one in rows["axolotl.yml"]] == [("teknium/GPT4-LLM-Cleaned", "alpaca")]
    assert rows["axolotl_dpo.yml"][0].columns == {"messages": "conversation"}
    first, second = rows["sft.yaml"]
    assert (first.path, first.rows, second.path) == ("data/identity.json", 1000, "llamafactory/alpaca_en")
    assert second.columns == {"instruction": "ask"}
    assert [(one.path, one.rows) for one in rows["ms_swift.sh"]] == [
        ("AI-ModelScope/alpaca-gpt4-data-zh", 500),
        ("swift/self-cognition", 500),
    ]
    assert rows["torchtune.yaml"][0].path == "yahma/alpaca-cleaned"


LOST = [
    ("axolotl.yml", "neftune_noise_alpha", "lost", "no noise on embeddings"),
    ("axolotl.yml", "some_new_key", "lost", "not known to dynlora as a key of axolotl"),
    ("axolotl.yml", "evals_per_epoch", "lost", "eval.steps"),
    ("axolotl.yml", "lora_model_dir", "needless", "empty"),
    ("axolotl.yml", "special_tokens.pad_token", "needless", "padding carries no loss"),
    ("sft.yaml", "template", "lost", "the tokenizer's own chat template"),
    ("sft.yaml", "trust_remote_code", "differs", "runs no code of others unasked"),
    ("ms_swift.sh", "system", "converted", "dataset.system: 'You are a helpful"),
    ("torchtune.yaml", "tokenizer.path", "needless", "the folder of the base has its tokenizer"),
    ("unsloth_notebook.ipynb", "train.fp16", "lost", "only running the file would tell its value"),
    ("trl_dpo.sh", "output_dir", "converted", "output_dir: 'out/$RUN'"),
]


@pytest.mark.parametrize(("name", "key", "kind", "text"), LOST)
def test_what_has_no_equivalent_is_named_with_its_line(name: str, key: str, kind: str, text: str):
    path = next(path for path in EACH if path.name == name)
    found = convert(path)
    actual, line, says = found_at(found, key)
    assert (actual, text in says) == (kind, True), says
    assert line is not None
    if path.suffix in (".yml", ".yaml", ".sh"):
        assert key.rpartition(".")[2] in path.read_text().splitlines()[line - 1]
    if kind != "needless":
        assert any(key in text for text in found.text("dynlora train r.yaml").splitlines()) or kind == "converted"


def test_nothing_of_a_file_is_run_and_no_path_of_it_is_followed(tmp_path: Path):
    convert(FOREIGN / "unsloth_notebook.ipynb")
    assert not Path("/tmp/nobody-runs-this").exists()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "dataset_info.json").write_text('{"mine": {"hf_hub_url": "a/b"}}', encoding="utf-8")
    inside = tmp_path / "config"
    inside.mkdir()
    text = (FOREIGN / "llama_factory" / "sft.yaml").read_text().replace("identity,alpaca_en_demo", "mine")
    for folder in ("../secret", str(tmp_path / "secret")):
        found, recipe = converted(inside, "sft.yaml", f"{text}dataset_dir: {folder}\n")
        assert recipe.dataset.train[0].path == "mine"
        assert "no dataset_info.json lies beside the file" in found_at(found, "dataset")[2] or any(
            "no dataset_info.json" in one.text for one in found.findings
        )
    tagged = "base_model: a/b\nsequence_len: 64\ndatasets: [{path: a/c}]\nx: !!python/name:os.system run\n"
    found, _ = converted(tmp_path, "a.yml", tagged)
    assert any("tag" in one.text for one in found.of_kind("lost"))


AXOLOTL = "base_model: a/b\ndatasets: [{path: a/c}]\nsequence_len: 64\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"


def test_a_value_that_does_not_go_is_listed_and_the_rest_stays(tmp_path: Path):
    found, recipe = converted(tmp_path, "a.yml", f"{AXOLOTL}learning_rate: 7\nmicro_batch_size: 3\n")
    assert found_at(found, "learning_rate")[0] == "lost"
    assert (recipe.train.learning_rate, recipe.train.micro_batch_size) == ("auto", 3)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["[]", "{a: 1}", "x y", "0", ".inf"])
@pytest.mark.parametrize(
    "path", [path for path in EACH if path.suffix in (".yml", ".yaml")], ids=lambda path: path.name
)
def test_any_value_is_listed_or_refused(path: Path, value: str, tmp_path: Path):
    lines = path.read_text().splitlines()
    for at, line in enumerate(lines):
        if match := re.match(r"([\w ]+:) \S", line):
            text = "\n".join([*lines[:at], f"{match[1]} {value}", *lines[at + 1 :]])
            with suppress(UsageError):  # or a recipe
                found, _ = converted(tmp_path, path.name, text)
                listed = {one.entry.key for one in found.findings}
                assert set(read_foreign(tmp_path / path.name).entries) <= listed, text


def test_pissa_keeps_its_rank_and_its_scale(tmp_path: Path):
    _, recipe = converted(tmp_path, "a.yml", f"{AXOLOTL}peft_init_lora_weights: pissa\n")
    assert (recipe.rank.init, recipe.rank.budget, recipe.adapter.alpha) == (8, 16, 32)


SWIFT = "swift sft --model a/b --dataset c/d --per_device_train_batch_size 4"
SCRIPT = """
from peft import LoraConfig
from trl import {kind}Config, {kind}Trainer
args = {kind}Config({more})
{kind}Trainer(model="a/b", args=args, train_dataset=load_dataset("c/d"), peft_config=LoraConfig(r=4))
"""
TUNE = """
model: {{_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_attn_modules: [q_proj], lora_rank: 4}}
checkpointer: {{checkpoint_dir: a/b}}
dataset: {{_component_: torchtune.datasets.{builder}}}
optimizer: {{_component_: torch.optim.AdamW}}
"""
UNASKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "16 rows a step": ("s.sh", SWIFT, {"train.gradient_accumulation_steps": 4, "train.learning_rate": 1e-4}),
    "a rate of its own": ("s.sh", f"{SWIFT} --train_type full", {"train.learning_rate": 1e-5}),
    "a loss that is named": (
        "s.py",
        SCRIPT.format(kind="SFT", more="completion_only_loss=True"),
        {"dataset.train_on": "completion", "model.name_or_path": "a/b", "adapter.target_modules": "qv"},
    ),
    "ORPO's rate": (
        "s.py",
        SCRIPT.format(kind="ORPO", more="beta=0.2"),
        {"train.objective": "orpo", "train.learning_rate": 1e-6},
    ),
    "prompts": ("t.yaml", TUNE.format(builder="alpaca_cleaned_dataset"), {"dataset.train_on": "all"}),
    "a rank": (
        "t.yaml",
        TUNE.format(builder="samsum_dataset").replace(", lora_rank: 4", ""),
        {"rank.init": 8, "rank.budget": 8, "adapter.alpha": 16},
    ),
    "answers": ("t.yaml", TUNE.format(builder="samsum_dataset"), {"dataset.train_on": "auto"}),
}


@pytest.mark.parametrize("case", UNASKED)
def test_what_a_tool_does_unasked_depends_on_what_it_is_told(case: str, tmp_path: Path):
    name, text, wanted = UNASKED[case]
    values = flat(converted(tmp_path, name, text)[1].model_dump(mode="json"))
    assert {key: values[key] for key in wanted} == wanted


REFUSED = {
    "rewards": ("g.sh", "trl grpo --model_name_or_path a --dataset_name b --reward_funcs c\n", "rewards"),
    "pictures": ("l.yaml", "model_name_or_path: a\nstage: sft\ndataset: b\nimage_max_pixels: 9\n", "pictures"),
    "merging": ("m.yaml", "model_name_or_path: a\nadapter_name_or_path: b\ntemplate: c\nexport_dir: d\n", "merging"),
    "another tuner": ("o.yaml", "model_name_or_path: a\nstage: sft\ndataset: b\nfinetuning_type: oft\n", "oft"),
    "Megatron": ("s.sh", "megatron sft --model a --dataset b\n", "Megatron"),
    "another file": ("c.sh", "trl sft --config my.yaml\n", "it trains with my.yaml"),
    "a teacher": ("t.yaml", "model: {_component_: torchtune.a}\nteacher_model: {_component_: b}\n", "teacher"),
    "no rows": ("n.yml", "base_model: a/b\nsequence_len: 64\nadapter: lora\n", "names no rows"),
    "no tool": ("x.yaml", "alpha: 1\nbeta: 2\n", "of no tool that is known"),
    "no command": ("y.sh", "echo hello\n", "no command of a tool that is known"),
    "no YAML": ("z.yaml", "a: [1\n", "not valid YAML"),
    "an open quote": ("q.sh", "swift sft --model 'a\n", "not to be read as a shell script"),
    "no kind": ("k.toml", "a = 1\n", "no configuration that is known by its name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_dynlora_does_not_train_is_refused_in_words(case: str, tmp_path: Path):
    name, text, says = REFUSED[case]
    with pytest.raises(UsageError) as error:
        converted(tmp_path, name, text)
    assert says in error.value.message
    assert error.value.hint


def test_the_switch_of_a_template_is_one_of_its_variables(tmp_path: Path):
    text = (FOREIGN / "llama_factory" / "sft.yaml").read_text() + "enable_thinking: false\ndefault_system: Be kind.\n"
    _, recipe = converted(tmp_path, "sft.yaml", text)
    assert (recipe.dataset.chat_template_kwargs, recipe.dataset.system) == ({"enable_thinking": False}, "Be kind.")


def test_signs_that_yaml_does_not_take_bare_are_written_as_escapes(tmp_path: Path):
    text = f'{AXOLOTL}"a\\x07\\u202e": 1\nlora_target_modules: ["q\\x07ä"]\n'.replace("a/c", '"a\\x1bc"')
    found, recipe = converted(tmp_path, "a.yml", text)
    assert recipe.adapter.target_modules == ["q\x07ä"]
    assert recipe.dataset.train[0].path == "a\x1bc"
    assert "a\\x07\\u202e: 1" in found.text("dynlora train r.yaml")


def test_a_key_of_some_other_section_is_not_the_runs(tmp_path: Path):
    found, recipe = converted(
        tmp_path, "a.yml", f"{AXOLOTL}hatchery: {{lora_rank: 99, lr: 0.5}}\nlearning_rate: 0.001\n"
    )
    assert (recipe.rank.budget, recipe.train.learning_rate) == (8, 0.001)
    assert {found_at(found, f"hatchery.{key}")[0] for key in ("lora_rank", "lr")} == {"lost"}


def test_a_token_is_shown_nowhere(tmp_path: Path):
    found, _ = converted(tmp_path, "a.yml", f"{AXOLOTL}hub_token: hf_abcdefghijkl\n")
    assert "hf_abcdefghijkl" not in found.text("dynlora train r.yaml") + json.dumps(
        [one.as_data for one in found.findings]
    )


def test_rows_and_model_can_be_named_in_place_of_the_files(tmp_path: Path):
    _, recipe = converted(tmp_path, "n.yml", AXOLOTL, model="builtin:tiny", data="builtin:stdlib-docs")
    assert (recipe.model.name_or_path, recipe.dataset.train[0].path) == ("builtin:tiny", "builtin:stdlib-docs")


@pytest.mark.parametrize("name", plugins.names("importers"))
def test_lines_of_the_tables_lead_to_keys_that_exist(name: str):
    from dynlora_cli.config import foreign_names

    for key, alias in foreign_names.keys_of(name).items():
        assert alias.here.partition(":")[0] in own_keys().values() or (not alias.here and alias.remark), key


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_and_writes(dynlora: Dynlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    answer = dynlora("init", "--from", FOREIGN / "axolotl.yml", "--json")
    assert answer.code == 0, answer.err
    assert "read as axolotl" in answer.err
    assert {"key": "lora_r", "value": 16, "line": 12, "kind": "converted", "text": "rank.init: 16"} in answer.json[
        "keys"
    ]
    assert load_recipe(Path("recipe.yaml")).rank.budget == 16
    again = dynlora("init", "--from", FOREIGN / "axolotl.yml")
    assert (again.code, "recipe.yaml exists" in again.err) == (2, True)
    for wrong in (
        ("--from", "no.yml"),
        ("--from-tool", "trl"),
        ("--from", FOREIGN / "trl.yaml", "--from-tool", "peft"),
    ):
        assert dynlora("init", *wrong, "--out", "other.yaml").code == 2
    assert not Path("other.yaml").exists()


@pytest.mark.slow
def test_a_converted_recipe_is_planned(dynlora: Dynlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {number}.", "output": f"{number}"} for number in range(20)]
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    names = ("rows.json", "--model", "builtin:tiny")
    assert dynlora("init", *names, "--from", FOREIGN / "ms_swift.sh", "--out", "r.yaml").code == 0
    planned = dynlora("train", "r.yaml", "--dry-run")
    assert planned.code == 0, planned.err
