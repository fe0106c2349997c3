"""Text as it comes: pieces are whole characters, and together the text; nothing of a stop string is shown."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_helpers import byte_tokenizer, space_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynlora_cli.decoding.pieces import HALF, Pieces

TEXTS = [
    "count the words, please.",
    "👩‍👩‍👧 and 🇩🇪 and 😀😀",
    "Привет, мир; 你好 世界\n\n\tok",
    "e\u0301 naïve — “quoted” … \u200d",
    " leading and trailing ",
    "a\ufffdb",
    "",
]


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words with ▁ and bytes for all else, as Llama 2's: its decoder reads a run of bytes as a whole."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for piece in ("▁", "▁count", "▁the", "a", "b", "e", "o", "n", "t", ",", "."):
        vocabulary.setdefault(piece, len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def streamed(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = (), before: Sequence[int] = ()) -> list[str]:
    pieces = Pieces(tokenizer, stops, before)
    found = []
    for token in ids:
        found.append(pieces.push(token))
        if pieces.stopped:
            break
    found.append(pieces.finish())
    assert "".join(found) == pieces.text
    assert pieces.finish() == ""
    return found


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback, space_tokenizer])
def test_pieces_are_the_text(make: Any, text: str):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = streamed(tokenizer, ids)
    assert "".join(found) == decoded(tokenizer, ids)
    if HALF not in text and make is not space_tokenizer:
        assert not any(HALF in piece for piece in found), "a character comes whole"


def test_a_piece_comes_with_its_token():
    tokenizer = byte_tokenizer()
    ids = tokenizer("count words", add_special_tokens=False)["input_ids"]
    found = streamed(tokenizer, ids)
    assert found == [decoded(tokenizer, [token]) for token in ids] + [""]


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback])
def test_any_tokens_at_all(make: Any):
    """Half characters, special tokens and garbage in any order: what is shown is the text, and never taken back."""
    tokenizer, draw = make(), random.Random(0)
    whole = 0
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randint(0, 30))]
        text = "".join(streamed(tokenizer, ids))
        if make is byte_tokenizer:
            whole += text == decoded(tokenizer, ids)
    if make is byte_tokenizer:
        assert whole > 150, "but for garbage that goes on for many tokens"


def test_a_character_that_never_comes_to_its_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ok 😀", add_special_tokens=False)["input_ids"][:-1]
    *shown, last = streamed(tokenizer, ids)
    assert "".join(shown) == "ok "
    assert last.strip(HALF) == ""
    assert last


def test_the_space_after_a_prompt():
    """A continuation keeps the space before its first word, a turn of its own does not have one."""
    tokenizer = space_tokenizer()
    prompt = tokenizer("count", add_special_tokens=False)["input_ids"]
    ids = tokenizer("count words", add_special_tokens=False)["input_ids"][len(prompt) :]
    assert "".join(streamed(tokenizer, ids, before=prompt)) == " words"
    assert "".join(streamed(tokenizer, ids)) == "words"


def test_special_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    word = tokenizer("count", add_special_tokens=False)["input_ids"]
    assert "".join(streamed(tokenizer, [0, *word, 1, *word, 2])) == "countcount"


# -- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("one\n", ["\n\n"], "one\n"),
        ("stop", ["stop"], ""),
        ("aab aabc", ["abc", "c"], "aab a"),
        ("User: hi", ["User:", "User"], ""),
        ("ab 😀 cd", ["😀"], "ab "),
        ("abab", ["abac", "bab"], "a"),
        ("xxxy", ["xxy"], "x"),
    ],
)
@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback])
def test_a_stop_string(make: Any, text: str, stops: list[str], shown: str):
    tokenizer = make()
    found = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], stops)
    assert "".join(found) == shown


def test_no_beginning_of_a_stop_string_is_ever_shown():
    tokenizer, draw = byte_tokenizer(), random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("ab😀 ") for _ in range(draw.randint(0, 20)))
        stops = ["".join(draw.choice("ab😀 ") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        found = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], stops)
        places = [text.find(stop) for stop in stops if stop in text]
        # The stop that comes to its end first decides; what is shown ends no later than where one begins.
        assert text.startswith("".join(found))
        assert not any(stop in "".join(found) for stop in stops)
        if not places:
            assert "".join(found) == text
        else:
            assert len("".join(found)) <= max(places)


# -- real tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories3M", "stories260K", "gpt2-tokenizer"])
def test_pieces_of_real_tokenizers(name: str, shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    draw = random.Random(2)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)
    for _ in range(200):
        streamed(tokenizer, [draw.randrange(len(tokenizer)) for _ in range(30)])
