"""How a recipe's model makes vectors: what the recipe says, else what the base's own files say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import transformers

from dynlora_cli.errors import UsageError
from dynlora_cli.models.find import find_model, is_encoder_decoder
from dynlora_cli.tasks.embedding.files import MODULES, own_reading
from dynlora_cli.tasks.embedding.pooling import Reading

if TYPE_CHECKING:
    from pathlib import Path

    from dynlora_cli.config.sections import Model


def reading_of(options: Model, longest: int | None = None) -> tuple[Reading, list[str]]:
    """How texts become vectors.

    Args:
        options: the recipe's `model` section, with the keys of the task; one that lacks them leaves all to the base.
        longest: tokens that are read of a text at most; the base's own limit may be lower.

    Returns:
        It, and what there is to say of it.

    Raises:
        UsageError: the base is an encoder with a decoder, or its files say something that is not done here.
    """
    folder, _ = find_model(options, weights=False)
    if is_encoder_decoder(folder):
        raise UsageError(
            f"model.task: {options.task} needs a model that is an encoder or a decoder alone, and {folder} is both",
            "name another base",
        )
    asked = {key: getattr(options, key, None) for key in ("pooling", "normalize", "query_prompt", "passage_prompt")}
    given = {key: value for key, value in asked.items() if value is not None and value != "auto"}
    own = own_reading(folder, pooling=given.get("pooling"))
    base = own or Reading("last" if _is_decoder(folder) else "mean", normalize=True)
    reading = replace(base, **given)
    limits = [limit for limit in (longest, base.longest) if limit]
    reading = replace(reading, longest=min(limits, default=None))
    source = "as its own files say" if own else f"by default, since the base has no {MODULES}"
    words = [f"pooling {reading.pooling}", "length 1" if reading.normalize else "any length"]
    whose = source if not {"pooling", "normalize"} & given.keys() else "as the recipe says"
    says = [f"vectors: {', '.join(words)} ({whose})"]
    if own and base.longest and longest and base.longest < longest:
        says.append(f"texts are read to {base.longest} tokens, as the base's own files say")
    for name in ("query_prompt", "passage_prompt"):
        if (text := getattr(reading, name)) and name not in given:
            says.append(f"{name} {text!r}, as the base's own files say")
    return reading, says


def _is_decoder(folder: Path) -> bool:
    """Whether a model reads from left to right alone, so that only its last token has seen the whole text."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = type(config.get_text_config())
    return text in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and text not in transformers.MODEL_FOR_MASKED_LM_MAPPING
