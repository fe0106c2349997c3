"""What the tests of data share: a recipe section without the recipe module, tokenizers, and chat templates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dynlora_cli.config.sections import Model
from dynlora_cli.tasks import task as tasks
from dynlora_cli.tasks.task import Task

FIXTURES = Path(__file__).parent / "fixtures"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|tail|>", "[INST]", "[/INST]"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
THINKING = (  # as Qwen3: thinking stays only after the last question; the last turn gets an empty one if it has none
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROLE_TOKENS = (  # as builtin:tiny
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXTS = ["the cat sat on the mat", "a quick brown fox jumps over the lazy dog", "user assistant system think"] * 20


def byte_tokenizer(template: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2, Llama 3 and Qwen have; bos is added; pad equals eos."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | special
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=SPECIAL[2:], **names)
    tokenizer.chat_template = template
    return tokenizer


def space_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE that puts a space before every text, as Llama 2's does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    letters = [*"abcdefghijklmnopqrstuvwxyz.:\n▁"]
    special = ["<unk>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=special, initial_alphabet=letters, show_progress=False, max_token_length=6
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def source(path: Path | str, **settings: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = {"format": "auto", "split": "train", "name": None, "columns": {}, "ignore": []}
    defaults |= {"rows": None, "weight": 1.0, "chat_template_kwargs": {}, "system": None, "descriptions": None}
    return SimpleNamespace(**(defaults | settings), path=str(path))


def dataset(*train: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"val": [], "val_size": 0.0, "max_length": 128, "packing": False, "train_on": "auto"}
    defaults |= {"overlong": "truncate", "chat_template": None, "chat": "auto", "separator": "", "retrieve": None}
    defaults |= {"chat_template_kwargs": {}, "system": None, "reasoning": "keep", "streaming": False}
    defaults |= {"shuffle_buffer": 10_000, "shuffle": True}
    defaults |= {"cache": False}
    sources = [item if isinstance(item, SimpleNamespace) else source(item) for item in train]
    return SimpleNamespace(**(defaults | settings), train=sources)


def task_named(name: str = "causal-lm") -> Task:
    """The task of a recipe that says nothing else about its model."""
    return tasks.of(Model(name_or_path="builtin:tiny", task=name))
