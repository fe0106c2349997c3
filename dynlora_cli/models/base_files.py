"""The files of a base model: opened once, and handed to whoever wants to know something of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedTokenizerBase

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.models.alone import making_a_model
from dynlora_cli.models.find import find_model, needs_trust, quantization_in
from dynlora_cli.models.pipelines.find import needs_pipeline
from dynlora_cli.models.tokenizer import load_tokenizer
from dynlora_cli.text import show

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model
    from dynlora_cli.models.new_tokens import NewTokens

# Models that train on texts of one length alone; batches here are as long as their longest row.
FIXED_LENGTHS = {"reformer"}


class BaseFiles:
    """A base model's folder on this machine; what its files say is read when it is first asked for, and once.

    Args:
        options: a recipe's `model` section; says whether code in the folder may run.
        folder: the files.
        reference: how an adapter should name the model: a folder, or a hub id.

    Attributes:
        rows: the table must have so many, with those that an adapter brings; 0: it brings none.
        planning: nothing is to be loaded: the folder may lack weights.
        new: tokens that the tokenizer got for a run, and whose rows train.
    """

    def __init__(self, options: Model, folder: Path, reference: str, rows: int = 0) -> None:
        self.options, self.folder, self.reference, self.rows = options, folder, reference, rows
        self.planning = False
        self.new: NewTokens | None = None

    @classmethod
    def find(cls, options: Model, *, planning: bool = False) -> BaseFiles:
        """The files of the model that a recipe names; for a plan, weights are neither fetched nor asked for.

        Raises:
            UsageError, MachineError: as `find_model`.
        """
        files = cls(options, *find_model(options, weights=not planning))
        files.planning = planning
        return files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_object(self.folder / "config.json")

    @property
    def quantization(self) -> str | None:
        """The method by which the weights are stored quantized, such as "bitsandbytes"; None: they are not."""
        return quantization_in(self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, with a pad token; of a denoiser, the one that lies beside it."""
        folder = self.folder.parent / "tokenizer" if needs_pipeline(self.options) else self.folder
        return load_tokenizer(folder, trust_remote_code=self.options.trust_remote_code)

    @cached_property
    def context_length(self) -> int | None:
        """The longest input that the model knows, in tokens; None where its config does not say.

        Raises:
            UsageError: the config says nonsense.
        """
        config = self.config
        if isinstance(config.get("text_config"), dict):  # a model of images and text
            config = {**config, **config["text_config"]}
        positions = config.get("max_position_embeddings") or config.get("n_positions")
        if isinstance(positions, float) and positions.is_integer():
            positions = int(positions)  # as some configs of audio models write it
        if positions is not None and (type(positions) is not int or positions < 1):
            where = self.folder / "config.json"
            raise UsageError(f"{where} is damaged: its number of positions is {show(positions)}")
        return positions - _kept_for_padding(self.folder, positions) if positions else None

    @property
    def table_rows(self) -> int | None:
        """How many tokens there are rows for, those of an adapter included; None where the config does not say."""
        return None if self.own_rows is None else max(self.own_rows, self.rows)

    @cached_property
    def own_rows(self) -> int | None:
        """How many tokens the model has rows for, by its config; None where that does not say."""
        try:
            config: Any = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            size = getattr(config.get_text_config(), "vocab_size", None)
        except Exception:  # whatever is wrong with the folder is told when the model is loaded
            return None
        return size if type(size) is int and size > 0 else None

    def refuse_fixed_lengths(self) -> None:
        """Refuse a model that trains on texts of one length alone.

        Raises:
            UsageError: it is such a model.
        """
        if (kind := self.config.get("model_type")) in FIXED_LENGTHS:
            raise UsageError(
                f"{self.folder} is a model of type {kind}, which trains only on texts that fill its positions or its "
                "chunks exactly; such models are not supported",
                "name a model of another type as model.name_or_path",
            )

    def refuse_code(self, *, trained_with_it: bool = False) -> None:
        """Refuse a model that is made of Python code of its own, unless the person trusts it.

        Args:
            trained_with_it: the record of a run says that it was trusted in training.

        Raises:
            UsageError: it has such code, it cannot do without, and nobody trusts it.
        """
        trusted = self.options.trust_remote_code
        if trusted or not self.config.get("auto_map") or self.config.get("model_type") in CONFIG_MAPPING:
            return
        raise needs_trust(self.folder, trained_with_it=trained_with_it)


def _kept_for_padding(folder: Path, positions: int) -> int:
    """The number of rows in the table of positions that no token of a text uses.

    RoBERTa and models like it number positions from the row behind that of padding, but their config counts all rows.
    Such a table has a row for padding; BERT's has none. Only masked language models do this, so only those are built.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            return 0
        with making_a_model(), torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:  # whatever is wrong with the folder is told when the model is loaded
        return 0
    named = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    tables = (module for module in named if hasattr(module, "padding_idx"))  # Reformer's, made of two, has none
    padding = (table.padding_idx for table in tables if table.weight.shape[0] == positions)
    return next((row + 1 for row in padding if row is not None), 0)
