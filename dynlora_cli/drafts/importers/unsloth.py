"""Unsloth's YAML (its command line and Studio), and its scripts and notebooks.

What it does
    Turns the file of `unsloth train --config FILE`, or a script or notebook with `from_pretrained`, `get_peft_model`
    and `SFTConfig`, into a recipe. A script is read as text, and never run: what is no literal in it is named.

When to use it
    To move over from Unsloth, or from any script with TRL and PEFT.

Reference
    Unsloth's unsloth_cli/config.py, and its notebooks.
"""

from __future__ import annotations

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import ForeignFile
from dynlora_cli.drafts.importer import Move, listed, whole_number
from dynlora_cli.drafts.scripts import bits, convert_script, length, script_lora

NAME = "Unsloth"
READS = "yaml python"
DEFAULTS: dict[str, object] = {}
KEYS = """
model                         model.name_or_path
model.model_name              model.name_or_path
model.pretrained_model_name_or_path  model.name_or_path
model.token                   -set by the hub's own variables of the environment
model.device_map              -the model lies on the device that trains
model.full_finetuning         adapter.variant: full
model.fast_inference          -how answers are made does not change what is trained
model.gpu_memory_utilization  -how answers are made does not change what is trained
model.max_lora_rank           -how answers are made does not change what is trained
model.use_gradient_checkpointing  train.gradient_checkpointing
model.unsloth_force_compile   -how layers are computed does not change what is trained
model.load_in_16bit           -16 bits on a GPU that has them
model.load_in_fp8             !there is no base in fp8
model.offload_embedding       -where the table lies does not change what is trained
model.*                       !a setting of the model's own
lora.model                    -the model above
lora.lora_r                   rank.budget
lora.r                        rank.budget
lora.layers_to_transform      !name layers with globs in `adapter.target_modules`
lora.modules_to_save          !only a classifier head is trained besides the adapters
lora.bias                     !an adapter has no bias
lora.task_type                -the task of the model
lora.random_state             -the run's seed decides
lora.max_seq_length           -of the model above
lora.loftq_config             -empty, or of a start that LoftQ would set
lora.use_gradient_checkpointing  train.gradient_checkpointing
lora.finetune_vision_layers   -a model's language part alone trains
lora.finetune_language_layers  -always
lora.finetune_attention_modules  -always, with all linear layers
lora.finetune_mlp_modules     -always, with all linear layers
lora.vision_all_linear        -a model's language part alone trains
lora.use_loftq                adapter.init_weights: loftq
lora.temporary_location       -nothing of the result depends on it
lora.target_parameters        !the fused weights of experts; `adapter.target_modules: experts` adapts all of them
data.format_type              -the format is found by the columns
data.data_files               dataset.train
data.*                        !a setting of the data set that is not read
template.tokenizer            -the model's
template.chat_template        !the tokenizer's own chat template is used; another as `dataset.chat_template`
template.*                    !the tokenizer's own chat template is used
responses.trainer             -the trainer above
responses.*                   -the answers' tokens are found by the template itself
quantization.*                -the base computes in `model.dtype`
training.training_type        adapter.variant
training.train_on_completions  dataset.train_on: completion
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
logging.wandb_token           -set by the environment
logging.hf_token              -set by the environment
logging.wandb_project         -its name comes from WANDB_PROJECT
logging.tensorboard_dir       -metrics lie in the run folder
logging.log_frequency         train.log_steps
inference.*                   -of inference
audio_input                   !dynlora trains on text
vision*                       !dynlora trains on text
"""
# What the command line of Unsloth does where its YAML does not say.
CLI = {
    "training.max_seq_length": 2048, "training.load_in_4bit": True, "training.num_epochs": 3,
    "training.learning_rate": 2e-4, "training.batch_size": 2, "training.gradient_accumulation_steps": 4,
    "training.warmup_steps": 5, "training.weight_decay": 0.01, "training.random_seed": 3407,
    "training.gradient_checkpointing": "unsloth", "training.output_dir": "./outputs", "training.max_steps": 0,
    "training.optim": "adamw_8bit", "training.lr_scheduler_type": "linear",
    "lora.lora_r": 64, "lora.lora_alpha": 16, "lora.lora_dropout": 0.0,
    "lora.target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}  # fmt: skip
# What Unsloth's own loader and get_peft_model do.
FAST = {
    "model.max_seq_length": 2048, "model.load_in_4bit": True, "lora.r": 16, "lora.lora_alpha": 16,
    "lora.lora_dropout": 0.0, "lora.target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}  # fmt: skip


def recognises(file: ForeignFile) -> bool:
    """Whether it has the sections of Unsloth's YAML, or the calls of a script."""
    if file.kind == "python":
        return "unsloth" in file.text.lower() and any(
            key.startswith(("model.", "train.", "lora.")) for key in file.entries
        )
    return file.has("training") and file.has("lora", "data", "logging") and not file.has("base_model")


def convert(move: Move) -> None:
    """A YAML, or a script."""
    if move.file.kind == "python":
        convert_script(move, FAST)
    else:
        _yaml(move)


def _yaml(move: Move) -> None:
    move.defaults = CLI
    if str(move.value("training.training_type") or "lora").lower() == "full":
        move.give("adapter.variant", "full", "training.training_type")
        move.needless("there is no adapter", *(key for key in move.file.entries if key.startswith("lora.")))
    else:
        move.needless("lora, as here", "training.training_type")
        script_lora(move, "lora.lora_r", [])
    if any(move.value(key) for key in ("audio_input", "is_vision", "training.is_vision")):
        move.refuse("audio_input", "its rows hold more than text", "dynlora trains on text")
    length(move, "training.max_seq_length")
    bits(move, "training.load_in_4bit")
    steps = whole_number(move.value("training.max_steps"))
    if steps:
        move.give("train.max_steps", steps, "training.max_steps")
        move.needless("the steps decide", "training.num_epochs")
    else:
        move.say("training.max_steps", "needless", "off: the epochs decide")
        common.epochs(move, "training.num_epochs")
    for theirs, ours in (
        ("batch_size", "micro_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        if (number := whole_number(move.value(f"training.{theirs}"))) is not None:
            move.give(f"train.{ours}", number, f"training.{theirs}")
    for theirs, here in (("learning_rate", "train.learning_rate"), ("weight_decay", "train.weight_decay")):
        if move.value(f"training.{theirs}") is not None:
            move.give_number(here, f"training.{theirs}")
    if (seed := whole_number(move.value("training.random_seed"))) is not None:
        move.give("seed", seed, "training.random_seed")
    common.warm_up(move, "training.warmup_steps", "training.warmup_ratio")
    common.scheduler(move, "training.lr_scheduler_type")
    common.optimizer(move, "training.optim")
    common.checkpointing(move, "training.gradient_checkpointing")
    if move.value("training.packing"):
        move.give("dataset.packing", True, "training.packing")
    if not whole_number(move.value("training.save_steps")):
        move.needless("off", "training.save_steps")
    if move.value("training.train_on_completions"):
        move.needless("answers alone carry loss, as here", "training.train_on_completions")
    else:
        move.unasked["dataset.train_on"] = ("all", "Unsloth's train_on_completions is off")
        move.used.add("training.train_on_completions")
        move.needless("`dataset.train_on: all`", "training.train_on_completions")
    _yaml_rows(move)
    found = [name for name in ("wandb", "tensorboard") if move.value(f"logging.enable_{name}")]
    for name in ("wandb", "tensorboard"):
        if name in found:
            move.give("train.report_to", found, f"logging.enable_{name}")
        else:
            move.needless("off", f"logging.enable_{name}")


def _yaml_rows(move: Move) -> None:
    files = [str(path) for path in listed(move.value("data.local_dataset"))]
    names = [str(move.value("data.dataset"))] if move.value("data.dataset") else files
    form = {"alpaca": "alpaca", "chatml": "chat", "sharegpt": "chat"}.get(str(move.value("data.format_type")))
    if names:
        key = "data.dataset" if move.value("data.dataset") else "data.local_dataset"
        move.give("dataset.train", [{"path": path, **({"format": form} if form else {})} for path in names], key)
    move.needless("as `format` of the item", "data.format_type")
    for theirs, ours in (("subset", "name"), ("train_split", "split")):
        if move.has(f"data.{theirs}") and names:
            move.recipe["dataset.train"].value[0][ours] = move.value(f"data.{theirs}")
            move.say(f"data.{theirs}", "converted", f"as `{ours}` of the item")
    common.nothing_held_out(move)
