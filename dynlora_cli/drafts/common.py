"""What configurations of several tools say alike: LoRA's numbers, and the arguments of transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dynlora_cli.config.foreign_values import VALUES
from dynlora_cli.drafts.importer import Move, listed, number, whole_number

OBJECTIVES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "orpo": "orpo", "kto": "kto"}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
SCHEDULES = {"cosine", "linear", "constant"}
# What transformers' Trainer does where nobody says, see TrainingArguments.
TRAINER = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
}
NO_REMOTE = "dynlora runs no code of others unasked: write `trust_remote_code: true` into the recipe if you trust it"


def lora(
    move: Move, rank: str, alpha: str, dropout: str = "", rslora: str = "", dora: str = "", init: str = ""
) -> None:
    """A LoRA of a fixed rank, by the names of its numbers: the same rank in all layers, and nothing is pruned."""
    if move.value(dora):
        move.give("adapter.variant", "dora", dora)
    elif dora:
        move.needless("off, as here", dora)
    fixed = whole_number(move.value(rank))
    if fixed is None or fixed < 1:
        return
    pissa = _start(move, init) == "pissa" if init else False
    budget = 2 * fixed if pissa else fixed  # PiSSA's start is saved with it, and the budget counts what is saved
    move.give(
        "rank.init", fixed, rank, remark=f"{rank}: a fixed rank, nothing is pruned; leave init out for a dynamic one"
    )
    move.give("rank.budget", budget, rank)
    move.findings.pop()  # one line is enough
    top = number(move.value(alpha))
    if top is not None and top > 0:
        scaled = _alpha(top, fixed, budget, bool(rslora and move.value(rslora)))
        move.give("adapter.alpha", scaled, alpha, remark=f"{alpha}: the scale stays what it was")
    if rslora and move.value(rslora):
        move.give("adapter.scaling", "rslora", rslora)
    elif rslora:
        move.needless("off, as here", rslora)
    move.give_number("adapter.dropout", dropout)


def _alpha(alpha: float, rank: int, budget: int, rslora: bool) -> int | float:
    """The numerator that gives the same scale over the budget."""
    factor = math.sqrt(budget / rank) if rslora else budget / rank
    value = alpha * factor
    return int(value) if value.is_integer() else value


def _start(move: Move, key: str) -> str:
    """How A and B begin."""
    value = move.value(key)
    name = str(value).lower()
    if value is None or name in ("true", "default", "kaiming"):
        move.needless("as here", key)
        return "default"
    if name == "pissa" or name.startswith("pissa_niter"):
        move.give("adapter.init_weights", "pissa", key, differs="" if name == "pissa" else "the SVD is exact here")
        return "pissa"
    if name in ("eva", "orthogonal", "loftq"):
        move.give("adapter.init_weights", name, key)
    else:
        move.say(key, "lost", "no such start here; A and B begin as usual (B = 0)")
    return name


def targets(move: Move, key: str, names: Mapping[str, str] | None = None) -> None:
    """The layers that are adapted; `names` are other words for some."""
    wanted = [(names or {}).get(str(name), str(name)) for name in listed(move.value(key))]
    if not wanted:
        return
    if len(wanted) == 1 and wanted[0].lower() in ("all-linear", "all_linear", "all", "linear"):
        move.give("adapter.target_modules", "all-linear", key)
    elif len(wanted) == 1 and any(sign in wanted[0] for sign in "^$()\\|"):
        move.say(key, "lost", "a regular expression; write names or globs as `adapter.target_modules`")
    else:
        move.give("adapter.target_modules", wanted, key)


def usual_targets(move: Move) -> None:
    """The layers that PEFT adapts where nobody names any."""
    move.unasked["adapter.target_modules"] = ("qv", "PEFT's own choice for most models; all-linear is dynlora's")


def objective(move: Move, key: str, name: Any, others: Mapping[str, str] | None = None) -> str:
    """What is learned; refuses what dynlora does not train.

    Args:
        name: in the tool's words.
        others: words for which a hint goes on, beside those that all have.
    """
    known = OBJECTIVES.get(str(name).lower())
    if known is None:
        hint = (others or {}).get(str(name).lower(), "dynlora trains with sft, dpo, orpo and kto")
        move.refuse(key, f"it trains with {name}, which has no equivalent", hint)
    if known != "sft":
        move.give("train.objective", known, key)
    elif key:
        move.needless("the objective of every recipe that names none", key)
    return known


# -- transformers' Trainer -------------------------------------------------------------------------------------------


def trainer(move: Move, prefix: str = "") -> None:
    """The arguments of transformers' Trainer, with their names below `prefix`."""
    key = {name: prefix + name for name in _NAMES}
    _length(move, key)
    _schedule(move, key)
    _evaluation(move, key)
    precision(move, key["bf16"], key["fp16"])
    optimizer(move, key["optim"])
    trackers(move, key["report_to"])
    checkpointing(move, key["gradient_checkpointing"])
    if (clip := number(move.value(key["max_grad_norm"]))) is not None:
        move.give("train.max_grad_norm", clip if clip > 0 else None, key["max_grad_norm"])
    steps = whole_number(move.value(key["logging_steps"]))
    if move.has(key["logging_steps"]):
        if steps:
            move.give("train.log_steps", steps, key["logging_steps"])
        else:
            move.say(key["logging_steps"], "needless", "no share of the steps; here every 10")
    move.needless("the order of rows comes from `seed`", key["data_seed"])
    if move.has(key["trust_remote_code"]):
        move.say(key["trust_remote_code"], "differs" if move.value(key["trust_remote_code"]) else "needless", NO_REMOTE)


_NAMES = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio",
    "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "optim", "report_to",
    "gradient_checkpointing", "logging_steps", "save_strategy", "save_steps", "eval_strategy", "evaluation_strategy",
    "eval_steps", "trust_remote_code", "auto_find_batch_size",
)  # fmt: skip


def _length(move: Move, key: Mapping[str, str]) -> None:
    """Steps, or epochs where there are none; and the batch."""
    steps = whole_number(move.value(key["max_steps"]))
    epochs(move, key["num_train_epochs"], decides=not (steps and steps > 0))
    if steps and steps > 0:
        move.give("train.max_steps", steps, key["max_steps"])
    else:
        move.needless("off: the epochs decide", key["max_steps"])
    size, other = key["per_device_train_batch_size"], key["per_device_eval_batch_size"]
    if (rows := whole_number(move.value(size))) is not None:
        move.give("train.micro_batch_size", rows, size)
    elif move.has(size):
        move.say(size, "lost", "no number; --dry-run says how many rows fit: `train.micro_batch_size`")
    move.needless("evaluation takes `train.micro_batch_size`, and its numbers do not depend on it", other)
    if (passes := whole_number(move.value(key["gradient_accumulation_steps"]))) is not None:
        move.give("train.gradient_accumulation_steps", passes, key["gradient_accumulation_steps"])


def epochs(move: Move, key: str, decides: bool = True) -> None:
    """Passes over the rows, which are whole here."""
    value = move.value(key)
    if value is None:
        return
    whole = whole_number(value)
    if whole:
        if decides or move.has(key):
            move.give("train.epochs", whole, key)
    elif decides:
        rounded = min(max(1, math.ceil(number(value) or 1)), 10**6)
        move.give(
            "train.epochs", rounded, key, differs=f"epochs are whole here, and {value} is none: set `train.max_steps`"
        )
    else:
        move.needless("the steps decide", key)


def _schedule(move: Move, key: Mapping[str, str]) -> None:
    move.give_number("train.learning_rate", key["learning_rate"])
    scheduler(move, key["lr_scheduler_type"])
    move.lost("the course of the rate has no further settings", key["lr_scheduler_kwargs"])
    warm_up(move, key["warmup_steps"], key["warmup_ratio"])
    move.give_number("train.weight_decay", key["weight_decay"])
    if (seed := whole_number(move.value(key["seed"]))) is not None:
        move.give("seed", seed, key["seed"])


def scheduler(move: Move, key: str) -> None:
    """The course of the learning rate."""
    value = move.value(key)
    if value is None:
        return
    name = str(value).lower()
    if name == "constant_with_warmup":
        move.give("train.lr_scheduler", "constant", key)
    elif name in SCHEDULES:
        move.give("train.lr_scheduler", name, key)
    else:
        near = VALUES.get(("lr_scheduler", name), "cosine")
        near = near if near in SCHEDULES else "cosine"
        move.give("train.lr_scheduler", near, key, differs=f"there is no {value} here; {near} is the nearest")


def warm_up(move: Move, steps: str, ratio: str) -> None:
    """The warm-up, in steps or as a share; steps decide, as everywhere."""
    count = move.value(steps)
    whole = whole_number(count)
    if whole is not None and (whole > 0 or not move.value(ratio)):
        move.give("train.warmup_steps", whole, steps)
        move.needless(f"{steps} decides", ratio)
    elif 0 < (number(count) or 0) < 1:  # transformers 5 has a share under this name
        move.give_number("train.warmup_ratio", steps)
    elif number(move.value(ratio)) is not None:
        move.give_number("train.warmup_ratio", ratio)
        move.needless(f"{ratio} decides", steps)


def _evaluation(move: Move, key: Mapping[str, str]) -> None:
    every = next((key[name] for name in ("eval_strategy", "evaluation_strategy") if move.has(key[name])), "")
    asked = str(move.value(every)).lower() if every else ""
    steps = whole_number(move.value(key["eval_steps"]))
    if move.has(key["eval_steps"]):
        if asked in ("no", "false", "epoch"):
            move.say(key["eval_steps"], "needless", f"{every} decides")
        elif steps:
            move.give("eval.steps", steps, key["eval_steps"])
        else:
            move.say(key["eval_steps"], "lost", "a share of the run; a number of steps here: `eval.steps`")
    if every:
        move.needless("held-out rows are measured after every epoch, or every `eval.steps`", every)
    saving = key["save_strategy"]
    if move.has(saving):
        move.say(saving, "needless", "checkpoints are for going on after a stop; the adapter is saved at the end")
    if whole_number(move.value(key["save_steps"])) and move.has(key["save_steps"]):
        if str(move.value(saving)).lower() in ("no", "epoch", "false"):
            move.say(key["save_steps"], "needless", f"{saving} decides")
        else:
            move.give("train.save_steps", whole_number(move.value(key["save_steps"])), key["save_steps"])
    elif move.has(key["save_steps"]):
        move.say(key["save_steps"], "needless", "no number of steps; here every 10 minutes and at each evaluation")


def precision(move: Move, bf16: str, fp16: str) -> None:
    """The type of the frozen weights: bf16 and fp16 of others are autocast, or the type itself."""
    for key, name in ((bf16, "bfloat16"), (fp16, "float16")):
        value = move.value(key)
        if str(value).lower() == "auto":
            move.give("model.dtype", "auto", key)
        elif value is True or str(value).lower() == "full":
            move.give("model.dtype", name, key)
        elif value is not None:
            move.needless("off", key)


def optimizer(move: Move, key: str) -> None:
    """AdamW in its forms; another one is said to be none of ours."""
    value = move.value(key)
    if value is None:
        return
    name = str(value).lower().rpartition(".")[2]
    ours = {"adamw": "adamw", "adamw_8bit": "adamw_8bit", "paged_adamw": "paged_adamw"}
    ours |= {"paged_adamw_8bit": "paged_adamw_8bit", "adamw_torch_8bit": "adamw_8bit", "adamw8bit": "adamw_8bit"}
    found = ours.get(name) or VALUES.get(("optimizer", name))
    if found:
        move.give("train.optimizer", found, key, differs="" if "adam" in name and name != "adam" else "AdamW here")
    else:
        move.give("train.optimizer", "adamw", key, differs=f"there is no {value} here; AdamW, whose best rate differs")


def trackers(move: Move, key: str) -> None:
    """Where metrics go beside the run's own files."""
    value = move.value(key)
    if value is None:
        move.needless("no tracker, as here", key)
        return
    wanted = [str(name) for name in listed(value)]
    found = [name for name in wanted if name in TRACKERS]
    others = [name for name in wanted if name not in (*TRACKERS, "none", "all")]
    says = f"{', '.join(others)} is not among {', '.join(TRACKERS)}" if others else ""
    if found:
        move.give("train.report_to", found, key, differs=says)
    elif says or "all" in wanted:
        move.say(key, "lost", says or f"name those that you use: {', '.join(TRACKERS)}")
    else:
        move.needless("no tracker, as here", key)


def checkpointing(move: Move, key: str) -> None:
    """Activations that are computed again."""
    value = move.value(key)
    if value is None:
        return
    name = str(value).lower()
    if name == "offload":
        move.give("train.gradient_checkpointing", "offload", key)
    elif name in ("false", "none", "0"):
        move.give("train.gradient_checkpointing", False, key)
    else:
        move.give("train.gradient_checkpointing", True, key)


def thinking(move: Move, key: str) -> None:
    """The chat template's own switch."""
    value = move.value(key)
    if isinstance(value, bool):
        move.give("dataset.chat_template_kwargs", {"enable_thinking": value}, key)


def held_out(move: Move, key: str, value: Any) -> None:
    """The share of rows that is measured on: 0 to 1, or a number of rows, which our recipes do not have."""
    share = number(value)
    if share is None or share < 0:
        move.say(key, "lost", "no share of the rows: `dataset.val_size`")
    elif share < 1:
        move.give("dataset.val_size", share, key)
    else:
        text = "a number of rows; here a share: `dataset.val_size`, or rows of their own in `dataset.val`"
        move.give("dataset.val_size", 0.05, key, differs=text)


def nothing_held_out(move: Move) -> None:
    """The tool measures on nothing: all rows train, as there."""
    if "dataset.val" not in move.recipe and "dataset.val_size" not in move.recipe:
        move.unasked["dataset.val_size"] = (0, f"{move.tool} trains on all rows; 0.05 would measure on a few")


def loss_type(move: Move, key: str, kind: str) -> None:
    """The form of an objective's loss; a list mixes several, and supervised training has one."""
    value = move.value(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if kind == "sft" and value is not None:
        usual = str(value).lower() in ("nll", "default", "cross_entropy")
        move.say(key, "needless" if usual else "lost", "the loss is plain cross-entropy")
    elif isinstance(value, str):
        move.give("train.loss_type", value, key)
    elif isinstance(value, list):
        move.say(key, "lost", "a mixture of losses; one here: `train.loss_type`")


def refuse_pictures(move: Move, keys: Iterable[str]) -> None:
    """Refuse a file whose rows hold more than text."""
    for key in keys:
        if move.file.value(key) not in (None, False, ""):
            move.refuse(key, f"`{key}` is for rows with pictures, sound or video", "dynlora trains on text")
