"""A tokenizer as GGUF keys, told from the structure of its tokenizer.json and from what it does when it encodes.

    gpt2    byte-level BPE: tokens, merges, and the name of a pre-tokenizer that llama.cpp has under that name
    llama   SentencePiece-like BPE with `▁` and byte fallback: tokens and scores (token_scores.py)

A pre-tokenizer is recognized only if it is the same, step by step; llama.cpp would tokenize with a wrong name as well,
and a model that reads other tokens than it was trained on is wrong in a way that nobody sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.token_scores import byte_tokens, scores, space_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
INSTEAD = "export with `--to merged`, which keeps the tokenizer's own files"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    _CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = ("ByteLevel", False, False)
# Steps of a pre-tokenizer, and whether a word that is a token is taken without merging, to llama.cpp's name of both.
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((("ByteLevel", False, True),), False): "gpt-2",
    ((("Split", _GPT2), _PLAIN), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", False, True)), False): "smollm",
    ((("Split", _MODERN.format(digits="")), _PLAIN), False): "qwen2",
    ((("Split", _MODERN.format(digits="{1,3}")), _PLAIN), True): "llama-bpe",
    ((("Split", _MODERN.format(digits="{1,3}")), _PLAIN), False): "dbrx",  # GPT-4's: OLMo 2, Granite 4, Phi 4
    ((("Split", _GPT4O), _PLAIN), False): "gpt-4o",  # Phi 4 mini
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer's part of a GGUF file.

    Args:
        tokens: texts by token id, as long as the model's embedding has rows.
        types: GGUF's token types.
        scores: of "llama": the higher, the earlier it is merged; None for "gpt2".
        merges: of "gpt2": two texts with a space between, the first first; None for "llama".
        keys: the other keys below `tokenizer.`, by their full name.
        notes: where llama.cpp may tokenize otherwise.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    keys: dict[str, int | bool | str]
    notes: list[str] = field(default_factory=list)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with tokenizer.json; nothing is looked up anywhere else.

    Raises:
        UsageError: there is none, or not one of a form that GGUF files can be made from.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder} has no tokenizer.json", "save it there with the tokenizer's save_pretrained")
    if not (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library makes of somebody else's files
        raise UsageError(f"no tokenizer loads from {folder}: {error}", INSTEAD) from None


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, config: Mapping[str, Any]) -> Vocabulary:
    """The GGUF form of a tokenizer.

    Args:
        tokenizer: with a tokenizers backend.
        size: rows of the model's embedding; ids without a token become unused ones.
        config: content of config.json, for the bos and eos ids that the tokenizer does not name.

    Raises:
        UsageError: llama.cpp has no such tokenizer, or would not give the same tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} has no tokenizer.json form", INSTEAD)
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise UsageError(f"a tokenizer of type {model['type']} has no GGUF form here; supported: BPE", INSTEAD)
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UsageError("a BPE with dropout, word prefixes or suffixes has no GGUF form here", INSTEAD)
    notes: list[str] = []
    steps = _steps(data["pre_tokenizer"])
    byte_level = any(step[0] == "ByteLevel" for step in steps)
    tokens, types = _tokens(data, size, notes)
    keys: dict[str, int | bool | str] = {"tokenizer.ggml.model": "gpt2" if byte_level else "llama"}
    ranks: list[float] | None = None
    merges: list[str] | None = None
    if byte_level:
        keys["tokenizer.ggml.pre"] = _pre(steps, model, data["normalizer"], notes)
        merges = [" ".join(pair) for pair in model["merges"]]
    else:
        keys |= {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": space_prefix(data, notes)}
        for index in byte_tokens(model["vocab"]):
            types[index] = BYTE
        unknown = model["vocab"].get(model["unk_token"] or tokenizer.unk_token)
        if unknown is not None:
            types[unknown] = UNKNOWN
        ranks = scores(model, tokens, {token["content"] for token in data["added_tokens"]})
    return Vocabulary(tokens, types, ranks, merges, keys | special_keys(tokenizer, config), notes)


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding puts the bos token before a text, and the eos token behind it: as it does, not as it says.

    Raises:
        UsageError: it adds anything else, which llama.cpp cannot.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == (bos if before else []) + plain + (eos if after else []):
            return before, after
    raise UsageError(f"the tokenizer makes {whole} of {plain}: neither bos before nor eos behind", INSTEAD)


def special_keys(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> dict[str, int | bool | str]:
    """Keys of the special tokens and the chat template.

    Raises:
        UsageError: neither tokenizer nor config name the token that ends a text. llama.cpp would take a fixed id.
    """
    before, after = added_ids(tokenizer)
    keys: dict[str, int | bool | str] = {"tokenizer.ggml.add_bos_token": before, "tokenizer.ggml.add_eos_token": after}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, gguf in names.items():
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            keys[f"tokenizer.ggml.{gguf}_token_id"] = index
    for name in ("eos", "bos"):
        index = config.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int):
            keys.setdefault(f"tokenizer.ggml.{name}_token_id", index)
    if "tokenizer.ggml.eos_token_id" not in keys:
        raise UsageError("neither the tokenizer nor config.json name an eos token", "set eos_token_id in config.json")
    # Without one, llama.cpp takes a fixed id as well; GPT-2 and Qwen begin a text with the token that ends one.
    keys.setdefault("tokenizer.ggml.bos_token_id", keys["tokenizer.ggml.eos_token_id"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _tokens(data: Mapping[str, Any], size: int, notes: list[str]) -> tuple[list[str], list[int]]:
    """Texts and types by id, filled up to `size`."""
    known = {index: text for text, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(known, NORMAL)
    for token in data["added_tokens"]:
        known[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            notes.append(f"token {token['content']!r} swallows spaces or wants whole words; llama.cpp ignores that")
        elif token["normalized"] and (data["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            notes.append(f"the tokenizer looks for token {token['content']!r} in normalized text, llama.cpp as it is")
    if max(known) >= size:
        raise UsageError(
            f"the tokenizer has token id {max(known)}, and the model's embedding {size} rows",
            "model and tokenizer do not belong together",
        )
    texts = set(known.values())
    for index in range(size):
        if index not in known:
            known[index] = f"[PAD{index}]" if f"[PAD{index}]" not in texts else f"[UNUSED_PAD{index}]"
            types[index] = UNUSED
    if len(set(known.values())) != size:
        raise UsageError("two tokens of the tokenizer have the same text, which llama.cpp cannot load", INSTEAD)
    return [known[index] for index in range(size)], [types[index] for index in range(size)]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """The steps of a pre-tokenizer with all that decides about its pieces; what is not known keeps all its settings."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        return (("ByteLevel", bool(pre_tokenizer["add_prefix_space"]), bool(pre_tokenizer.get("use_regex", True))),)
    if kind == "Digits":
        return (("Digits", bool(pre_tokenizer["individual_digits"])),)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return (("Split", pre_tokenizer["pattern"].get("Regex")),)
    return ((kind, json.dumps(pre_tokenizer, sort_keys=True)),)


def _pre(
    steps: tuple[tuple[Any, ...], ...], model: Mapping[str, Any], normalizer: Mapping[str, Any] | None, notes: list[str]
) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer."""
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        shown = " + ".join(str(step) for step in steps)
        raise UsageError(
            f"the tokenizer's pre_tokenizer is none that llama.cpp is known to have: {shown}, "
            f"ignore_merges {bool(model.get('ignore_merges'))}; "
            f"known: {', '.join(sorted(set(PRE_TOKENIZERS.values())))}",
            INSTEAD,
        )
    if name == "gpt-4o":
        notes.append("llama.cpp may cut words with combining marks, as of Hindi or Thai, otherwise than the tokenizer")
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise UsageError(f"llama.cpp has no normalizer like the tokenizer's {normalizer['type']}", INSTEAD)
        notes.append("the tokenizer composes characters (NFC), llama.cpp does not: give it composed text")
    return name
