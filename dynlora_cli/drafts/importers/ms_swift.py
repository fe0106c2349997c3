"""ms-swift's scripts (`swift sft ...`), YAML or JSON.

What it does
    Turns a script with `swift sft`, `swift pt` or `swift rlhf`, or the file of `--config`, into a recipe. A run's own
    `args.json` can be given as well.

When to use it
    To move over from ms-swift.

Reference
    ms-swift's command line parameters, https://swift.readthedocs.io/en/latest/Instruction/Command-line-parameters.html.
"""

from __future__ import annotations

import math
import re
from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import ForeignFile
from dynlora_cli.drafts.importer import Move, whole_number
from dynlora_cli.files.strict_json import BadJsonError, loads

NAME = "ms-swift"
READS = "yaml shell"
DEFAULTS = {
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": True,
    "seed": 42,
    "split_dataset_ratio": 0.0,
    "max_length": None,
    "output_dir": "output",
}
KEYS = """
model                         model.name_or_path
model_type                    -the model's own config says it
model_revision                model.revision
torch_dtype                   model.dtype
template                      !the tokenizer's own chat template is used; another as `dataset.chat_template`
template_backend              !the tokenizer's own chat template is used
agent_template                !the template writes tools as the model knows them
add_non_thinking_prefix       !write it into the rows, or take a template that has it
response_prefix               !write it into the rows
loss_scale                    !all answers of the assistant carry loss alike
dataset                       dataset.train
cached_dataset                !rows are read anew from their own files
dataset_num_proc              -large files are read on all cores (dataset.workers)
load_from_cache_file          -rows that are kept are read again where anything has changed (dataset.cache)
lazy_tokenize                 -rows are tokenized once
streaming                     -rows are read before the first step; `dataset.streaming: true` reads them while training
strict                        -a row that cannot be read is an error
remove_unused_columns         -columns that are not read are named
columns                       dataset.train
use_hf                        -data sets and models of Hugging Face's hub are read
hub_token                     -set by the hub's own variables of the environment
model_author                  !write it into the rows: the set of self-cognition has placeholders
model_name                    !write it into the rows: the set of self-cognition has placeholders
padding_free                  -padding carries no loss
padding_side                  -padding carries no loss
packing_length                -packed examples are put together up to `dataset.max_length`
packing_cache                 -nothing is cached
packing_num_proc              -one process reads the rows
packing_strategy              -how examples are packed does not change what is trained
attn_impl                     model.attn_implementation
sequence_parallel_size        !there is no sequence parallelism; the result is the same without
sequence_parallel_impl        -of parallelism that is not used
use_logits_to_keep            -no logits of a batch are kept
use_chat_template             dataset.chat
freeze_llm                    !the language part trains
freeze_vit                    -a model's language part alone trains
freeze_aligner                -a model's language part alone trains
freeze_parameters             !only the adapters train, or with `adapter.variant: full` all of the model
freeze_parameters_ratio       !only the adapters train, or with `adapter.variant: full` all of the model
trainable_parameters          !only the adapters train, or with `adapter.variant: full` all of the model
lora_bias                     !an adapter has no bias
lora_dtype                    -adapters train in fp32
lora_ga_*                     !there is no such start
lorap_lr_ratio                train.lora_plus_ratio
use_rslora                    adapter.scaling: rslora, with a number as `alpha`
use_dora                      adapter.variant: dora
target_parameters             !the fused weights of experts; `adapter.target_modules: experts` adapts all of them
quant_method                  model.load_in_4bit; bnb alone
bnb_4bit_compute_dtype        -the base computes in `model.dtype`
bnb_4bit_quant_storage        -how a 4-bit base is stored does not change what is trained
bnb_4bit_quant_type           model.bnb_4bit_quant_type
bnb_4bit_use_double_quant     model.bnb_4bit_use_double_quant
hqq_*                         -of a quantization that is not used
add_version                   -a run folder is refused unless --overwrite or --resume is given
create_checkpoint_symlink     -`checkpoints/last` names the newest
logging_steps                 train.log_steps
external_plugins              !code of others is not run
custom_register_path          !code of others is not run
check_model                   -the model's folder is opened once
device_map                    -the model lies on the device that trains
max_memory                    -`dynlora train --dry-run` says what fits
deepspeed                     -only the adapters have gradients and optimizer state
zero_hpz_partition_size       -of DeepSpeed
ddp_*                         -give `--devices N` on the command line
use_liger_kernel              -loss and layers are fused already
use_dft_loss                  !the loss is plain cross-entropy
enable_dft_loss               !the loss is plain cross-entropy
predict_with_generate         !`dynlora eval --tasks` measures with a trained adapter
metric                        -`dynlora eval` measures
acc_strategy                  -`dynlora eval` measures
eval_use_evalscope            !`dynlora eval --tasks` measures with a trained adapter
eval_limit                    -of an evaluation that is not used
eval_generation_config*       -of an evaluation that is not used
eval_dataset                  !`dynlora eval --tasks` measures with a trained adapter
eval_dataset_args*            -of an evaluation that is not used
num_labels                    model.num_labels
problem_type                  !classes exclude each other
ignore_empty_think            !write it into the rows, or take a template that has it
early_stop_interval           eval.early_stopping_patience
optimizer                     !AdamW trains in its place
galore_*                      -of GaLore
use_galore                    !there is no GaLore
lisa_*                        !there is no LISA
vit_lr                        -a model's language part alone trains
aligner_lr                    -a model's language part alone trains
vit_gradient_checkpointing    -a model's language part alone trains
data_sharding                 -rows come in an order of the seed
center_rewards_coefficient    -of a reward model
max_new_tokens                -of inference
temperature                   -of inference
truncation_strategy           dataset.overlong
init_weights                  adapter.init_weights
swanlab_*                     !SwanLab is no tracker here
save_total_limit              -a run keeps what `last` and `best` need
tuner_backend                 -there is one
callbacks                     !code of others is not run
dataset_shuffle               dataset.shuffle
model_kwargs                  !settings of the model's own
new_special_tokens            adapter.new_tokens
beta                          train.beta
rpo_alpha                     train.sft_weight
cached_val_dataset            !rows are read anew from their own files
router_aux_loss_coef          !experts' balance has no loss of its own
experts_impl                  -how experts are computed does not change what is trained
use_ray                       -where a run goes does not change what it trains
device_groups                 -where a run goes does not change what it trains
"""
HINTS = {
    "grpo": "dynlora trains with rows, not with rewards; recipes/trainers/grpo.py has rank control in TRL's GRPO",
    "simpo": "orpo needs no reference either",
    "cpo": "orpo needs no reference either",
    "rm": "dynlora trains no reward models",
}
PICTURES = ("max_pixels", "image_factor", "sampling_rate")
VARIANTS = {"adalora": "adalora", "lora": "lora", "full": "full"}
TASKS = {"causal_lm": "causal-lm", "seq_cls": "sequence-classification"}


def recognises(file: ForeignFile) -> bool:
    """Whether it is a command of swift's, or has its names of model, tuner and rows."""
    if file.kind == "shell":
        return bool(file.words) and ("swift" in file.words[0] or file.words[0].endswith("megatron"))
    return file.has("model", "model_id") and file.has(
        "tuner_type", "train_type", "split_dataset_ratio", "rlhf_type", "lorap_lr_ratio"
    )


def convert(move: Move) -> None:
    """Command, objective, rows, tuner and the Trainer's arguments."""
    command = _command(move)
    kind = str(move.value("rlhf_type") or "").lower()
    if command == "rlhf" or kind:
        kind = common.objective(move, "rlhf_type", kind or "dpo", HINTS)
        if kind == "orpo" and not move.has("beta"):
            move.unasked["train.beta"] = (0.1, "ms-swift's own default")
    if move.has("task_type"):
        task = TASKS.get(str(move.value("task_type")).lower())
        if task is None:
            hint = "dynlora init DATA writes a recipe for embeddings and rerankers"
            move.refuse("task_type", f"task_type: {move.value('task_type')} is set up otherwise here", hint)
        move.give("model.task", task, "task_type")
    common.refuse_pictures(move, PICTURES)
    if str(move.value("streaming")).lower() == "true" and move.value("max_steps") is None:
        move.say("streaming", "differs", "rows are read whole; `dataset.streaming: true` reads them while training")
    _rows(move)
    _tuner(move)
    common.thinking(move, "enable_thinking")
    if isinstance(system := move.value("system"), str):
        if system.endswith(".txt"):
            move.say("system", "lost", "a file; its text can be written as `dataset.system`")
        else:
            move.give("dataset.system", system, "system")
    _by_the_rest(move)
    common.trainer(move)
    if command == "pt":
        move.unasked["dataset.train_on"] = ("all", "swift pt")
    if str(move.value("loss_scale")).lower() in ("default", "none"):
        move.needless("answers carry loss alike, as here", "loss_scale")
    elif str(move.value("loss_scale")).lower() == "all":
        move.give("dataset.train_on", "all", "loss_scale")
    cut = {"delete": "drop", "raise": "error", "left": "truncate", "right": "truncate"}.get(
        str(move.value("truncation_strategy"))
    )
    if cut:
        move.give(
            "dataset.overlong",
            cut,
            "truncation_strategy",
            differs="cut at the end" if move.value("truncation_strategy") == "left" else "",
        )
    else:
        move.unasked["dataset.overlong"] = ("drop", "ms-swift leaves longer rows out")
    if (length := whole_number(move.value("max_length"))) is not None:
        move.give("dataset.max_length", length, "max_length")
    else:
        move.unasked["dataset.max_length"] = (2048, "ms-swift takes all that the model can read; longer costs memory")
    if (bits := whole_number(move.value("quant_bits"))) in (4, 8):
        move.give(f"model.load_in_{bits}bit", True, "quant_bits")
    if str(move.value("quant_method")).lower() in ("none", "bnb", "null"):
        move.needless("bitsandbytes, as here", "quant_method")
    if move.has("adapters"):
        move.give("adapter.from", str(move.value("adapters")), "adapters")


def _by_the_rest(move: Move) -> None:
    """What ms-swift does unasked where that depends on other keys: 16 rows a step, and a tenth of the rate for full."""
    rows = whole_number(move.value("per_device_train_batch_size"))
    passes = {"gradient_accumulation_steps": math.ceil(16 / rows)} if rows and rows > 0 else {}
    full = move.recipe["adapter.variant"].value == "full"
    move.defaults = {**move.defaults, **passes, **({"learning_rate": 1e-5} if full else {})}


def _command(move: Move) -> str:
    words = move.file.words
    if not words:
        return "sft"
    if words[0].endswith("megatron") or "megatron" in " ".join(words):
        move.refuse(
            "", "a script for Megatron, whose arguments are of its own", "dynlora trains on transformers' models"
        )
    command = (
        words[1]
        if words[0].endswith("swift") and len(words) > 1
        else re.split(r"[./]", words[0].removesuffix(".py"))[-1]
    )
    if command not in ("sft", "pt", "rlhf"):
        move.refuse("", f"swift {command} does not train", "name a script with swift sft, pt or rlhf")
    return command


def _rows(move: Move) -> None:
    for key, here in (("dataset", "dataset.train"), ("val_dataset", "dataset.val")):
        value = move.value(key)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if sources := [_source(move, key, str(name)) for name in names]:
            move.give(here, sources, key)
    _columns(move)
    ratio = move.value("split_dataset_ratio")
    if "dataset.val" in move.recipe:
        move.needless("there is a val_dataset", "split_dataset_ratio")
    elif ratio:
        common.held_out(move, "split_dataset_ratio", ratio)
    else:
        move.used.add("split_dataset_ratio")
        move.needless("off", "split_dataset_ratio")
        common.nothing_held_out(move)


def _columns(move: Move) -> None:
    """`columns`, from the rows' own names to ms-swift's; alike for all sets."""
    given = move.value("columns")
    if isinstance(given, str):
        try:
            given = loads(given)
        except BadJsonError:
            given = None
    if given is None:  # a mapping of YAML
        given = {key[8:]: entry.value for key, entry in move.file.entries.items() if key.startswith("columns.")}
    names = {"query": "instruction", "response": "output"}
    if not isinstance(given, dict):
        return
    found = {names.get(str(ours), str(ours)): str(theirs) for theirs, ours in given.items()}
    if not found or "dataset.train" not in move.recipe:
        return
    for here in ("dataset.train", "dataset.val"):
        for source in move.recipe[here].value if here in move.recipe else ():
            source["columns"] = found
    for key in [one for one in move.file.entries if one == "columns" or one.startswith("columns.")]:
        move.say(key, "converted", "as `columns` of the items")


def _source(move: Move, key: str, name: str) -> dict[str, Any]:
    """`hub:id:subset#rows`, as ms-swift writes it."""
    whole = name
    name, _, rows = name.partition("#")
    hub, colon, rest = name.partition("::")
    if colon:
        name = rest
    path, _, subset = name.partition(":") if "/" in name and not name.startswith((".", "/")) else (name, "", "")
    source: dict[str, Any] = {"path": path}
    if subset:
        source["name"] = subset
    if (number := whole_number(rows)) is not None and number > 0:
        source["rows"] = number
    local = path.startswith((".", "/", "~")) or path.endswith((".json", ".jsonl", ".csv"))
    if not local and hub.lower() != "hf" and not move.value("use_hf"):
        move.say(
            key,
            "differs",
            f"{whole}: of ModelScope's hub; the set of this name on Hugging Face's hub is read, if it is there",
        )
    return source


def _tuner(move: Move) -> None:
    key = next((name for name in ("tuner_type", "train_type", "sft_type") if move.has(name)), "tuner_type")
    kind = str(move.value(key) or "lora").lower()
    if kind not in VARIANTS:
        move.refuse(key, f"{key}: {kind} has no equivalent", "write lora, adalora or full")
    move.give("adapter.variant", VARIANTS[kind], key)
    if kind == "full":
        move.needless(
            "there is no adapter",
            *(name for name in move.file.entries if name.startswith("lora_") or name == "target_modules"),
        )
        move.used |= {name for name in DEFAULTS if name.startswith("lora_") or name == "target_modules"}
        return
    if kind == "adalora":
        text = "rank.init and rank.budget decide, as AdaLoRA's initial and final rank"
        for theirs, here, default in (("adalora_init_r", "rank.init", 12), ("adalora_target_r", "rank.budget", 8)):
            if move.has(theirs):
                move.give(here, whole_number(move.value(theirs)), theirs)
            else:
                move.unasked[here] = (default, "AdaLoRA's own default")
        move.unasked["pruning.policy"] = ("sensitivity", "AdaLoRA's score")
        move.needless(text, "lora_rank")
        move.used.add("lora_rank")
    else:
        common.lora(move, "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_weights")
    common.targets(move, "target_modules")
