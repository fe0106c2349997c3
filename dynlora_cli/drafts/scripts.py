"""Python that sets up a trainer with LoRA, as notebooks do: what its calls say, as a recipe. It is never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.importer import Move, listed, whole_number

SCRIPT = {f"train.{key}": value for key, value in common.TRAINER.items()} | {
    "train.output_dir": "trainer_output",
}  # fmt: skip
# What TRL's own arguments have for the learning rate in place of transformers'.
TRL_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6}
REWARDED = ("GRPO", "Reward", "PPO", "RLOO", "OnlineDPO", "GKD", "GSPO")
SEES = ("Vision", "Whisper", "Speech", "Audio", "AutoModelForImage", "SentenceTransformer", "FastDiffusion")


def convert_script(move: Move, defaults: Mapping[str, Any]) -> None:
    """Model, LoRA, rows and the trainer's arguments, from the calls that a script makes.

    Args:
        defaults: what the tool does where the calls do not say.
    """
    _refuse_others(move)
    move.defaults = {**SCRIPT, **defaults}
    called = " ".join(move.file.words)
    unsloth = any(word in called for word in ("FastLanguageModel", "FastModel"))
    kind = next(
        (name for name in ("ORPO", "DPO", "KTO") if f"{name}Trainer" in called or f"{name}Config" in called), "SFT"
    )
    if f"{kind}Config" in called:
        move.defaults = {**move.defaults, "train.learning_rate": TRL_RATES[kind.lower()]}
    if kind != "SFT":
        move.unasked["train.objective"] = (kind.lower(), f"its trainer is {kind}Trainer")
    for key in ("train.model", "model.model_name", "model.pretrained_model_name_or_path"):
        if isinstance(name := move.value(key), str):
            move.give("model.name_or_path", name, key)
    if move.value("model.full_finetuning") or not (
        unsloth or any(key.startswith("lora.") for key in move.file.entries)
    ):
        move.give(
            "adapter.variant",
            "full",
            "model.full_finetuning",
            differs="" if unsloth else "no LoRA is set up: all of it trains",
        )
        move.needless("there is no adapter", *(key for key in move.file.entries if key.startswith("lora.")))
        move.used |= {key for key in move.defaults if key.startswith("lora.")}
    else:
        if move.value("model.full_finetuning") is False:
            move.needless("off", "model.full_finetuning")
        script_lora(move, "lora.r", ["model.use_gradient_checkpointing"])
    for width in ("4", "8"):
        bits(move, f"model.load_in_{width}bit", width)
        bits(move, f"quantization.load_in_{width}bit", width)
    _quantization(move)
    for key in ("model.dtype", "model.torch_dtype"):
        if move.has(key) and isinstance(move.value(key), str):
            move.give("model.dtype", move.translated("model.dtype", move.value(key)), key)
    lengths = ("train.max_length", "train.max_seq_length", "model.max_seq_length")
    given = next((key for key in lengths if move.has(key)), None)
    length(move, given or next((key for key in lengths if key in move.defaults), lengths[0]))
    move.needless("the length is known already", "model.max_seq_length", "train.max_seq_length", "train.max_length")
    _script_rows(move)
    common.trainer(move, "train.")
    common.loss_type(move, "train.loss_type", kind.lower())
    if move.value("train.packing"):
        move.give("dataset.packing", True, "train.packing")
    if "train_on_responses_only" in called:
        move.unasked["dataset.train_on"] = ("auto", "train_on_responses_only: answers alone carry loss")
    elif kind == "SFT" and not move.value("train.assistant_only_loss"):
        move.unasked["dataset.train_on"] = ("all", "without train_on_responses_only all tokens carry loss")


def _quantization(move: Move) -> None:
    """What BitsAndBytesConfig says, and what it does unasked."""
    if move.value("quantization.load_in_4bit") is not True:
        return
    move.needless("what BitsAndBytesConfig is given above", "model.quantization_config")
    for name, unasked in (("bnb_4bit_quant_type", "fp4"), ("bnb_4bit_use_double_quant", False)):
        value = move.value(f"quantization.{name}")
        if value is not None:
            move.give(f"model.{name}", value, f"quantization.{name}")
        elif f"quantization.{name}" not in move.file.entries:
            move.unasked[f"model.{name}"] = (unasked, "BitsAndBytesConfig's own default")


def _refuse_others(move: Move) -> None:
    called = " ".join(move.file.words)
    if word := next((word for word in REWARDED if f"{word}Trainer" in called or f"{word}Config" in called), ""):
        move.refuse("", f"it trains with {word}", "dynlora trains with sft, dpo, orpo and kto")
    if word := next((word for word in SEES if word in called), ""):
        move.refuse(
            "", f"{word}: its model sees, hears or embeds", "dynlora trains on text; for embeddings: dynlora init"
        )
    if not any(key.startswith("train.") for key in move.file.entries):
        move.refuse("", "no trainer is called in it", "name a script that trains")


def _script_rows(move: Move) -> None:
    path, files = move.value("data.path"), move.value("data.data_files")
    if isinstance(files, dict):
        files = files.get("train")
    if path in ("json", "csv", "text", "parquet") and files:
        path = listed(files)[0]
        move.say("data.data_files", "converted", "as `path` of the item")
    if isinstance(path, str):
        source: dict[str, Any] = {"path": path}
        for theirs in ("split", "name"):
            value = move.value(f"data.{theirs}")
            if isinstance(value, str) and not (theirs == "split" and value == "train"):
                source[theirs] = value
            move.needless(f"as `{theirs}` of the item", f"data.{theirs}")
        move.give(
            "dataset.train",
            [source],
            "data.path",
            differs="code that shapes rows afterwards is not run: look at --dry-run",
        )
    field = move.value("train.dataset_text_field")
    move.needless(
        f"rows are made to have {field!r} by the script; here by their own columns", "train.dataset_text_field"
    )
    common.nothing_held_out(move)


def script_lora(move: Move, rank: str, checkpointing: list[str]) -> None:
    common.lora(move, rank, "lora.lora_alpha", "lora.lora_dropout", "lora.use_rslora", "lora.use_dora",
                "lora.init_lora_weights" if move.has("lora.init_lora_weights") else "")  # fmt: skip
    if "lora.target_modules" in move.file.entries or "lora.target_modules" in move.defaults:
        common.targets(move, "lora.target_modules")
    else:
        common.usual_targets(move)
    if str(move.value("lora.bias")).lower() in ("none", "null"):
        move.needless("biases stay frozen, as here", "lora.bias")
    for key in ("lora.use_gradient_checkpointing", *checkpointing):
        if move.has(key):
            common.checkpointing(move, key)


def length(move: Move, key: str) -> None:
    if (tokens := whole_number(move.value(key))) is not None:
        move.give("dataset.max_length", tokens, key)


def bits(move: Move, key: str, width: str = "4") -> None:
    if move.value(key) is True:
        move.give(f"model.load_in_{width}bit", True, key)
    else:
        move.needless("off", *([key] if move.value(key) is False else []))
