"""Tokens of every kind of vocabulary are shown as text that can be read and does no harm."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_mdm.corpus.tokenizer_training import train_byte_level_bpe
from megatron_mdm.inference.replay.pieces import Piece, PieceReader


def fast(backend, **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def byte_level():
    return fast(train_byte_level_bpe(["the the the"], 262), eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    "text", ["the the", "\u20ac5 \U0001f600", "a\tb\n", "\x00\x7f\u200b\u202e\r"]
)
def test_the_bytes_of_pieces_are_those_of_the_text(byte_level, text):
    pieces = [PieceReader(byte_level).read_piece(token) for token in byte_level.encode(text)]
    raw = b"".join(
        piece.raw or piece.text.encode("ascii").decode("unicode_escape").encode("latin-1")
        for piece in pieces
    )
    assert raw == text.encode()
    assert all(char.isprintable() or char in "\n\t" for piece in pieces for char in piece.text)


def test_parts_of_characters_are_shown_as_bytes(byte_level):
    pieces = [PieceReader(byte_level).read_piece(token) for token in byte_level.encode("\u20ac")]
    assert pieces == [
        Piece("\\xe2", "bytes", b"\xe2"),
        Piece("\\x82", "bytes", b"\x82"),
        Piece("\\xac", "bytes", b"\xac"),
    ]


def test_special_tokens_and_unknown_ids_are_told_apart(byte_level):
    reader = PieceReader(byte_level)
    assert reader.read_piece(0) == Piece("<|endoftext|>", "special")
    assert reader.read_piece(9999) == Piece("<9999>", "special")


def test_the_spaces_and_bytes_of_sentencepiece_vocabularies_are_shown():
    words = {"<unk>": 0, "\u2581the": 1, "cat": 2, "<0xE2>": 3, "<0x41>": 4, "\u20ac": 5}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    reader = PieceReader(fast(backend, unk_token="<unk>"))
    assert [reader.read_piece(token) for token in range(6)] == [
        Piece("<unk>", "special"),
        Piece(" the", "text"),
        Piece("cat", "text"),
        Piece("\\xe2", "bytes", b"\xe2"),
        Piece("A", "text"),
        Piece("\u20ac", "text"),
    ]


def test_a_vocabulary_of_words_is_shown_as_it_is():
    backend = Tokenizer(models.WordLevel({"caf\u00e9": 0, "Ġx": 1}, unk_token="caf\u00e9"))
    reader = PieceReader(fast(backend))
    assert [reader.read_piece(token).text for token in range(2)] == ["caf\u00e9", "Ġx"]
