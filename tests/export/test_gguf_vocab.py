"""A tokenizer's GGUF keys mean what the tokenizer does; one that llama.cpp would not follow is refused, never guessed.

Token by token this is tried with the real llama.cpp, in test_llama_cpp.py.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
import pytest
from data_helpers import byte_tokenizer, space_tokenizer
from tiny_gguf import PRE_TOKENIZERS, export_base, make, pre_tokenizer, trained_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynlora_cli.errors import UsageError
from dynlora_cli.export.gguf.token_scores import scores, space_prefix
from dynlora_cli.export.gguf.vocabulary import BYTE, CONTROL, UNUSED, USER_DEFINED, added_ids, vocabulary

CONFIG = {"eos_token_id": 1}


def test_keys_of_a_byte_level_tokenizer(tmp_path):
    export_base(make(tmp_path / "llama", "llama"), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found, tokenizer = {name: field.contents() for name, field in fields.items()}, byte_tokenizer()
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = found["tokenizer.ggml.token_type"]
    assert (types[0], types[100], types[351], len(types)) == (CONTROL, 1, UNUSED, 352)
    names = ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "padding_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == [True, False, 0, 1, 1]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_is_recognized_by_what_it_does(name):
    found = vocabulary(trained_tokenizer(name), 400, CONFIG)
    assert found.keys["tokenizer.ggml.pre"] == name
    noted = {"qwen2": "composes characters", "gpt-4o": "combining marks"}
    assert [noted[name] in note for note in found.notes] == [True] * (name in noted)


def test_a_pre_tokenizer_that_is_not_known_is_refused_not_guessed():
    tokenizer = trained_tokenizer("llama-bpe")
    for other in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizer("qwen2"), pre_tokenizers.ByteLevel(use_regex=False)]),
        pre_tokenizer("gpt-2"),  # which llama.cpp does not join with taking whole words first
    ):
        tokenizer.backend_tokenizer.pre_tokenizer = other
        with pytest.raises(UsageError, match="pre_tokenizer is none that llama"):
            vocabulary(tokenizer, 400, CONFIG)


def test_other_kinds_of_tokenizers_are_refused():
    for model in (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), models.Unigram([("a", -1.0)], 0)):
        with pytest.raises(UsageError, match=f"type {type(model).__name__}"):
            vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), 400, CONFIG)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(UsageError, match="embedding 200 rows"):
        vocabulary(byte_tokenizer(), 200, CONFIG)


def test_a_tokenizer_without_an_end_takes_it_from_the_config_or_is_refused():
    tokenizer = byte_tokenizer(eos_token=None, pad_token=None)
    assert vocabulary(tokenizer, 352, {"eos_token_id": [7, 1]}).keys["tokenizer.ggml.eos_token_id"] == 7
    with pytest.raises(UsageError, match="eos"):
        vocabulary(tokenizer, 352, {})


def test_what_is_added_is_seen_by_encoding():
    tokenizer = byte_tokenizer()
    assert added_ids(tokenizer) == (True, False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert added_ids(tokenizer) == (False, False)
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    assert added_ids(tokenizer) == (True, True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eot|>", special_tokens=[("<|eot|>", 4)]
    )
    with pytest.raises(UsageError, match="neither bos before nor eos behind"):
        added_ids(tokenizer)


def test_added_tokens_that_are_not_special_are_user_defined():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert vocabulary(tokenizer, 352, CONFIG).types[len(tokenizer) - 1] == USER_DEFINED


def test_tokens_that_llama_cpp_would_look_for_in_another_way_are_noted():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", rstrip=True, normalized=False)])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    notes = vocabulary(tokenizer, 352, CONFIG).notes
    assert ["'<call>' swallows spaces" in note for note in notes] == [True, False], "the other is about NFC"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentence_piece_backend([("t", "h")]), unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<call>", normalized=True)])
    assert "'<call>' in normalized text" in " ".join(vocabulary(tokenizer, 270, CONFIG).notes)


# -- SentencePiece-like ----------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentence_pieces(merges: list[tuple[str, str]], *more: str) -> dict[str, Any]:
    letters = sorted({letter for pair in merges for piece in pair for letter in piece} | {"▁"})
    made = dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate(["<unk>", *BYTES, *letters, *made, *more])}
    return {"vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}


def sentence_piece_backend(merges: list[tuple[str, str]]) -> Tokenizer:
    backend = Tokenizer(models.BPE(**sentence_pieces(merges)))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def test_scores_follow_the_order_of_merges():
    model = sentence_pieces([("t", "h"), ("h", "e"), ("t", "he"), ("th", "e")])
    found = dict(zip(model["vocab"], scores(model, list(model["vocab"]), {"<unk>"}), strict=True))
    assert [found[token] for token in ("th", "he", "the")] == [0.0, -1.0, -2.0]
    assert found["t"] < -2.0


@pytest.mark.parametrize(
    ("merges", "more", "message"),
    [
        ([("t", "h"), ("h", "e"), ("th", "e")], [], "would merge 't' and 'he'"),
        ([("t", "h"), ("t", "he"), ("h", "e"), ("th", "e")], [], "'the' do not stand together"),
        ([("t", "h")], ["ht"], "would merge 'h' and 't'"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(merges, more, message):
    model = sentence_pieces(merges, *more)
    with pytest.raises(UsageError, match=message):
        scores(model, list(model["vocab"]), {"<unk>"})


def test_pieces_without_a_token_for_every_byte_are_refused():
    with pytest.raises(UsageError, match="a token for every byte; <0x00> is missing"):
        vocabulary(space_tokenizer(), 400, CONFIG)


def test_types_of_sentence_pieces():
    backend = sentence_piece_backend([("t", "h")])
    found = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 270, CONFIG)
    assert (found.types[0], found.types[1], found.types[256], found.types[257]) == (2, BYTE, BYTE, 1)
    assert (found.keys["tokenizer.ggml.model"], found.keys["tokenizer.ggml.add_space_prefix"]) == ("llama", True)


def test_pieces_for_every_byte_need_no_unknown_token():
    """transformers' own LlamaTokenizer has none in its BPE."""
    backend = sentence_piece_backend([("t", "h")])
    backend.model = models.BPE(**sentence_pieces([("t", "h")]) | {"unk_token": None})
    assert vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 270, CONFIG).types[0] == 2
    none = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 270, CONFIG)
    assert (none.types[0], "tokenizer.ggml.unknown_token_id" in none.keys) == (1, False)
    backend.model = models.BPE(**sentence_pieces([("t", "h")]) | {"byte_fallback": False})
    with pytest.raises(UsageError, match="byte_fallback"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 270, CONFIG)


def test_who_puts_a_space_before_a_text():
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    both = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    for normalizer, pre, prefix, noted in [
        (both, None, True, False),
        (replace, None, False, False),
        (replace, cut, False, False),  # Gemma
        (None, metaspace | {"prepend_scheme": "never"}, False, False),
        (None, metaspace | {"prepend_scheme": "first"}, True, True),
        (None, metaspace | {"prepend_scheme": "always"}, True, True),
    ]:
        notes: list[str] = []
        assert space_prefix({"normalizer": normalizer, "pre_tokenizer": pre}, notes) == prefix
        assert bool(notes) == noted
    with pytest.raises(UsageError, match="spaces"):
        space_prefix({"normalizer": None, "pre_tokenizer": metaspace | {"split": True, "prepend_scheme": "first"}}, [])
