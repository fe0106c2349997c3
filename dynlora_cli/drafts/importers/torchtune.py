"""torchtune's YAML.

What it does
    Turns the file of `tune run lora_finetune_single_device --config FILE` (full, DPO, distributed as well) into a
    recipe. The folder that `tune download` filled is a base that dynlora reads.

When to use it
    To move over from torchtune, which is no longer developed.

Reference
    torchtune's recipes and datasets, https://docs.pytorch.org/torchtune.
"""

from __future__ import annotations

import re
from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import ForeignFile
from dynlora_cli.drafts.importer import Move, listed, whole_number

NAME = "torchtune"
READS = "yaml"
DEFAULTS = {
    "gradient_accumulation_steps": 1,
    "epochs": 1,
    "shuffle": True,
    "model.lora_rank": 8,
    "model.lora_alpha": 16,
    "model.lora_dropout": 0.0,
    "model.apply_lora_to_mlp": False,
}
KEYS = """
tokenizer.prompt_template     !the tokenizer's own chat template is used; another as `dataset.chat_template`
tokenizer.*                   -the folder of the base has its tokenizer
tokenizer                     -the folder of the base has its tokenizer
checkpointer.*                -the folder of the base is read as a whole
checkpointer                  model.name_or_path
save_adapter_weights_only     -an adapter is what is saved
optimizer_in_bwd              -how the optimizer steps does not change what is trained
optimizer.fused               -how the optimizer steps does not change what is trained
optimizer.betas               !AdamW with its usual numbers
optimizer.eps                 !AdamW with its usual numbers
lr_scheduler.num_cycles       !half a cosine
loss._component_              -cross-entropy of the answers' tokens
loss.*                        !the loss has no such setting
compile                       train.compile
metric_logger._component_     train.report_to
metric_logger.*               -metrics lie in the run folder
log_every_n_steps             train.log_steps
log_peak_memory_stats         -always
log_level                     -nothing of the result depends on it
device                        -the machine's device is found
profiler*                     -nothing of the result depends on it
low_cpu_ram                   -the model is read tensor by tensor
fsdp*                         -with `--devices N` each device has the base, or a part: `train.shard_base`
custom_sharded_layers         -with `train.shard_base: true` layers are sharded as they need it
tensor_parallel*              !there is no tensor parallelism; the result is the same without
data_parallel*                -give `--devices N` on the command line
ac_*                          -how activations are computed again does not change what is trained
batch_size_val                -evaluation takes `train.micro_batch_size`, and its numbers do not depend on it
run_val_every_n_steps         eval.steps
collate_fn                    -batches are padded to their longest row
quantizer.*                   !there is no training for another quantization
fp8*                          !there is no training in fp8
enable_fp8*                   !there is no training in fp8
resume_from_checkpoint        -give `--resume` on the command line
checkpoint_dir                -of the checkpointer
max_filename                  -of the checkpointer
keep_last_n_checkpoints       -a run keeps what `last` and `best` need
save_last_epoch_only          -checkpoints are for going on after a stop
enable_async_checkpointing    -checkpoints are for going on after a stop
save_every_epoch              -checkpoints are for going on after a stop
dataset_val.*                 dataset.val
model.*                       -the model's own config says it
seed                          seed
cudnn_deterministic_mode      -nothing of the result depends on it
ref_checkpointer*             -the reference is the model that the run starts from
"""
# Data sets of the hub that torchtune's builders read, and how.
SETS = {
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca"),
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca"),
    "samsum_dataset": ("Samsung/samsum", {"prompt": "dialogue", "completion": "summary"}),
    "grammar_dataset": ("liweili/c4_200m", {"prompt": "input", "completion": "output"}),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "chat"),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", {"text": "page"}),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", {"text": "article"}),
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired", {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", "preference"),
}  # fmt: skip
FRAMED = (
    "alpaca_cleaned_dataset",
    "alpaca_dataset",
    "samsum_dataset",
    "grammar_dataset",
    "stack_exchange_paired_dataset",
)
ON_PROMPTS = ("alpaca_cleaned_dataset", "alpaca_dataset")  # unless train_on_input is false
GENERAL = {"chat_dataset": "chat", "instruct_dataset": "completion", "text_completion_dataset": "text",
           "preference_dataset": "preference"}  # fmt: skip
PROJECTIONS = {"output_proj": "o_proj"}
LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}


def recognises(file: ForeignFile) -> bool:
    """Whether it names components of torchtune's."""
    return any("torchtune" in str(entry.value) for key, entry in file.entries.items() if key.endswith("_component_"))


def convert(move: Move) -> None:
    """Model, rows, adapter and optimizer."""
    _fill_in(move)
    component = str(move.value("model._component_") or "")
    hints = {"teacher_model._component_": "dynlora has no teacher", "value_checkpointer": "dynlora has no PPO"}
    for key, hint in (hints | {"quantizer._component_": "dynlora trains for no other quantization"}).items():
        if move.file.has(key):
            move.refuse(key, f"`{key}` has no equivalent", hint)
    values = [str(entry.value) for entry in move.file.entries.values()]
    if "vision" in component or "flamingo" in component or any("multimodal" in value for value in values):
        move.refuse("model._component_", f"{component} sees pictures", "dynlora trains on text")
    if not move.file.has("optimizer", "epochs"):
        move.refuse("model._component_", "the file trains nothing", "name one that has an optimizer")
    loss = str(move.value("loss._component_") or "")
    if "rlhf" in loss:
        name = loss.rpartition(".")[2]
        if name != "DPOLoss":
            move.refuse("loss._component_", f"{name} has no equivalent", "dynlora has DPO's losses: train.loss_type")
        move.give("train.objective", "dpo", "loss._component_")
        if move.has("loss.beta"):
            move.give_number("train.beta", "loss.beta")
        if move.value("loss.label_smoothing"):
            move.give_number("train.label_smoothing", "loss.label_smoothing")
        else:
            move.needless("off", "loss.label_smoothing")
    _model(move)
    _rows(move)
    _adapter(move, component)
    _training(move)


def _fill_in(move: Move) -> None:
    """`${output_dir}` stands for the key of that name."""
    for key, entry in list(move.file.entries.items()):
        if isinstance(entry.value, str) and "${" in entry.value:
            text = re.sub(r"\$\{([\w.]+)\}", lambda match: str(move.file.value(match[1]) or match[0]), entry.value)
            move.file.entries[key] = type(entry)(key, text, entry.line, entry.part)


def _model(move: Move) -> None:
    key = "checkpointer.checkpoint_dir"
    folder = move.value(key)
    if not isinstance(folder, str):
        return
    command = re.search(rf"tune download (\S+) --output-dir {re.escape(folder.rstrip('/'))}(?=\s|/)", move.file.text)
    hub = f"the file's comment fills it with {command[1]} of the hub, which can be named instead" if command else ""
    move.give("model.name_or_path", folder, key, remark=hub)
    if kind := move.value("dtype"):
        move.give("model.dtype", move.translated("model.dtype", kind), "dtype")
    if move.value("model.quantize_base"):
        move.give("model.load_in_4bit", True, "model.quantize_base")
    if move.has("adapter_checkpoint") or move.value("checkpointer.adapter_checkpoint"):
        move.lost(
            "write `adapter.from: FOLDER` to go on with an adapter",
            "adapter_checkpoint",
            "checkpointer.adapter_checkpoint",
        )


def _rows(move: Move) -> None:
    for section, here in (("dataset", "dataset.train"), ("dataset_val", "dataset.val")):
        if isinstance(mixture := move.value(section), list):
            move.say(section, "lost", f"a list of {len(mixture)} sets: write them as items of {here}")
        if move.value(f"{section}._component_") is None and move.value(f"{section}.source") is None:
            continue
        if source := _source(move, section, here):
            move.give(
                here, [source], f"{section}._component_" if move.has(f"{section}._component_") else f"{section}.source"
            )
    if move.value("dataset.packed"):
        move.give("dataset.packing", True, "dataset.packed")
    else:
        move.needless("off, as here", "dataset.packed")
    if move.value("shuffle") is False:
        move.give("dataset.shuffle", False, "shuffle")
    else:
        move.needless("on, as here", "shuffle")
    if (length := whole_number(move.value("tokenizer.max_seq_len"))) is not None:
        move.give("dataset.max_length", length, "tokenizer.max_seq_len")
    else:
        move.unasked["dataset.max_length"] = (2048, "torchtune cuts nothing here; longer costs memory")
    if move.value("dataset.train_on_input"):
        move.give("dataset.train_on", "all", "dataset.train_on_input")
    else:
        builder = str(move.value("dataset._component_")).rpartition(".")[2]
        if builder in ON_PROMPTS and not move.has("dataset.train_on_input"):
            move.unasked["dataset.train_on"] = ("all", f"{builder} trains on the prompts too")
        move.needless("off, as here", "dataset.train_on_input")
    common.nothing_held_out(move)


def _source(move: Move, section: str, here: str) -> dict[str, Any] | None:
    """The item of one data set, by its builder or its own keys."""
    builder = str(move.value(f"{section}._component_") or "").rpartition(".")[2]
    path = move.value(f"{section}.source")
    source: dict[str, Any] = {}
    if builder in SETS:
        hub, how = SETS[builder]
        source["path"] = path or hub
        columns = how if isinstance(how, dict) else {}
        form = (
            "preference"
            if "chosen" in columns
            else "text"
            if "text" in columns
            else "completion"
            if columns
            else str(how)
        )
        source |= {"format": form, **({"columns": dict(columns)} if columns else {})}
        if builder in FRAMED:
            text = "its frame around prompts is not written: turns of the chat template, or bare text"
            move.say(f"{section}._component_", "differs", text)
    elif builder in GENERAL or path:
        source = {"path": path, "format": GENERAL.get(builder, "auto")}
        _columns(move, section, source)
    else:
        move.say(f"{section}._component_", "lost", f"rows of {builder}: name them as `{here}`")
        return None
    if source["path"] in ("json", "csv", "text", "parquet"):
        files = listed(move.value(f"{section}.data_files"))
        if not files:
            return None
        source["path"] = files[0]
        move.say(
            f"{section}.data_files", "converted", f"as `path` of the item{'' if len(files) == 1 else ', the first'}"
        )
    split = move.value(f"{section}.split")
    if split and str(split) != "train":
        source["split"] = str(split)
    for name, ours in (("split", "split"), ("subset", "name"), ("name", "name"), ("source", "path")):
        if move.has(f"{section}.{name}"):
            if ours == "name":
                source["name"] = str(move.value(f"{section}.{name}"))
            move.say(f"{section}.{name}", "converted", f"as `{ours}` of the item")
    if isinstance(system := move.value(f"{section}.new_system_prompt"), str):
        source["system"] = system
        text = "as `system` of the item: of rows without one, while there it replaces theirs as well"
        move.say(f"{section}.new_system_prompt", "differs", text)
    if move.value(f"{section}.conversation_style") in ("sharegpt", "openai"):
        move.needless("rows of either form are known", f"{section}.conversation_style")
    else:
        move.lost("an item of dataset.train has no such setting", f"{section}.conversation_style")
    for name in ("prompt_template", "filter_fn"):
        move.lost("an item of dataset.train has no such setting", f"{section}.{name}")
    move.needless("an end-of-text token closes every row", f"{section}.add_eos")
    return source


def _columns(move: Move, section: str, source: dict[str, Any]) -> None:
    """column_map, conversation_column and column."""
    words = {"input": "prompt", "output": "completion"}
    columns = {}
    for key, entry in move.file.entries.items():
        if key.startswith(f"{section}.column_map."):
            ours = key.rpartition(".")[2]
            columns[words.get(ours, ours)] = entry.value
            move.say(key, "converted", "as `columns` of the item")
    for key, ours in (("conversation_column", "messages"), ("column", "text")):
        if move.has(f"{section}.{key}"):
            columns[ours] = move.value(f"{section}.{key}")
            move.say(f"{section}.{key}", "converted", "as `columns` of the item")
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs and theirs != "conversations"}
    if columns:
        source["columns"] = columns


def _adapter(move: Move, component: str) -> None:
    leaf = component.rpartition(".")[2]
    if not leaf.startswith(("lora_", "qlora_", "dora_")) and not move.has("model.lora_rank"):
        move.give(
            "adapter.variant", "full", "model._component_", differs="a component without lora_: all of the model trains"
        )
        move.used |= {key for key in DEFAULTS if key.startswith("model.")}
        return
    if leaf.startswith("qlora_"):
        move.give("model.load_in_4bit", True, "model._component_")
    else:
        move.needless("which model it is, its folder says", "model._component_")
    common.lora(move, "model.lora_rank", "model.lora_alpha", "model.lora_dropout", dora="model.use_dora")
    wanted = [PROJECTIONS.get(str(name), str(name)) for name in listed(move.value("model.lora_attn_modules"))]
    if move.value("model.apply_lora_to_mlp"):
        wanted += ["gate_proj", "up_proj", "down_proj"]
    if "phi" in component:  # whose projections are fused in transformers
        fused = {
            "q_proj": "qkv_proj",
            "k_proj": "qkv_proj",
            "v_proj": "qkv_proj",
            "gate_proj": "gate_up_proj",
            "up_proj": "gate_up_proj",
        }
        wanted = list(dict.fromkeys(fused.get(name, name) for name in wanted))
    if wanted:
        move.give("adapter.target_modules", wanted, "model.lora_attn_modules")
        move.needless("among `adapter.target_modules`", "model.apply_lora_to_mlp")
        move.used.add("model.apply_lora_to_mlp")
    if move.value("model.apply_lora_to_output"):
        move.say(
            "model.apply_lora_to_output",
            "lost",
            "to adapt the output head, name it in `adapter.target_modules`: lm_head",
        )


def _training(move: Move) -> None:
    if (rows := whole_number(move.value("batch_size"))) is not None:
        move.give("train.micro_batch_size", rows, "batch_size")
    steps, epochs = whole_number(move.value("max_steps_per_epoch")), whole_number(move.value("epochs")) or 1
    common.epochs(move, "epochs", decides=not steps)
    if steps:
        move.give("train.max_steps", steps * epochs, "max_steps_per_epoch", remark="of the whole run")
    common.optimizer(move, "optimizer._component_")
    if move.has("optimizer.lr"):
        move.give_number("train.learning_rate", "optimizer.lr")
    adamw = str(move.value("optimizer._component_")).endswith("AdamW")
    if move.has("optimizer.weight_decay"):
        move.give_number("train.weight_decay", "optimizer.weight_decay")
    elif adamw:
        move.unasked["train.weight_decay"] = (0.01, "PyTorch's own default")
    schedule = str(move.value("lr_scheduler._component_") or "")
    if schedule:
        move.give(
            "train.lr_scheduler",
            "cosine",
            "lr_scheduler._component_",
            differs="" if "cosine" in schedule else "cosine here",
        )
    else:
        move.unasked["train.lr_scheduler"] = ("constant", "torchtune has no other course without lr_scheduler")
    if (warm := whole_number(move.value("lr_scheduler.num_warmup_steps"))) is not None:
        move.give("train.warmup_steps", warm, "lr_scheduler.num_warmup_steps")
    else:
        move.unasked["train.warmup_ratio"] = (0.0, "torchtune has no other warm-up")
    if move.value("clip_grad_norm"):
        move.give_number("train.max_grad_norm", "clip_grad_norm")
    else:
        move.unasked["train.max_grad_norm"] = (None, "torchtune does not clip")
        move.needless("off", "clip_grad_norm")
    offload = "enable_activation_offloading"
    if move.value(offload):
        move.give("train.gradient_checkpointing", "offload", offload)
        move.needless(f"{offload} decides", "enable_activation_checkpointing")
    elif move.has("enable_activation_checkpointing"):
        common.checkpointing(move, "enable_activation_checkpointing")
    logger = str(move.value("metric_logger._component_") or "").rpartition(".")[2]
    if logger in LOGGERS:
        move.give("train.report_to", [LOGGERS[logger]], "metric_logger._component_")
    elif logger:
        kind = "needless" if logger in ("DiskLogger", "StdoutLogger") else "lost"
        move.say("metric_logger._component_", kind, "metrics lie in the run folder")
    if whole_number(move.value("seed")) is None:
        move.needless("none is chosen there; 0 here", "seed")
