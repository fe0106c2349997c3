"""TRL's YAML, or a command line of it.

What it does
    Turns the file of `trl sft --config FILE` (dpo, kto), or a script that holds `trl sft ...` or `accelerate launch
    sft.py ...`, into a recipe.

When to use it
    To move over from TRL's command line.

Reference
    TRL's command line, https://huggingface.co/docs/trl/clis, and its SFTConfig, DPOConfig, KTOConfig and ModelConfig.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import ForeignFile
from dynlora_cli.drafts.importer import Move, whole_number
from dynlora_cli.drafts.scripts import TRL_RATES, convert_script

NAME = "TRL"
READS = "yaml shell python"
DEFAULTS = {
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": True,
    "seed": 42,
    "max_length": 1024,
    "assistant_only_loss": False,
    "bf16": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "output_dir": "trainer_output",
    "dataset_test_split": "test",
}
KEYS = """
use_peft                      adapter.variant; without it all of the model trains
dtype                         model.dtype
torch_dtype                   model.dtype
lora_task_type                -the task of the model
lora_dropout                  adapter.dropout
use_bnb_nested_quant          model.bnb_4bit_use_double_quant
bnb_4bit_quant_storage        -how a 4-bit base is stored does not change what is trained
datasets                      dataset.train
dataset_streaming             -rows are read before the first step; `dataset.streaming: true` reads them while training
streaming                     -rows are read before the first step; `dataset.streaming: true` reads them while training
ignore_bias_buffers           -nothing of the result depends on it
eos_token                     !the tokenizer's own end of a turn is used
pad_token                     -padding carries no loss
pad_to_multiple_of            -padding carries no loss
padding_free                  -padding carries no loss
packing_strategy              -how examples are packed does not change what is trained
eval_packing                  -packing does not change what is measured
dataset_batch_size            -rows are in memory
dataset_kwargs                -how rows are prepared is found by their columns
loss_type                     train.loss_type
chat_template_path            dataset.chat_template
attn_implementation           model.attn_implementation
model_init_kwargs             !settings of the model's own
gradient_checkpointing_kwargs  -how activations are computed again does not change what is trained
ref_model_mixup_alpha         !the reference stays the model that the run starts from
sync_ref_model                !the reference stays the model that the run starts from
ref_model_sync_steps          -of a reference that stays as it is
ref_adapter_name              -the reference is the model that the run starts from
model_adapter_name            -there is one adapter
force_use_ref_model           -the reference is the model that the run starts from
disable_dropout               !`adapter.dropout` is what it is; write 0 for none
precompute_ref_batch_size     -the reference is asked in batches that fit
use_logits_to_keep            -no logits of a batch are kept
reference_free                !the reference is the model that the run starts from
f_divergence_type             !the divergence is the reverse KL
f_alpha_divergence_coef       !the divergence is the reverse KL
ld_alpha                      !all tokens of an answer weigh the same
discopop_tau                  !of the loss discopop it is TRL's default
max_completion_length         -prompt and answer together have dataset.max_length tokens
use_weighting                 !pairs weigh the same
tools                         !write them into the rows, as `tools`
config                        -this file
env.*                         -the environment says where a run goes, not what it trains
model.model_name              model.name_or_path
model.pretrained_model_name_or_path  model.name_or_path
model.token                   -set by the hub's own variables of the environment
model.device_map              -the model lies on the device that trains
model.full_finetuning         adapter.variant: full
model.use_gradient_checkpointing  train.gradient_checkpointing
model.load_in_16bit           -16 bits on a GPU that has them
model.load_in_fp8             !there is no base in fp8
model.*                       !a setting of the model's own
lora.model                    -the model above
lora.r                        rank.budget
lora.layers_to_transform      !name layers with globs in `adapter.target_modules`
lora.modules_to_save          !only a classifier head is trained besides the adapters
lora.bias                     !an adapter has no bias
lora.task_type                -the task of the model
lora.random_state             -the run's seed decides
lora.max_seq_length           -of the model above
lora.loftq_config             -empty, or of a start that LoftQ would set
lora.use_gradient_checkpointing  train.gradient_checkpointing
lora.target_parameters        !the fused weights of experts; `adapter.target_modules: experts` adapts all of them
data.data_files               dataset.train
data.*                        !a setting of the data set that is not read
template.tokenizer            -the model's
template.chat_template        !the tokenizer's own chat template is used; another as `dataset.chat_template`
template.*                    !the tokenizer's own chat template is used
responses.trainer             -the trainer above
responses.*                   -the answers' tokens are found by the template itself
quantization.*                -the base computes in `model.dtype`
train.model                   -the model above
train.tokenizer               -the model's
train.processing_class        -the model's
train.args                    -the arguments beside it
train.peft_config             -the LoRA above
train.data_collator           -batches are padded to their longest row
train.train_dataset           -the rows that `load_dataset` reads
train.eval_dataset            !name rows to measure on as `dataset.val`
train.formatting_func         !code that shapes rows: write rows as it would have them
train.compute_metrics         !`dynlora eval` measures
train.callbacks               !code of others is not run
train.remove_unused_columns   -columns that are not read are named
train.skip_prepare_dataset    -rows are read by their columns
train.dataset_kwargs          -rows are read by their columns
train.embedding_learning_rate  !new tokens learn at the rate of the run
concurrency                   -give `--devices N` on the command line
num_processes                 -give `--devices N` on the command line
accelerate_config             -give `--devices N` on the command line
"""
PEFT = {"lora.r": 8, "lora.lora_alpha": 8, "lora.lora_dropout": 0.0}
PEFT |= {"train.learning_rate": 2e-5, "train.max_length": 1024, "train.gradient_checkpointing": True}
NOT_TRAINED = {"grpo": "rewards", "rloo": "rewards", "reward": "a reward model", "ppo": "rewards"}
REWARDED = (
    "reward_funcs",
    "reward_model_name_or_path",
    "num_generations",
    "reward_model_path",
    "teacher_model_name_or_path",
)
OTHERS = ("stage", "finetuning_type", "base_model", "tuner_type", "train_type", "template", "cutoff_len")


def recognises(file: ForeignFile) -> bool:
    """Whether it is a command of TRL's, or has transformers' name of the model and TRL's of the rows."""
    if file.kind == "python":
        return "unsloth" not in file.text.lower() and any(key.startswith(("train.", "lora.")) for key in file.entries)
    if file.kind == "shell":
        return _method(file) != "" or file.words[:1] == ("trl",)
    named = file.has("model_name_or_path") and file.has("dataset_name", "datasets", "dataset_config", "use_peft")
    return named and not file.has(*OTHERS)


def _method(file: ForeignFile) -> str:
    """sft, dpo, kto ... of a command; empty where it is of another tool."""
    if not file.words:
        return ""
    first, *more = file.words
    if first == "trl":
        return more[0] if more else ""
    name = Path(first).stem if first.endswith(".py") else first.rpartition(".")[2] if first.startswith("trl.") else ""
    known = ("sft", "dpo", "kto", "orpo", "grpo", "rloo", "reward", "bco", "cpo", "gkd", "ppo", "online_dpo")
    return name if name in known and not any(word in first for word in ("swift", "axolotl")) else ""


def convert(move: Move) -> None:
    """Method, rows, adapter and the Trainer's arguments."""
    if move.file.kind == "python":
        convert_script(move, PEFT)
        return
    for key in REWARDED:
        if move.file.has(key):
            move.refuse(key, "it trains with rewards or a teacher", "dynlora trains with sft, dpo, orpo and kto")
    method = _method(move.file) or ("dpo" if move.has("beta") else "sft")
    hints = {name: f"dynlora does not train with {what}" for name, what in NOT_TRAINED.items()}
    kind = common.OBJECTIVES.get(method) or common.objective(move, "", method, hints)
    if kind != "sft":
        move.unasked["train.objective"] = (kind, f"trl {method}")
    move.defaults = {**move.defaults, "learning_rate": TRL_RATES[kind]}
    _rows(move, kind)
    if move.file.words or move.has("use_peft") or not any(k.startswith("lora_") for k in move.file.entries):
        _adapter(move)
    else:
        _lora(move)
    common.trainer(move)
    common.loss_type(move, "loss_type", kind)
    if move.has("dtype") or move.has("torch_dtype"):
        move.recipe.pop("model.dtype", None)


def _adapter(move: Move) -> None:
    if move.value("use_peft"):
        move.say("use_peft", "converted", "adapter.variant: lora, the default")
        _lora(move)
        return
    move.give("adapter.variant", "full", "use_peft", differs="without use_peft TRL trains all of the model")
    move.needless("there is no adapter", *(key for key in move.file.entries if key.startswith("lora_")))
    move.used |= {key for key in DEFAULTS if key.startswith("lora_")}


def _lora(move: Move) -> None:
    common.lora(move, "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    if move.has("lora_target_modules"):
        common.targets(move, "lora_target_modules")
    else:
        common.usual_targets(move)


def _rows(move: Move, kind: str) -> None:
    """dataset_name with its splits, or a mixture."""
    mixture = move.value("datasets")
    sources: list[dict[str, Any]] = []
    for item in mixture if isinstance(mixture, list) else ():
        if isinstance(item, dict) and item.get("path"):
            known = {"path": item["path"], "name": item.get("name"), "split": item.get("split")}
            sources.append({name: value for name, value in known.items() if value})
            for name in item.keys() - {"path", "name", "split", "columns", "data_files", "data_dir"}:
                move.say("datasets", "lost", f"{item['path']}: {name} has no equivalent")
    key = "datasets"
    if move.has("dataset_name"):
        key = "dataset_name"
        source: dict[str, Any] = {"path": str(move.value("dataset_name"))}
        for theirs, ours in (("dataset_config", "name"), ("dataset_train_split", "split")):
            if move.has(theirs) and move.value(theirs) != "train":
                source[ours] = str(move.value(theirs))
            move.needless("as `split` and `name` of the item", theirs)
        sources = [source]
    if move.has("dataset_text_field") and sources:
        for source in sources:
            source |= {"format": "text", "columns": {"text": move.value("dataset_text_field")}}
        move.say("dataset_text_field", "converted", "as `columns` of the item")
    if sources:
        move.give("dataset.train", sources, key)
    if move.has("dataset_name") and sources and str(move.value("eval_strategy")).lower() not in ("none", "no", "false"):
        move.give("dataset.val", [{**sources[0], "split": str(move.value("dataset_test_split"))}], "dataset_test_split")
    else:
        move.used.add("dataset_test_split")
        move.needless("nothing is measured without eval_strategy", "dataset_test_split")
        common.nothing_held_out(move)
    if move.value("load_in_4bit") and not move.has("use_bnb_nested_quant"):
        move.unasked["model.bnb_4bit_use_double_quant"] = (False, "TRL's own default")
    _length(move)
    _loss_on(move, kind)


def _length(move: Move) -> None:
    length = next((key for key in ("max_length", "max_seq_length") if move.has(key)), "max_length")
    if (tokens := whole_number(move.value(length))) is not None:
        move.give("dataset.max_length", tokens, length)


def _loss_on(move: Move, kind: str) -> None:
    """Which tokens carry loss."""
    if move.value("completion_only_loss") is not None:
        ours = "completion" if move.value("completion_only_loss") else "all"
        move.give("dataset.train_on", ours, "completion_only_loss")
    if move.value("assistant_only_loss"):
        move.give("dataset.train_on", "assistant", "assistant_only_loss")
    elif kind == "sft" and "dataset.train_on" not in move.recipe:
        move.unasked["dataset.train_on"] = ("auto", "the rows' answers alone carry loss")
        text = "in conversations TRL has loss on all tokens, here on answers; `dataset.train_on: all` is TRL's"
        move.say("assistant_only_loss", "differs", text)
    else:
        move.needless("off", "assistant_only_loss")
