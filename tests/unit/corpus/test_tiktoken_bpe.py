from __future__ import annotations

import json

import pytest
from bpe_examples import BYTE_LEVEL, SPLIT, bare_bpe, change, in_sequence, reference_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.corpus.encoding import EncodingSettings, TiktokenEncoder, choose_backend
from megatron_mdm.corpus.tiktoken_bpe import (
    GPT2_PATTERN,
    Untranslatable,
    list_byte_characters,
    translate,
)
from megatron_mdm.corpus.tokenizer_training import train_byte_level_bpe


@pytest.fixture(scope="module")
def ours():
    return train_byte_level_bpe(["def f(x):\n    return x + 1\n", "the café the cat "] * 9, 300)


STRUCTURES = [
    (["model", "dropout"], 0.1, "dropout=0.1"),
    (["model", "byte_fallback"], True, "byte_fallback=True"),
    (["model", "end_of_word_suffix"], "</w>", "end_of_word_suffix='</w>'"),
    (["model", "continuing_subword_prefix"], "##", "continuing_subword_prefix='##'"),
    (["normalizer"], {"type": "NFKC"}, "normalizer is NFKC"),
    (["normalizer"], {"type": "Sequence", "normalizers": []}, "normalizer is Sequence"),
    (["added_tokens", 0, "special"], False, "'<|endoftext|>' is not a special one"),
    (["pre_tokenizer"], None, "pre-tokenizer is none"),
    (["pre_tokenizer"], {"type": "Whitespace"}, "pre-tokenizer is Whitespace"),
    (["pre_tokenizer", "add_prefix_space"], True, "adds a space"),
    (["pre_tokenizer", "use_regex"], False, "does not split"),
    (["pre_tokenizer"], in_sequence({**SPLIT, "behavior": "Removed"}), "splits otherwise"),
    (["pre_tokenizer"], in_sequence({**SPLIT, "invert": True}), "splits otherwise"),
    (["pre_tokenizer"], in_sequence({**SPLIT, "pattern": {"String": "a"}}), "splits otherwise"),
    (
        ["pre_tokenizer"],
        {"type": "Sequence", "pretokenizers": [SPLIT, {**BYTE_LEVEL, "use_regex": True}]},
        "splits the text twice",
    ),
    (
        ["pre_tokenizer"],
        {"type": "Sequence", "pretokenizers": [SPLIT, SPLIT, {**BYTE_LEVEL, "use_regex": False}]},
        "pre-tokenizer is Split and Split and ByteLevel",
    ),
    # An expression that leaves gaps: `tokenizers` keeps what lies between, tiktoken drops it.
    (
        ["pre_tokenizer"],
        in_sequence({**SPLIT, "pattern": {"Regex": r"\p{L}+"}}),
        "encode the text that starts with",
    ),
    (
        ["pre_tokenizer"],
        in_sequence({**SPLIT, "pattern": {"Regex": r"\X"}}),
        "cannot read its regular expression",
    ),
]


@pytest.mark.parametrize(("path", "value", "reason"), STRUCTURES)
def test_other_structures_fall_back(ours, path, value, reason):
    serialised = change(ours, path, value)
    backend, told, _ = choose_backend(serialised, ["the café\n"])
    assert backend == "tokenizers"
    assert reason in told


def test_other_models_fall_back():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert choose_backend(tokenizer.to_str(), [])[:2] == (
        "tokenizers",
        "its model is WordLevel, not BPE",
    )


def test_vocabulary_without_all_bytes_falls_back():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert choose_backend(tokenizer.to_str(), [])[:2] == (
        "tokenizers",
        "its vocabulary lacks the byte 0",
    )


def tiktoken_without_checks(tokenizer, text):
    import tiktoken

    characters = list_byte_characters()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        product = bytes(characters.index(character) for character in left + right)
        ranks.setdefault(product, len(ranks))
    encoding = tiktoken.Encoding(
        "unchecked", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    names = {rank: content for content, rank in ranks.items()}
    return [names[rank] for rank in encoding.encode_ordinary(text)]


def test_merges_that_tiktoken_would_apply_elsewhere_are_caught():
    # tiktoken knows no merges, only tokens: it joins "a" and "bc" to "abc" as well, whereas here
    # only "ab" and "c" may be joined, and "bc" always forms first.
    tokenizer = bare_bpe(["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")])
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert tiktoken_without_checks(tokenizer, "abc") == [b"abc"]
    reason = "its merges do not lead to its token 'abc'"
    assert choose_backend(tokenizer.to_str(), [])[:2] == ("tokenizers", reason)
    ignoring = bare_bpe(
        ["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")], ignore_merges=True
    )
    assert ignoring.encode("xabc").tokens == ["x", "a", "bc"]
    assert tiktoken_without_checks(ignoring, "xabc") == [b"x", b"abc"]
    reason = "its token 'abc' lacks the merge of 'a'"
    assert choose_backend(ignoring.to_str(), [])[:2] == ("tokenizers", reason)


def test_token_made_at_two_times_is_caught():
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    tokenizer = bare_bpe(["ab", "abc", "bc"], merges)
    reason = "its token 'abc' is made by merges far apart"
    assert choose_backend(tokenizer.to_str(), [])[:2] == ("tokenizers", reason)


def test_tokens_that_are_not_made_of_bytes_fall_back():
    tokenizer = bare_bpe(["▁", "▁a"], [("▁", "a")])
    reason = "its token '▁a' is not made of bytes"
    assert choose_backend(tokenizer.to_str(), [])[:2] == ("tokenizers", reason)


def test_whole_piece_without_a_merge_is_caught():
    tokenizer = bare_bpe(["ab", "xyz"], [("a", "b")], ignore_merges=True)
    assert tokenizer.encode("xyz").tokens == ["xyz"]
    reason = "no merge makes its token 'xyz'"
    assert choose_backend(tokenizer.to_str(), [])[:2] == ("tokenizers", reason)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
    st.booleans(),
    st.lists(st.text("abc", min_size=1, max_size=14), min_size=1, max_size=12),
)
def test_random_merges_agree_or_are_refused(choices, order, ignore_merges, words):
    symbols = ["a", "b", "c"]
    merges = []
    for left, right in choices:
        pair = (symbols[left % len(symbols)], symbols[right % len(symbols)])
        if pair not in merges:
            merges.append(pair)
            if "".join(pair) not in symbols:
                symbols.append("".join(pair))
    if order.random() < 0.5:
        order.shuffle(merges)
    tokenizer = bare_bpe(symbols[3:], merges, ignore_merges=ignore_merges)
    try:
        translate(tokenizer.to_str())
    except Untranslatable:
        return
    encoder = TiktokenEncoder(EncodingSettings(tokenizer.to_str(), "<u2", 0, append_eod=False))
    text = " ".join(words)
    assert encoder.encode_batch([text]).tokens.tolist() == reference_ids(tokenizer, text)


def test_special_token_that_is_a_whole_piece_falls_back():
    tokenizer = bare_bpe(["ab", "xyz"], [("a", "b")], ignore_merges=True)
    tokenizer.add_special_tokens(["xyz"])
    assert reference_ids(tokenizer, "xyz") == [tokenizer.token_to_id("xyz")]
    backend, reason, _ = choose_backend(tokenizer.to_str(), [])
    assert backend == "tokenizers"
    assert "'xyz'" in reason
