"""The model's tokenizer, and how long its context is."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import WEIGHT_FILES, read_object, refuse_links
from dynlora_cli.models.load import ASKS_FOR_TRUST, needs_trust
from dynlora_cli.text import show

FIXED_LENGTHS = {"reformer"}


def context_length(folder: Path) -> int | None:
    """The longest input a model knows, in tokens; None where its config does not say."""
    config = read_object(folder / "config.json")
    if isinstance(config.get("text_config"), dict):  # a model of images and text
        config = {**config, **config["text_config"]}
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, float) and positions.is_integer():
        positions = int(positions)  # as some configs of audio models write it
    if positions is not None and (type(positions) is not int or positions < 1):
        raise UsageError(f"{folder / 'config.json'} is damaged: its number of positions is {show(positions)}")
    return positions - _kept_for_padding(folder, positions) if positions else None


def refuse_fixed_lengths(folder: Path) -> None:
    """Refuse a model that trains on texts of one length alone; batches here are as long as their longest row.

    Raises:
        UsageError: it is such a model.
    """
    if (kind := read_object(folder / "config.json").get("model_type")) in FIXED_LENGTHS:
        raise UsageError(
            f"{folder} is a model of type {kind}, which trains only on texts that fill its positions or its chunks "
            "exactly; such models are not supported",
            "name a model of another type as model.name_or_path",
        )


@lru_cache(maxsize=8)
def table_rows(folder: Path) -> int | None:
    """Tokens that a model has rows for, by its config; None where that does not say."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        size = getattr(config.get_text_config(), "vocab_size", None)
    except Exception:  # whatever is wrong with the folder is told when the model is loaded
        return None
    return size if type(size) is int and size > 0 else None


@lru_cache(maxsize=8)
def _kept_for_padding(folder: Path, positions: int) -> int:
    """The number of rows in the table of positions that no token of a text uses.

    RoBERTa and models like it number positions from the row behind that of padding, but their config counts all rows.
    Such a table has a row for padding; BERT's has none. Only masked language models do this, so only those are built.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            return 0
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:  # whatever is wrong with the folder is told when the model is loaded
        return 0
    named = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    tables = (module for module in named if hasattr(module, "padding_idx"))  # Reformer's, made of two, has none
    padding = (table.padding_idx for table in tables if table.weight.shape[0] == positions)
    return next((row + 1 for row in padding if row is not None), 0)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token.

    Raises:
        UsageError: the folder has no tokenizer that loads.
    """
    refuse_links(folder, besides=WEIGHT_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the library makes of somebody else's files
        if ASKS_FOR_TRUST in str(error):
            raise needs_trust(folder) from None
        raise UsageError(f"no tokenizer loads from {folder}: {error}", "put tokenizer.json beside the model") from None
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by id, so sharing the end-of-text token does no harm.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
