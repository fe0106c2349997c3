"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import WEIGHT_FILES, refuse_links
from dynlora_cli.models.find import ASKS_FOR_TRUST, needs_trust


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
