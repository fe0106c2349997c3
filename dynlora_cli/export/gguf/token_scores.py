"""SentencePiece-like BPE for llama.cpp: scores out of the order of merges, and the checks that they mean the same.

tokenizer.json lists merges: pairs, the most urgent first. llama.cpp knows no pairs: it joins any two neighbours whose
texts together are a token, the token with the highest score first, the leftmost of equals. The two agree if

1. every pair of reachable pieces that together give a token is listed as a merge, and
2. the merges that give the same token stand together in the order, so that one score per token says it all.

What is left is the order among merges of the same token, listed on the one side and from the left on the other. It
matters only where two of them touch, and a trial on texts made of the tokens themselves shows whether that happens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dynlora_cli.errors import UsageError

SPACE = "▁"
# What Gemma does after its normalizer has replaced all spaces: nothing.
CUT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_TRIALS = 200
INSTEAD = "export with `--to merged`, which keeps the tokenizer's own files"


def byte_tokens(vocab: Mapping[str, int]) -> list[int]:
    """Ids of `<0x00>` to `<0xFF>`.

    Raises:
        UsageError: one is missing.
    """
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    missing = [name for name in names if name not in vocab]
    if missing:
        raise UsageError(
            f"the tokenizer has neither byte-level pieces nor a token for every byte; {missing[0]} is missing", INSTEAD
        )
    return [vocab[name] for name in names]


def scores(model: Mapping[str, Any], tokens: Sequence[str], added: Collection[str]) -> list[float]:
    """A score for every token: minus the place of its merges in the order.

    Args:
        model: the section of tokenizer.json, a BPE.
        tokens: by id.
        added: texts of added tokens, which are cut out before anything is merged.

    Returns:
        One per token; tokens that no merge gives have less than all others.

    Raises:
        UsageError: llama.cpp would merge otherwise; see the two rules above.
    """
    if not model.get("byte_fallback") or model.get("ignore_merges"):
        raise UsageError("the tokenizer is neither byte-level nor a plain BPE with byte_fallback", INSTEAD)
    pairs = [(left, right) for left, right in model["merges"]]
    place: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        token = left + right
        if token != last and token in place:
            raise _inconsistent(f"the merges that give {token!r} do not stand together")
        place.setdefault(token, len(place))
        last = token
    plain = [token for token in model["vocab"] if token not in added]
    _check_complete(set(pairs), place, plain)
    _try(pairs, place, plain)
    return [-float(place.get(token, len(place))) for token in tokens]


def _check_complete(pairs: Collection[tuple[str, str]], place: Mapping[str, int], tokens: Sequence[str]) -> None:
    """Rule 1; a piece is reachable if it is a character or a merge gives it."""
    for token in tokens:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if all(len(piece) == 1 or piece in place for piece in (left, right)) and (left, right) not in pairs:
                raise _inconsistent(f"llama.cpp would merge {left!r} and {right!r}, and the tokenizer does not")


def _try(pairs: Sequence[tuple[str, str]], place: Mapping[str, int], tokens: Sequence[str]) -> None:
    """Merge texts of random tokens by both rules."""
    rank = {pair: index for index, pair in enumerate(pairs)}
    generator = random.Random(0)
    for _ in range(_TRIALS):
        text = "".join(generator.choices(tokens, k=8))
        listed = _merge(text, lambda left, right: rank.get((left, right)))
        scored = _merge(text, lambda left, right: place.get(left + right))
        if listed != scored:
            raise _inconsistent(f"of {text!r} the one makes {listed}, the other {scored}")


def _merge(text: str, urgency: Callable[[str, str], int | None]) -> list[str]:
    """Join the most urgent (lowest) pair of neighbours, the leftmost of equals, until none is left."""
    pieces = list(text)
    while True:
        found = [(urgency(*pair), index) for index, pair in enumerate(pairwise(pieces))]
        ready = [(rank, index) for rank, index in found if rank is not None]
        if not ready:
            return pieces
        index = min(ready)[1]
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


def space_prefix(data: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a space is put before a text; llama.cpp puts one at the start and after each special token.

    Args:
        data: tokenizer.json.
        notes: gets a line where the two differ in corners.

    Raises:
        UsageError: spaces are treated in a way that llama.cpp does not have.
    """
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if pre in (None, CUT_AT_SPACES) and steps in ([prepend, replace], [replace]):
        return steps[0] == prepend
    scheme = _metaspace_scheme(pre) if normalizer is None else None
    if scheme is None:
        raise UsageError(
            f"llama.cpp does not treat spaces as the tokenizer does: normalizer {normalizer}, pre_tokenizer {pre}",
            INSTEAD,
        )
    if scheme != "never":
        after = "nothing" if scheme == "first" else "a space"
        notes.append(
            "spaces: llama.cpp puts one before every text and after every special token; the tokenizer puts none "
            f"before a text that starts with one, and {after} after special tokens"
        )
    return scheme != "never"


def _metaspace_scheme(pre: Mapping[str, Any] | None) -> str | None:
    """always | first | never, of a pre-tokenizer that only turns spaces into `▁`; None: it does something else."""
    if pre is None or pre["type"] != "Metaspace" or pre["replacement"] != SPACE or pre.get("split", True):
        return None
    return pre["prepend_scheme"]


def _inconsistent(what: str) -> UsageError:
    return UsageError(f"the tokenizer's merges cannot be said with one score per token: {what}", INSTEAD)
