"""axolotl's YAML.

What it does
    Turns the file that `axolotl train` takes into a recipe.

When to use it
    To move over from axolotl.

Reference
    axolotl's schemas, https://docs.axolotl.ai/docs/config-reference.html.
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import ForeignFile
from dynlora_cli.drafts.importer import Move, listed, number, whole_number

NAME = "axolotl"
READS = "yaml"
DEFAULTS = {
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "val_set_size": 0.0,
    "seed": 42,
    "output_dir": "./model-out",
    "lora_dropout": 0.0,
}
KEYS = """
bnb_config_kwargs.bnb_4bit_quant_type  model.bnb_4bit_quant_type
bnb_config_kwargs.bnb_4bit_use_double_quant  model.bnb_4bit_use_double_quant
adapter                       adapter.variant; lora here, and full where axolotl has no adapter
num_epochs                    train.epochs
micro_batch_size              train.micro_batch_size
model_type                    -the model's own config says it
tokenizer_*                   -the model's own tokenizer is used
is_*_derived_model            -the model's own config says it
processor_type                !dynlora trains on text, the language part of a model that sees or hears
base_model_config             -the model's own config is read
base_model_ignore_patterns    -only what is needed of a repository is read
tokenizer_config              !the tokenizer is the model's; name a folder that has both as `model.name_or_path`
chat_template                 !the tokenizer's own template is used; `dataset.chat_template` for another
default_system_message        dataset.system
hub_*                         !adapters are not uploaded from training
dataset_prepared_path         -rows of large files are kept by themselves (dataset.cache)
dataset_num_proc              -large files are read on all cores (dataset.workers)
dataset_keep_in_memory        -rows are in memory
dataset_shard_*               !all rows are read; `rows` of an item takes some
skip_prepare_dataset          -rows are read anew in seconds
dataset_exact_deduplication   !rows that are there twice are trained on twice
dataloader_*                  -rows are in memory
eval_sample_packing           -packing does not change what is measured
pad_to_sequence_len           -batches are padded to their longest row
group_by_length               -rows of similar length always share a batch
multipack_real_batches        -packed examples never see each other
sample_packing_*              -how examples are packed does not change what is trained
total_num_tokens              -counted, not estimated
flash_attention               model.attn_implementation: flash_attention_2
flex_attention                model.attn_implementation: flex_attention
eager_attention               model.attn_implementation: eager
s2_attention                  !there is no shifted sparse attention
flash_attn_*                  -loss and layers are fused already
unsloth_*                     -loss and layers are fused already
lora_*_kernel                 -loss and layers are fused already
use_kernels                   -loss and layers are fused already
use_*moe                      -how experts are computed does not change what is trained
experts_implementation        -how experts are computed does not change what is trained
plugins                       !kernels of plugins change nothing of the result; anything else they bring is lost
liger_*                       -loss and layers are fused already
cut_cross_entropy             -loss and layers are fused already
chunked_cross_entropy         -loss and layers are fused already
tiled_mlp                     -how a layer is computed does not change what is trained
gradient_checkpointing_kwargs*  -how activations are computed again does not change what is trained
torch_compile_backend         -the way of compiling does not change what is trained
torch_compile_mode            -the way of compiling does not change what is trained
lora_fan_in_fan_out           -known from the layer's class
lora_on_cpu                   -the model is read and merged tensor by tensor
merge_lora                    -dynlora merge does that
lora_target_parameters        !the fused weights of experts; `adapter.target_modules: experts` adapts all of them
peft_layer*                   !name layers with globs in `adapter.target_modules`; none is repeated
peft                          !settings of PEFT of its own
relora*                       !ReLoRA has no equivalent
unfrozen_parameters           !only the adapters train, or with `adapter.variant: full` all of the model
gptq                          !a base in GPTQ is read as it is stored, if at all
quantize_moe_experts          -a base in 4 bits has its experts in 4 bits where their layers are linear
low_cpu_mem_usage             -the model is read tensor by tensor
device_map                    -the model lies on the device that trains
device                        -the machine's device is found
max_memory                    -`dynlora train --dry-run` says what fits
gpu_memory_limit              -`dynlora train --dry-run` says what fits
ddp*                          -give `--devices N` on the command line
fsdp_*                        -with `train.shard_base: true` layers are sharded as they need it
dp_*                          -give `--devices N` on the command line
*_parallel_size               !there is no such parallelism; the result is the same without
sequence_parallel_degree      !there is no sequence parallelism; the result is the same without
heads_k_stride                -of parallelism that is not used
ring_attn_func                -of parallelism that is not used
float16                       model.dtype: float16
bfloat16                      model.dtype: bfloat16
fp8*                          !there is no training in fp8
lr_div_factor                 !the course of the rate has no further settings
cosine_min_lr_ratio           !the rate falls to nearly 0
cosine_constant_lr_ratio      !the course of the rate has no further settings
lr_scheduler_kwargs           !the course of the rate has no further settings
lr_quadratic_warmup           !the rate rises evenly
lr_groups                     !one rate for all; `train.lora_plus_ratio` for B
loraplus_lr_embedding         !new tokens learn at the rate of the run
embedding_lr*                 !new tokens learn at the rate of the run
optim_*                       !AdamW with its usual numbers
adam_*                        !AdamW with its usual numbers
torchao_optimizer_*           !AdamW with its usual numbers
neftune_noise_alpha           !there is no noise on embeddings
noisy_embedding_alpha         !there is no noise on embeddings
label_smoothing_factor        !the targets are not smoothed
loss_watchdog_*               -a run with a loss that is no number ends by itself
save_*                        -checkpoints are for going on after a stop; the adapter is saved at the end
saves_per_epoch               -checkpoints are for going on after a stop: every 10 minutes and at each evaluation
evals_per_epoch               !held-out rows are measured after every epoch, or every `eval.steps`
eval_strategy                 -held-out rows are measured after every epoch, or every `eval.steps`
eval_table_size               -`eval.samples` shows answers
eval_max_new_tokens           -`eval.samples` shows at most 64 tokens
do_*_eval                     !`dynlora eval --tasks` measures with a trained adapter
eval_batch_size               -evaluation takes `train.micro_batch_size`, and its numbers do not depend on it
include_*                     -always
logging_steps                 train.log_steps
profiler_steps                -nothing of the result depends on it
wandb_*                       -set by wandb's own variables of the environment
mlflow_*                      -set by MLflow's own variables of the environment
comet_*                       !Comet is no tracker here
swanlab_*                     !SwanLab is no tracker here
use_swanlab                   !SwanLab is no tracker here
use_wandb                     train.report_to: [wandb]
use_comet                     !Comet is no tracker here
use_trackio                   train.report_to: [trackio]
trackio_*                     -set by trackio's own variables of the environment
strict                        -unknown keys are errors
debug                         -nothing of the result depends on it
gc_steps                      -nothing of the result depends on it
auto_find_batch_size          -`dynlora train --dry-run` says what fits
trust_remote_code             !code of others runs only where the recipe says `model.trust_remote_code: true`
train_on_eos                  -the token that ends an answer trains, as there by default
overrides_of_model_config*    !the model's own config is used
eot_tokens                    -the token that ends a turn trains as the template has it
qat*                          !there is no training for another quantization
experimental_skip_move_to_device  -the model is read tensor by tensor
eta_min                       !the rate falls to nearly 0
tokens.*                      !the tokenizer's own tokens are used
model_config.*                !the model's own config is used
rope_*                        !the model's own config is used
min_sample_len                !short rows are trained on
process_reward_model          !there is no process reward model
excess_length_strategy        dataset.overlong
use_dynamic_finetuning        !the loss is plain cross-entropy
dft_*                         !the loss is plain cross-entropy
use_eaft                      !the loss is plain cross-entropy
bench_*                       !`dynlora eval --tasks` measures with a trained adapter
dpo_norm_loss                 !`train.loss_type: sigmoid_norm`
remove_unused_columns         -columns that are not read are named
"""
PICTURES = ("image_size", "image_resize_algorithm", "is_multimodal")
FORMATS = {
    "alpaca": "alpaca", "alpaca_w_system": "alpaca", "alpaca_chat": "alpaca", "gpteacher": "alpaca",
    "chat_template": "chat", "sharegpt": "chat", "chatml": "chat", "llama3": "chat",
    "completion": "text", "pretrain": "text",
}  # fmt: skip
FIELDS = {
    "field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected", "field_prompt": "prompt",
    "field_completion": "completion", "field_label": "label", "field_system": "system", "field_tools": "tools",
}  # fmt: skip
HINTS = {
    "grpo": "dynlora trains with rows, not with rewards; recipes/trainers/grpo.py has rank control in TRL's GRPO",
    "ipo": "write `rl: dpo` with `dpo_loss_type: ipo`",
    "simpo": "`rl: orpo` needs no reference either",
}


def recognises(file: ForeignFile) -> bool:
    """Whether the file has axolotl's names of the model, the rows or the length."""
    return file.has("base_model") and file.has(
        "sequence_len", "micro_batch_size", "datasets", "sample_packing", "num_epochs", "pretraining_dataset", "adapter"
    )


def convert(move: Move) -> None:
    """Objective, rows, adapter and schedule."""
    common.refuse_pictures(move, PICTURES)
    for key in ("reward_model", "process_reward_model", "diffusion"):
        if move.value(key):
            move.refuse(key, f"`{key}` has no equivalent", "dynlora trains with sft, dpo, orpo and kto")
    if move.value("rl"):
        common.objective(move, "rl", move.value("rl"), HINTS)
    _rows(move)
    _adapter(move)
    common.precision(move, "bf16", "fp16")
    common.epochs(move, "num_epochs", decides=not move.value("max_steps"))
    rows, whole = whole_number(move.value("micro_batch_size")), whole_number(move.value("batch_size"))
    if rows and whole and not move.has("gradient_accumulation_steps"):
        move.give("train.gradient_accumulation_steps", max(1, whole // rows), "batch_size")
    if move.value("rl") == "orpo" and move.has("orpo_alpha"):
        move.give_number("train.beta", "orpo_alpha")
    common.scheduler(move, "lr_scheduler")
    common.warm_up(move, "warmup_steps", "warmup_ratio")
    if not (move.has("warmup_steps") or move.has("warmup_ratio")):
        move.unasked["train.warmup_ratio"] = (0.03, "axolotl's own default, at most 100 steps")
    common.optimizer(move, "optimizer")
    common.checkpointing(move, "gradient_checkpointing")
    if move.value("activation_offloading"):
        move.give("train.gradient_checkpointing", "offload", "activation_offloading")
    if (clip := number(move.value("max_grad_norm"))) is not None and move.has("max_grad_norm"):
        move.give("train.max_grad_norm", clip if clip > 0 else None, "max_grad_norm")
    if move.has("wandb_project"):
        move.give("train.report_to", ["wandb"], "wandb_project", differs="its name comes from WANDB_PROJECT")
    for key in ("eval_steps", "save_steps"):
        if move.has(key) and (whole_number(move.value(key)) or 0) < 1:
            move.say(
                key, "lost" if key == "eval_steps" else "needless", "a share of the run; steps are whole numbers here"
            )
    if move.value("special_tokens") is None and any(key.startswith("special_tokens.") for key in move.file.entries):
        for key in move.file.entries:
            if key.startswith("special_tokens."):
                _special(move, key)
    if move.value("train_on_inputs") is False:
        move.needless("answers alone carry loss, as here", "train_on_inputs")
    if isinstance(length := move.value("excess_length_strategy"), str):
        ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(length)
        if ours:
            move.give("dataset.overlong", ours, "excess_length_strategy")
    elif not move.has("excess_length_strategy"):
        move.unasked["dataset.overlong"] = ("drop", "axolotl leaves longer rows out")


def _special(move: Move, key: str) -> None:
    """A token with a role; one that the tokenizer has already changes nothing but the padding."""
    role = key.rpartition(".")[2]
    if role == "pad_token":
        move.say(key, "needless", "padding carries no loss")
    else:
        move.say(key, "lost", "the tokenizer's own tokens are used; name new ones in `adapter.new_tokens`")


def _rows(move: Move) -> None:
    """datasets, test_datasets, pretraining_dataset."""
    for key in ("datasets", "pretraining_dataset"):
        if sources := _sources(move, key):
            move.give("dataset.train", sources, key)
            move.findings.pop()
    if sources := _sources(move, "test_datasets"):
        move.give("dataset.val", sources, "test_datasets")
        move.needless("there are `test_datasets`", "val_set_size")
    elif move.has("val_set_size"):
        common.held_out(move, "val_set_size", move.value("val_set_size"))
    else:
        common.nothing_held_out(move)


def _sources(move: Move, key: str) -> list[dict[str, Any]]:
    """The items of a list of data sets; each of their keys is listed."""
    items = move.value(key)
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, list):
        return []
    found = [_source(move, key, {"path": one} if isinstance(one, str) else one) for one in items]
    return [one for one in found if one]


def _source(move: Move, key: str, item: Any) -> dict[str, Any] | None:
    if not isinstance(item, dict):
        move.say(key, "lost", f"an item that names no data set: {item!r}")
        return None
    item = dict(item)
    files = item.pop("data_files", None)
    path = files[0] if isinstance(files, list) and files else files or item.pop("path", None)
    item.pop("path", None)
    if not isinstance(path, str) or not path:
        move.say(key, "lost", "an item that names no path")
        return None
    source: dict[str, Any] = {"path": path}
    if isinstance(files, list) and len(files) > 1:
        move.say(key, "lost", f"{path}: further files, {', '.join(map(str, files[1:]))}: write an item for each")
    _format(move, key, item.pop("type", None), source)
    columns = source.setdefault("columns", {})
    for theirs, ours in FIELDS.items():
        if (value := item.pop(theirs, None)) is not None and value != ours:
            columns[ours] = value
    if (field := item.pop("field", None)) and field != "text":
        columns["text"] = field
    for name in ("split", "name"):
        if (value := item.pop(name, None)) is not None and not (name == "split" and value == "train"):
            source[name] = value
    if "messages" in columns and columns["messages"] == "conversations":
        columns.pop("messages")  # known by that name
    if not columns:
        source.pop("columns")
    for name, value in item.items():
        _item_key(move, key, path, name, value)
    move.say(key, "converted", f"dataset: {source}")
    return source


_ITEM = {
    "ds_type": "", "roles": "", "roles_to_train": "", "message_property_mappings": "", "message_field_role": "",
    "message_field_content": "", "train_on_eos": "", "trust_remote_code": "", "conversation": "", "chat_template": "",
    "train_on_split": "", "num_proc": "", "skip": "", "streaming": "", "drop_system_message": "it is kept",
}  # fmt: skip


_ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt"), "system": ("system",), "tool": ("tool",)}


def _item_key(move: Move, key: str, path: str, name: str, value: Any) -> None:
    """A key of an item that is not converted: nothing where the rows are read the same, else a loss."""
    if value in (None, False, [], {}):
        return
    usual = {"roles_to_train": (["assistant"], ["gpt", "assistant"], ["gpt"]), "train_on_eos": ("turn", "all"),
             "message_field_role": ("role", "from"), "message_field_content": ("content", "value"),
             "chat_template": ("tokenizer_default",)}  # fmt: skip
    known = name in ("ds_type", "conversation", "trust_remote_code", "train_on_split", "num_proc", "streaming")
    if name == "message_property_mappings" and isinstance(value, dict):
        known = value.get("role") in (None, "role", "from") and value.get("content") in (None, "content", "value")
    if name == "roles" and isinstance(value, dict):
        known = all(one in _ROLES.get(role, ()) for role, words in value.items() for one in listed(words))
    if known or value in usual.get(name, ()):
        move.say(key, "needless", f"{path}: {name}: rows are read so anyway")
    else:
        move.say(key, "lost", f"{path}: {name}: {value!r} has no equivalent for an item of dataset.train")


def _format(move: Move, key: str, kind: Any, source: dict[str, Any]) -> None:
    """`type` of an item: a name with a style behind it, or a mapping of columns."""
    path = source["path"]
    if isinstance(kind, dict):
        fields = {
            "instruction": "field_instruction",
            "input": "field_input",
            "output": "field_output",
            "system": "field_system",
        }
        columns = {ours: kind[theirs] for ours, theirs in fields.items() if kind.get(theirs) not in (None, "", ours)}
        source["format"] = "alpaca"
        source["columns"] = columns
        if kind.get("format") or kind.get("no_input_format") or kind.get("system_prompt"):
            move.say(key, "differs", f"{path}: its own frame around prompts is not written: turns, or bare text")
        return
    if kind is None:
        return
    name, _, style = str(kind).replace(":", ".").partition(".")
    if move.recipe.get("train.objective"):
        source["format"] = "kto" if move.recipe["train.objective"].value == "kto" else "preference"
        if style:
            move.say(
                key, "differs", f"{path}: type {kind}: columns are found by their names; the turns are the template's"
            )
    elif name in FORMATS:
        source["format"] = FORMATS[name]
        if name in ("alpaca", "alpaca_w_system", "gpteacher"):
            text = "its frame (`### Instruction:`) is not written: turns of the chat template, or bare text"
            move.say(key, "differs", f"{path}: {text}")
    elif name == "input_output":
        move.say(key, "lost", f"{path}: type input_output: segments of a row; write turns with `train: false`")
    else:
        move.say(key, "differs", f"{path}: type {kind}: the format is found by the columns (format: auto)")


def _adapter(move: Move) -> None:
    kind = move.value("adapter")
    if kind is None:
        move.give(
            "adapter.variant",
            "full",
            "adapter",
            differs="" if move.has("adapter") else "no adapter is named: all of it trains",
        )
        move.needless("there is no adapter", *(key for key in move.file.entries if key.startswith(("lora_", "peft_"))))
    elif str(kind).lower() not in ("lora", "qlora"):
        move.refuse("adapter", f"adapter: {kind} has no equivalent", "write `adapter: lora`")
    else:
        move.say("adapter", "converted", "adapter.variant: lora, the default")
        common.lora(
            move, "lora_r", "lora_alpha", "lora_dropout", "peft_use_rslora", "peft_use_dora", "peft_init_lora_weights"
        )
        if move.value("lora_target_linear"):
            move.give("adapter.target_modules", "all-linear", "lora_target_linear")
            move.needless("`lora_target_linear` decides", "lora_target_modules")
        else:
            common.targets(move, "lora_target_modules")
    for bits in ("load_in_4bit", "load_in_8bit"):
        if move.has(bits):
            move.give(f"model.{bits}", bool(move.value(bits)), bits) if move.value(bits) else move.needless("off", bits)
    if str(kind).lower() == "qlora" and not (move.value("load_in_4bit") or move.value("load_in_8bit")):
        move.give("model.load_in_4bit", True, "adapter")
