"""LLaMA-Factory's YAML or JSON, or a command line of it.

What it does
    Turns the file that `llamafactory-cli train` takes into a recipe. Data sets are named in a `dataset_info.json`,
    which is read where it lies beside the file, or in the file's `dataset_dir` below that folder.

When to use it
    To move over from LLaMA-Factory.

Reference
    LLaMA-Factory's arguments (src/llamafactory/hparams) and its data/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynlora_cli.drafts import common
from dynlora_cli.drafts.files.entries import LARGEST, ForeignFile
from dynlora_cli.drafts.importer import Move, listed, number, whole_number
from dynlora_cli.files.strict_json import BadJsonError, loads

NAME = "LLaMA-Factory"
READS = "yaml shell"
DEFAULTS = {
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "val_size": 0.0,
    "finetuning_type": "lora",
    "stage": "sft",
    "output_dir": "saves/run",
}
KEYS = """
template                      !the tokenizer's own chat template is used; another as `dataset.chat_template`
max_samples                   dataset.train; as `rows` of each item
preprocessing_num_workers     -large files are read on all cores (dataset.workers)
preprocessing_batch_size      -rows are in memory
overwrite_cache               -rows that are kept are read again where anything has changed (dataset.cache)
tokenized_path                -rows of large files are kept by themselves (dataset.cache)
buffer_size                   -rows are read before the first step, and shuffled whole
streaming                     -rows are read before the first step; `dataset.streaming: true` reads them while training
plot_loss                     -the report has the picture
plot_name                     -the report has the picture
preserve_thinking             !write it into the rows, or take a template that has it
tool_format                   !the template writes tools as the model knows them
efficient_eos                 -the token that ends an answer trains
flash_attn                    model.attn_implementation
shift_attn                    !there is no shifted sparse attention
use_unsloth                   -loss and layers are fused already
use_unsloth_gc                -how activations are computed again does not change what is trained
use_v1_kernels                -how layers are computed does not change what is trained
use_kt                        -where experts lie does not change what is trained
kt_*                          -where experts lie does not change what is trained
upcast_layernorm              -norms are computed in fp32
upcast_lmhead_output          -the loss is computed in fp32
pure_bf16                     model.dtype: bfloat16
rope_scaling                  !the model's own config is used
moe_aux_loss_coef             !experts' balance has no loss of its own
mixture_of_depths             !there is no mixture of depths
use_cache                     -nothing of the result depends on it
cache_dir                     -the hub's own cache is used
use_fast_tokenizer            -the model's own tokenizer is used
low_cpu_mem_usage             -the model is read tensor by tensor
device_map                    -the model lies on the device that trains
quantization_method           model.load_in_4bit; bnb alone
quantization_device_map       -the model lies on the device that trains
double_quantization           model.bnb_4bit_use_double_quant
export_*                      -`dynlora merge` and `dynlora export` write files
infer_*                       -of inference
vllm_*                        -of inference
sglang_*                      -of inference
additional_target             !only a classifier head is trained besides the adapters
lora_alpha                    adapter.alpha
use_dora                      adapter.variant: dora
pissa_init                    adapter.init_weights: pissa
pissa_iter                    -the SVD is exact here
pissa_convert                 -a PiSSA is saved as the LoRA of twice the rank that it equals
create_new_adapter            !`adapter.from` goes on with the old one
loraplus_lr_ratio             train.lora_plus_ratio
loraplus_lr_embedding         !new tokens learn at the rate of the run
use_rslora                    adapter.scaling: rslora, with a number as `alpha`
freeze_*                      !only the adapters train, or with `adapter.variant: full` all of the model
use_galore                    !there is no GaLore
galore_*                      -of GaLore
use_apollo                    !there is no APOLLO
apollo_*                      -of APOLLO
use_badam                     !there is no BAdam
badam_*                       -of BAdam
use_adam_mini                 !AdamW trains in its place
use_muon                      !AdamW trains in its place
use_llama_pro                 !layers are not added
use_dft_loss                  !the loss is plain cross-entropy
use_asft_loss                 !the loss is plain cross-entropy
asft_*                        -of a loss that is not used
use_eaft_loss                 !the loss is plain cross-entropy
eaft_*                        -of a loss that is not used
disable_shuffling             dataset.shuffle: false
pref_ftx                      train.sft_weight
kto_chosen_weight             train.desirable_weight
kto_rejected_weight           train.undesirable_weight
simpo_gamma                   -of SimPO
ref_model_adapters            !the reference is the model that the run starts from
ref_model_quantization_bit    -the reference is the model that the run starts from
reward_*                      -of a reward model that is not used
compute_accuracy              -`dynlora eval` measures
predict_with_generate         !`dynlora eval --tasks` measures with a trained adapter
val_size                      dataset.val_size
eval_on_each_dataset          -held-out rows are measured together
include_effective_tokens_per_second  -always
freeze_vision_tower           -a model's language part alone trains
freeze_multi_modal_projector  -a model's language part alone trains
ray_*                         -where a run goes does not change what it trains
resources_per_worker.*        -where a run goes does not change what it trains
placement_strategy            -where a run goes does not change what it trains
use_swanlab                   !SwanLab is no tracker here
swanlab_*                     !SwanLab is no tracker here
mask_history                  !every answer of the assistant carries loss
dataloader_num_workers        -rows are in memory
use_reentrant_gc              -how activations are computed again does not change what is trained
print_param_status            -nothing of the result depends on it
hf_hub_token                  -set by the hub's own variables of the environment
ms_hub_token                  -set by the hub's own variables of the environment
fp8*                          !there is no training in fp8
"""
REFUSED = {
    "rm": "dynlora trains no reward models",
    "ppo": "dynlora trains with rows, not with rewards",
}
PICTURES = ("image_max_pixels", "video_max_pixels", "image_resolution", "media_dir", "audio_sampling_rate")
TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
        "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
        "function_tag": ("function_call",), "system_tag": ("system",)}  # fmt: skip
# Columns of a data set, by LLaMA-Factory's names for them in its two forms.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
OTHERS = {"messages": "messages", "tools": "tools", "system": "system", "chosen": "chosen", "rejected": "rejected",
          "kto_tag": "label"}  # fmt: skip


def recognises(file: ForeignFile) -> bool:
    """Whether it is a command of LLaMA-Factory's, or has its names of method, rows and template."""
    if file.kind == "shell":
        first = file.words[:1]
        return bool(first) and (first[0].endswith(("llamafactory-cli", "lmf")) or "llamafactory" in first[0])
    if file.has("model_class", "peft_config") and file.has(
        "train_dataset", "dist_config", "quant_config", "kernel_config"
    ):
        return True  # its new form, which `convert` refuses in words
    return file.has("model_name_or_path") and file.has(
        "stage", "finetuning_type", "template", "cutoff_len", "export_dir"
    )


def convert(move: Move) -> None:
    """Stage, rows, adapter and the Trainer's arguments."""
    if move.file.words[1:2] and move.file.words[1].endswith((".yaml", ".json")):
        move.refuse("", f"the script trains with {move.file.words[1]}", f"give that file: --from {move.file.words[1]}")
    if not move.file.has("model_name_or_path") and move.file.has("model_class", "peft_config"):
        move.refuse(
            "model", "the form of LLaMA-Factory's v1, which is not read", "give the file of `llamafactory-cli train`"
        )
    for key, hint in (("export_dir", "dynlora merge"), ("infer_backend", "dynlora chat")):
        if move.file.has(key) and not (move.has("do_train") or move.has("dataset")):
            move.refuse(key, "a file for inference or merging, which trains nothing", f"see {hint} --help")
    for key in ("do_predict", "predict_with_generate"):
        if move.value(key) and not move.value("do_train"):
            move.refuse(key, "a file that predicts, and trains nothing", "see dynlora eval --help")
    common.refuse_pictures(move, PICTURES)
    stage = common.objective(move, "stage", move.value("stage"), REFUSED)
    if str(move.value("pref_loss")).lower() in ("orpo", "simpo") and stage == "dpo":
        differs = "" if move.value("pref_loss") == "orpo" else "SimPO has none here; ORPO needs no reference either"
        move.give("train.objective", "orpo", "pref_loss", differs=differs)
    elif move.has("pref_loss"):
        move.give("train.loss_type", move.value("pref_loss"), "pref_loss")
    _rows(move, stage)
    _adapter(move)
    common.thinking(move, "enable_thinking")
    common.trainer(move)
    if move.has("compute_type"):
        move.give("model.dtype", move.translated("model.dtype", move.value("compute_type")), "compute_type")
    if (bits := whole_number(move.value("quantization_bit"))) in (4, 8):
        move.give(f"model.load_in_{bits}bit", True, "quantization_bit")
        if str(move.value("quantization_method")).lower() not in ("none", "bnb", "bitsandbytes"):
            move.say("quantization_method", "lost", "bitsandbytes quantizes here")
    if move.value("train_on_prompt") is True:
        move.give("dataset.train_on", "all", "train_on_prompt")
    elif move.value("train_on_prompt") is False:
        move.needless("answers alone carry loss, as here", "train_on_prompt")
    if move.value("disable_gradient_checkpointing") is None and "train.gradient_checkpointing" not in move.recipe:
        move.unasked["train.gradient_checkpointing"] = (True, "LLaMA-Factory has it on")
    if move.value("packing") or move.value("neat_packing"):
        key = "neat_packing" if move.value("neat_packing") else "packing"
        move.give(
            "dataset.packing",
            True,
            key,
            differs="" if key == "neat_packing" else "packed examples never see each other",
        )
        move.needless("packing is on", *({"packing", "neat_packing"} - {key}))
    if stage == "sft" and str(move.value("stage")) == "pt" and not move.has("packing"):
        move.unasked["dataset.packing"] = (True, "of pre-training in LLaMA-Factory")


def _adapter(move: Move) -> None:
    kind = str(move.value("finetuning_type")).lower()
    if kind == "full":
        move.give("adapter.variant", "full", "finetuning_type")
        move.needless("there is no adapter", *(key for key in move.file.entries if key.startswith("lora_")))
        move.used |= {key for key in DEFAULTS if key.startswith("lora_")}
    elif kind != "lora":
        move.refuse("finetuning_type", f"finetuning_type: {kind} has no equivalent", "write lora or full")
    else:
        move.say("finetuning_type", "converted", "adapter.variant: lora, the default")
        rank = whole_number(move.value("lora_rank")) or 8
        if not move.has("lora_alpha"):
            move.defaults = {**move.defaults, "lora_alpha": 2 * rank}
        if move.value("pissa_init"):
            move.give("adapter.init_weights", "pissa", "pissa_init")
            move.defaults = {**move.defaults, "_start": "pissa"}
        common.lora(
            move,
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "_start" if move.value("pissa_init") else "",
        )
        move.findings[:] = [one for one in move.findings if one.entry.key != "_start"]
        common.targets(move, "lora_target")


# -- data sets -------------------------------------------------------------------------------------------------------


def _rows(move: Move, stage: str) -> None:
    info, why = _info(move)
    for key, here in (("dataset", "dataset.train"), ("eval_dataset", "dataset.val")):
        names = [str(name) for name in listed(move.value(key))]
        sources = [_source(move, key, name, info, why, stage) for name in names]
        if not sources:
            continue
        if here == "dataset.train":
            _weigh(move, sources)
            if (rows := whole_number(move.value("max_samples"))) is not None:
                for source in sources:
                    source.setdefault("rows", rows)
                move.say("max_samples", "converted", f"`rows: {rows}` of each item")
        move.give(here, sources, key)
    move.needless("the list of data sets was looked for there", "dataset_dir")
    if "dataset.val" in move.recipe:
        move.needless("there is an eval_dataset", "val_size")
    elif move.value("val_size"):
        common.held_out(move, "val_size", move.value("val_size"))
    else:
        move.used.add("val_size")
        move.needless("off", "val_size")
        common.nothing_held_out(move)


def _weigh(move: Move, sources: list[dict[str, Any]]) -> None:
    shares = [share for one in listed(move.value("interleave_probs")) if (share := number(one)) is not None]
    move.needless("as `weight` of the items", "mix_strategy")
    if shares and len(shares) == len(sources):
        for source, share in zip(sources, shares, strict=True):
            source["weight"] = share
        text = "as `weight`: how often a set's own rows come up, while there it is the share of draws"
        move.say("interleave_probs", "differs", text)


def _info(move: Move) -> tuple[dict[str, Any] | None, str]:
    """dataset_info.json, of the file's own folder or of a dataset_dir below it; or why it is not read."""
    folder = move.file.path.parent
    given = str(move.value("dataset_dir") or "data")  # as LLaMA-Factory takes it
    inside = bool(given) and not Path(given).is_absolute() and ".." not in Path(given).parts
    places = [folder / "dataset_info.json", *([folder / given / "dataset_info.json"] if inside else [])]
    for place in places:
        if place.is_file() and not place.is_symlink():
            if place.stat().st_size > LARGEST:
                return None, f"{place} is larger than any list of data sets"
            try:
                found = loads(place.read_text(encoding="utf-8"))
            except (BadJsonError, UnicodeDecodeError, OSError) as error:
                return None, f"{place} cannot be read: {error}"
            if isinstance(found, dict):
                return found, ""
            return None, f"{place} is no list of data sets"
    return None, "no dataset_info.json lies beside the file: copy it there"


def _source(move: Move, key: str, name: str, info: dict[str, Any] | None, why: str, stage: str) -> dict[str, Any]:
    """An item for a data set that is named in dataset_info.json."""
    about = info.get(name) if info else None
    if not isinstance(about, dict):
        missing = why or "dataset_info.json does not name it"
        text = f"{name}: {missing}; the name is taken for a path or a data set of the hub"
        move.say(key, "lost", text)
        return {"path": name}
    path = about.get("hf_hub_url") or about.get("file_name") or about.get("ms_hub_url") or about.get("script_url")
    source: dict[str, Any] = {"path": str(path or name)}
    if about.get("file_name") and not about.get("hf_hub_url"):
        folder = move.value("dataset_dir") or "data"
        source["path"] = str(Path(str(folder)) / str(about["file_name"]))
    if not about.get("hf_hub_url") and not about.get("file_name"):
        move.say(key, "differs", f"{name}: of another hub; data sets of Hugging Face's hub are read")
    for theirs, ours in (("subset", "name"), ("split", "split"), ("num_samples", "rows")):
        if about.get(theirs):
            source[ours] = about[theirs]
    source |= _format(move, key, name, about, stage)
    for theirs in about.keys() - {
        "hf_hub_url",
        "ms_hub_url",
        "om_hub_url",
        "script_url",
        "file_name",
        "subset",
        "split",
        "num_samples",
        "formatting",
        "columns",
        "tags",
        "ranking",
        "folder",
        "cloud_file_name",
    }:
        move.say(key, "lost", f"{name}: {theirs} of dataset_info.json has no equivalent")
    return source


def _format(move: Move, key: str, name: str, about: dict[str, Any], stage: str) -> dict[str, Any]:
    talks = str(about.get("formatting", "alpaca")).lower() in ("sharegpt", "openai")
    columns = about.get("columns") if isinstance(about.get("columns"), dict) else {}
    if unseen := [one for one in ("images", "videos", "audios") if (columns or {}).get(one)]:
        move.refuse(key, f"{name}: its rows hold {unseen[0]}", "dynlora trains on text")
    ranked = bool(about.get("ranking")) or stage in ("dpo", "orpo")
    form = "kto" if stage == "kto" else "preference" if ranked else "chat" if talks else "alpaca"
    if str(move.value("stage")) == "pt":
        form = "text"
    names = {**({} if talks else ALPACA), **OTHERS}
    if form == "text":
        names = {"prompt": "text"}
    if form == "kto" and not talks:
        names |= {"prompt": "prompt", "response": "completion"}
    if form == "preference" and talks:
        names |= {"messages": "conversations"}
    found = {ours: (columns or {})[theirs] for theirs, ours in names.items() if (columns or {}).get(theirs)}
    if talks and form != "preference" and found.get("messages") == "conversations":
        found.pop("messages")
    found = {ours: theirs for ours, theirs in found.items() if ours != theirs}
    tags = about.get("tags") if isinstance(about.get("tags"), dict) else {}
    for tag, value in (tags or {}).items():
        if value not in TAGS.get(tag, (value,)):
            move.say(key, "lost", f"{name}: {tag}: {value} is no name of a role or key that is known here")
    return {"format": form, **({"columns": found} if found else {})}
