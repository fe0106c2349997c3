"""The base model: load it, plain or quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import Mxfp4Config

from dynlora_cli import plugins
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.models.alone import making_a_model
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.find import ASKS_FOR_TRUST, needs_trust, quantization_of
from dynlora_cli.models.heads import class_names, part_head, renew, same_classes
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.pipelines.find import needs_pipeline
from dynlora_cli.models.randomness import seeded
from dynlora_cli.models.supposed import SupposedWeights, has_weights
from dynlora_cli.models.targets import inside
from dynlora_cli.models.weights import Weights

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model
    from dynlora_cli.models.token_rows import TokenRows

# What transformers calls the output layer of a classifier, and PEFT with it.
HEAD_NAMES = ("classifier", "score")
CAUSAL = "AutoModelForCausalLM"
MXFP4 = "mxfp4"  # how the experts of gpt-oss are stored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A frozen base model with its tokenizer.

    Attributes:
        model: all parameters frozen, except a classifier's `whole` modules.
        tokenizer: the model's own.
        files: where it was loaded from.
        dtype: of the weights and, below fp32, of autocast.
        head: name of the classifier head, or None.
        new_head: the head is not the checkpoint's own but a new, random one.
        whole: modules that are trained and saved whole: the head, and what else of a classifier its checkpoint lacks.
        rows: trained rows of single tokens, by the table that they are put on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    files: BaseFiles
    dtype: torch.dtype
    head: str | None
    new_head: bool = False
    whole: tuple[str, ...] = ()
    rows: dict[str, TokenRows] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.files.folder


def load_base(
    options: Model,
    files: BaseFiles,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    labels: list[str] | None,
    seed: int,
    computes: torch.device | None = None,
) -> Base:
    """Load the model and freeze its weights.

    Args:
        options: the recipe's `model` section.
        files: of that model.
        tokenizer: the model's own, or the adapter's.
        device: where the weights go; "meta": structure only, no weights.
        labels: class names of a classification task.
        seed: of a new classifier head.
        computes: the device it will compute on, where that is another; decides what `dtype: auto` is.

    Raises:
        UsageError, MachineError: the model cannot be loaded; the message says why.
    """
    folder = files.folder
    _refuse_quantized_twice(options, files)
    if any(folder.glob("*.bin")):
        Weights(folder)  # what merging could not read later is not trained on
    dtype = resolve_dtype(options.dtype, computes or device)
    if needs_pipeline(options):
        return _denoiser(folder, tokenizer, files, dtype, device)
    structure = load_structure(options, folder, labels) if labels or device.type == "meta" else None
    head, new, whole = _whole(structure, _weights(files)) if structure is not None and labels else (None, False, ())
    others = labels and head and not new and not same_classes(labels, class_names(_config(options, folder, None)))
    if structure is not None and device.type == "meta":
        model = structure
        part_head(model, files.config)
    else:
        with making_a_model(), seeded(seed, device):  # what its files lack, such as a new head
            model = _from_pretrained(options, folder, _config(options, folder, labels), dtype, device, whole)
            if head and others:  # its outputs answer with other classes, or with these in another order
                renew(model, head)
    for name, parameter in model.named_parameters():
        trains = inside(name, whole)
        parameter.requires_grad_(trains)
        if trains:
            parameter.data = parameter.data.float()
    for part in model.modules():  # an encoder and a decoder may have copies of it
        settings: Any = getattr(part, "config", None)
        if hasattr(settings, "use_cache"):
            settings.use_cache = False
    for settings in (model.config, model.config.get_text_config()) if labels else ():
        if getattr(settings, "pad_token_id", None) is None:
            settings.pad_token_id = tokenizer.pad_token_id
    return Base(model, tokenizer, files, dtype, head, new or bool(others), whole)


def _denoiser(
    folder: Path, tokenizer: PreTrainedTokenizerBase, files: BaseFiles, dtype: torch.dtype, device: torch.device
) -> Base:
    """The denoiser of a pipeline as a base."""
    from dynlora_cli.models.pipelines.denoiser import denoiser_structure, load_denoiser

    model = denoiser_structure(folder) if device.type == "meta" else load_denoiser(folder, dtype, device)
    return Base(model.requires_grad_(False), tokenizer, files, dtype, None)


def _refuse_quantized_twice(options: Model, files: BaseFiles) -> None:
    """Refuse to quantize what is stored in few bits by another method.

    Raises:
        UsageError: a recipe asks for that.
    """
    if (bits := quantized_to(options)) and files.quantization not in (None, "bitsandbytes"):
        raise UsageError(
            f"model.{bits}: the weights in {files.folder} are stored quantized by {files.quantization} already",
            f"leave {bits} out, or name the model in full precision",
        )


def quantized_to(options: Model) -> str:
    """The key by which a recipe has the base quantized; "" where it does not."""
    return next((key for key in ("load_in_4bit", "load_in_8bit") if getattr(options, key)), "")


def own_classes(options: Model, files: BaseFiles) -> list[str] | None:
    """The classes that a checkpoint has a head for, in its order; None where it has no head."""
    structure = load_structure(options, files.folder, None)
    head, new, _ = _whole(structure, _weights(files))
    return None if head is None or new else class_names(structure.config)


def trains_whole(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """The modules of a classifier in memory that have to train whole, by the checkpoint that it was loaded from."""
    return _whole(model, Weights(folder))[2]


def _whole(model: PreTrainedModel, weights: Weights) -> tuple[str | None, bool, tuple[str, ...]]:
    """Of a classifier: its head, whether its checkpoint lacks that, and all modules that train whole.

    Beside the head, those are the modules on top of the encoder that the checkpoint lacks: they are as random as a new
    head, and nobody who loads the adapter would get the same numbers again. And whatever has a name that ends like a
    head's (DistilBERT's pre_classifier): PEFT takes all of them out of the file.
    """
    layout = Layout(weights, model)
    head = next((name for name in HEAD_NAMES if hasattr(model, name)), None)
    found = {} if head is None else {head: None}
    found |= {name: None for name, _ in model.named_modules() if name.endswith(HEAD_NAMES) and not inside(name, found)}
    lacking = [name for name, _ in model.named_parameters() if layout.find(name) is None]
    on_top = [name for name in lacking if "pooler" in name or not inside(name, [model.base_model_prefix])]
    for name in on_top:
        if not inside(name, found):
            found[name.rpartition(".")[0]] = None
    return head, head is not None and any(inside(name, [head]) for name in lacking), tuple(found)


def _weights(files: BaseFiles) -> Weights:
    """What a base's files hold; for a plan, what they would hold."""
    if files.planning and not has_weights(files.folder):
        return SupposedWeights(files.folder, _config(files.options, files.folder, None))
    return Weights(files.folder)


def load_structure(
    options: Model,
    folder: Path,
    labels: list[str] | None,
    device: str | None = "meta",
    changes: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model's modules without reading its weights: names and shapes. `device` None: wherever the caller says.

    `changes` are keys of its config, that of the texts, with other values.
    """
    if needs_pipeline(options):
        from dynlora_cli.models.pipelines.denoiser import denoiser_structure

        return denoiser_structure(folder, device)
    config = _config(options, folder, labels)
    for key, value in (changes or {}).items():
        setattr(config.get_text_config(), key, value)
    try:
        with making_a_model(), torch.device(device) if device else nullcontext():
            model = _auto(options, config).from_config(config, trust_remote_code=options.trust_remote_code)
            return _without(model, options)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library makes of somebody else's numbers
        if ASKS_FOR_TRUST in str(error):
            raise needs_trust(folder) from None
        reason = str(error).partition("\nModel type should be")[0]  # without the names of all other models
        raise UsageError(f"{folder / 'config.json'} makes no model for {options.task}: {reason}") from None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is fp32 on the CPU and bf16 on a GPU that computes in it.

    Raises:
        MachineError: the device cannot train in that type.
    """
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float32
    if name == "float16" and device.type == "cpu":
        raise MachineError("model.dtype: float16 does not train on a CPU", "use float32 or bfloat16")
    return DTYPES[name]


WIDE = 512  # from this width on bf16 products are faster, where a CPU has them: scripts/bench/NOTES.md


def bf16_note(options: Model, base: Base, device: torch.device) -> list[str]:
    """What to say where `model.dtype: auto` is fp32 on a CPU that multiplies bf16 itself, and the model is wide."""
    width = getattr(base.model.config.get_text_config(), "hidden_size", 0) or 0
    if options.dtype != "auto" or device.type != "cpu" or quantized_to(options) or width < WIDE:
        return []
    has = [getattr(torch.cpu, f"_is_{what}_supported", bool) for what in ("avx512_bf16", "amx_tile")]
    if not any(check() for check in has):
        return []
    return [
        "model.dtype: auto is float32 on a CPU; this one has bfloat16 products: --set model.dtype=bfloat16 is faster"
    ]


def _config(options: Model, folder: Path, labels: list[str] | None) -> transformers.PretrainedConfig:
    more: dict[str, Any] = {}
    if labels:
        more = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code, **more)
    except Exception as error:  # whatever the library makes of somebody else's file
        if ASKS_FOR_TRUST in str(error):
            raise needs_trust(folder) from None
        raise UsageError(f"{folder / 'config.json'} cannot be read: {error}") from None


def _auto(options: Model, config: transformers.PretrainedConfig) -> Any:
    """The class that makes the model; a vision-language model is a causal language model with more around it."""
    name = auto_name(options)
    return transformers.AutoModelForImageTextToText if name == CAUSAL and sees(config) else getattr(transformers, name)


def auto_name(options: Model) -> str:
    """Which of transformers' classes loads models for the task of a recipe."""
    return str(plugins.declared("tasks", options.task, "AUTO_MODEL"))


def unused_modules(options: Model) -> tuple[str, ...]:
    """Names of modules that models of the recipe's task have no use for."""
    return tuple(plugins.declared("tasks", options.task, "WITHOUT", ()))


def _without(model: PreTrainedModel, options: Model) -> PreTrainedModel:
    """The model without such modules: transformers' own code knows that they may be None."""
    for name in unused_modules(options):
        if isinstance(getattr(model, name, None), nn.Module):
            model.register_module(name, None)
    return model


def sees(config: transformers.PretrainedConfig) -> bool:
    """Whether transformers knows a model as one of images and text, and not as a causal language model."""
    known_as_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return images and not known_as_text and not config.is_encoder_decoder


def _from_pretrained(
    options: Model,
    folder: Path,
    config: transformers.PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    whole: Sequence[str],
) -> PreTrainedModel:
    """The model with its weights; only modules that train whole may be new, and they are never quantized."""
    auto = _auto(options, config)
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": options.trust_remote_code}
    arguments["ignore_mismatched_sizes"] = bool(whole)  # a head for another number of classes; looked at below
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit or options.load_in_8bit:
        arguments["quantization_config"] = _quantization(options, dtype, whole)
        arguments["device_map"] = {"": device}
    elif quantization_of(folder) == MXFP4:  # kernels that compute in it have no backward pass
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        model, info = auto.from_pretrained(folder, output_loading_info=True, **arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the library makes of somebody else's files
        if ASKS_FOR_TRUST in str(error):
            raise needs_trust(folder) from None
        reason = str(error).partition("\nModel type should be")[0]  # without the names of all other models
        two = auto_name(options) == CAUSAL and config.is_encoder_decoder
        raise UsageError(
            f"the model in {folder} does not load as {options.task}: {reason}",
            "it is an encoder with a decoder: set model.task: seq2seq-lm" if two else None,
        ) from None
    left_out = unused_modules(options)
    _without(model, options)
    mismatched = [key[0] for key in info["mismatched_keys"]]
    missing = sorted(name for name in {*info["missing_keys"], *mismatched} if not inside(name, (*whole, *left_out)))
    if missing:
        raise UsageError(
            f"the weights in {folder} lack {len(missing)} tensors of the model, such as {missing[0]}",
            "the files are incomplete or of another architecture",
        )
    for module in model.modules():
        # On some CPUs bitsandbytes repacks a 4-bit weight for inference at the first evaluation, and there is no way
        # back to training; some shapes even fail.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model if "device_map" in arguments else model.to(device)


def _quantization(options: Model, dtype: torch.dtype, whole: Sequence[str]) -> transformers.BitsAndBytesConfig:
    kept = list(whole) or None  # None: transformers keeps the output layer
    if options.load_in_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def precision_of(base: Base) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which training ran the model's forward pass: autocast where its weights are below fp32."""
    if base.dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, base.model.device.type, dtype=base.dtype)
