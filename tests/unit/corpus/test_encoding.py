from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from bpe_examples import (
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SPLIT,
    bare_bpe,
    change,
    in_sequence,
    reference_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import encoding as encoding_module
from megatron_mdm.corpus.chunk_reader import TextReader
from megatron_mdm.corpus.encoding import (
    EncodingMismatch,
    EncodingSettings,
    TiktokenEncoder,
    choose_backend,
    make_encoder,
)
from megatron_mdm.corpus.probes import make_adversarial_texts
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.corpus.tiktoken_bpe import (
    GPT2_PATTERN,
    Untranslatable,
    list_byte_characters,
)
from megatron_mdm.corpus.tokenizer import END_OF_TEXT
from megatron_mdm.corpus.tokenizer_training import train_byte_level_bpe

SOURCES = [
    Path(sysconfig.get_paths()["stdlib"], name).read_text("utf-8")
    for name in ("argparse.py", "heapq.py", "html/entities.py")
]
FOREIGN = ["naïve café 日本語の文章です。 한국어 문장 שלום عربى 👩\u200d👧 e\u0301  \t\r\n\n "] * 20


def train_with_split(pattern, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END_OF_TEXT, "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SOURCES + FOREIGN, trainer)
    return tokenizer


def with_gpt2_ids(tokenizer):
    # GPT-2's file lists the bytes in another order and its special token last.
    content = json.loads(tokenizer.to_str())
    names = [name for name in content["model"]["vocab"] if name != END_OF_TEXT]
    random.Random(0).shuffle(names)
    content["model"]["vocab"] = {name: i for i, name in enumerate([*names, END_OF_TEXT])}
    content["added_tokens"][0]["id"] = len(names)
    return Tokenizer.from_str(json.dumps(content))


def with_all_splits(tokenizer):
    """Lists every way to make a token, as vocabularies converted from tiktoken do."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    order = {name: i for i, name in enumerate(list_byte_characters())}
    for left, right in model["merges"]:
        order.setdefault(left + right, len(order))
    model["merges"] = [
        [name[:cut], name[cut:]]
        for name in list(order)[256:]
        for cut in range(1, len(name))
        if name[:cut] in order and name[cut:] in order
    ]
    model["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def ours():
    return train_byte_level_bpe(SOURCES + FOREIGN, 1000)


@pytest.fixture(scope="module")
def tokenizers(ours):
    llama = train_with_split(LLAMA3_PATTERN)
    return {
        "ours": ours,
        "gpt2": with_gpt2_ids(ours),
        "llama3": llama,
        "llama3-all-splits": with_all_splits(llama),
        "qwen2": train_with_split(QWEN2_PATTERN, normalizers.NFC()),
    }


NAMES = ["ours", "gpt2", "llama3", "llama3-all-splits", "qwen2"]


@pytest.fixture(scope="module")
def fast(tokenizers):
    return {
        name: TiktokenEncoder(
            EncodingSettings(
                tokenizer.to_str(), "<u2", tokenizer.token_to_id(END_OF_TEXT), append_eod=False
            )
        )
        for name, tokenizer in tokenizers.items()
    }


def encode(tokenizer, texts, backend, **changes):
    settings = EncodingSettings(tokenizer.to_str(), "<u2", 0, append_eod=True)._replace(**changes)
    return make_encoder(settings, backend).encode_batch(texts)


@pytest.mark.parametrize("name", NAMES)
def test_tiktoken_is_chosen_where_both_agree(tokenizers, name):
    assert choose_backend(tokenizers[name].to_str(), SOURCES)[:2] == ("tiktoken", "")


# Fragments that meet the patterns' special cases far more often than random characters do.
FRAGMENTS = st.sampled_from(
    (
        *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\ufeff", "\u200b", "\0"),
        *("'s", "'LL", "'", "12", "3", "٣", "!", "==", "(", "_", END_OF_TEXT, "<|im_start|>"),
        *("a", "de", "return", "self", "é", "e\u0301", "語", "각", "\u1100\u1161", "👩\u200d👧"),
        *("\u0301", "\u017f", "\u212a"),
    )
)
TEXTS = st.one_of(st.text(), st.lists(FRAGMENTS, max_size=30).map("".join))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text_gives_the_tokens_of_tokenizers(tokenizers, fast, name, text):
    batch = fast[name].encode_batch([text])
    assert batch.tokens.tolist() == reference_ids(tokenizers[name], text)


def test_every_code_point_of_a_first_plane_gives_equal_tokens(tokenizers, fast):
    codes = [code for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts = [
        "".join(f" {chr(code)}a{chr(code)}1" for code in codes[start : start + 512])
        for start in range(0, len(codes), 512)
    ]
    for name in ("gpt2", "qwen2"):
        tokens, lengths = fast[name].encode_batch(texts)
        expected = [reference_ids(tokenizers[name], text) for text in texts]
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [token_id for ids in expected for token_id in ids]


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
def test_batch_holds_each_document_and_its_end(ours, backend):
    texts = ["", "def f():\n", "日本語", "", "x" * 300, ""]
    for append_eod, prepend_eod in ((True, False), (False, False), (False, True)):
        marks = {"append_eod": append_eod, "prepend_eod": prepend_eod}
        tokens, lengths = encode(ours, texts, backend, **marks)
        assert (tokens.dtype, lengths.dtype) == (np.dtype("<u2"), np.dtype(np.int32))
        parts = np.split(tokens, lengths.cumsum())
        for text, part in zip(texts, parts[:-1], strict=True):
            begin = [0] if text and prepend_eod else []
            end = [0] if text and append_eod else []
            assert part.tolist() == begin + reference_ids(ours, text) + end
        assert not len(parts[-1])
    for texts in ([], ["", ""]):
        tokens, lengths = encode(ours, texts, backend)
        assert tokens.shape == (0,)
        assert lengths.tolist() == [0] * len(texts)


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
def test_ids_take_the_type_of_the_shards(ours, backend):
    content = json.loads(ours.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {name: token_id + 100_000 for name, token_id in vocabulary.items()}
    content["added_tokens"][0]["id"] = 100_000
    shifted = Tokenizer.from_str(json.dumps(content))
    tokens, _ = encode(shifted, ["return x"], backend, dtype="<i4", eod_token_id=100_000)
    assert tokens.dtype == np.dtype("<i4")
    assert (tokens - 100_000).tolist() == [*reference_ids(ours, "return x"), 0]
    with pytest.raises(OverflowError):
        encode(shifted, ["return x"], backend)


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("prepend_eod", [True, False])
def test_end_of_document_inside_a_document_is_refused(ours, backend, append_eod, prepend_eod):
    if append_eod and prepend_eod:
        return
    inside = ours.token_to_id("!")
    texts = ["", "one", "the bad ! one", "three"]
    with pytest.raises(DataError, match=rf"starts with 'the bad ! one' .* id {inside} inside it"):
        encode(ours, texts, backend, eod_token_id=inside, append_eod=append_eod)


LONG = {
    "spaces": " " * 600_000,
    "spaces and a letter": " " * 600_000 + "x",
    "newlines": "\n" * 600_000 + "x",
    "words": "ab cd " * 100_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_long_runs_give_the_tokens_of_tokenizers(ours, fast, kind, capfd):
    tokens = fast["ours"].encode_batch([LONG[kind]]).tokens
    assert tokens.tolist() == reference_ids(ours, LONG[kind])
    # A library that panics says so on the standard error stream.
    assert capfd.readouterr().err == ""


def test_megabytes_of_one_letter_take_seconds(ours, fast):
    text = "a" * 5_000_000
    start_seconds = time.perf_counter()
    tokens = fast["ours"].encode_batch([text]).tokens
    assert time.perf_counter() - start_seconds < 20
    assert ours.decode(tokens.tolist()) == text


def test_many_cells_padded_with_blanks_take_seconds(ours, fast):
    # Runs just too short to be long: a search that tries each of their characters never ends.
    text = "|".join(f"cell{number}" + " " * 60_000 for number in range(60))
    start_seconds = time.perf_counter()
    tokens = fast["ours"].encode_batch([text]).tokens
    assert time.perf_counter() - start_seconds < 20
    assert tokens.tolist() == reference_ids(ours, text)


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([" ", "\n", "x", "\u2003"]))))
def test_long_space_is_found_wherever_it_stands(runs):
    text = "".join(character * number for number, character in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_module, "_SPACE_BLOCK_CHARACTERS", 10)
        found = encoding_module._holds_long_space(text)
    longest = max(map(len, re.findall(r"\s+", text)), default=0)
    assert found or longest < 20
    assert not found or longest >= 10


def test_expression_that_gives_up_falls_back_for_the_document(ours, monkeypatch):
    monkeypatch.setattr("megatron_mdm.corpus.encoding._SPACE_BLOCK_CHARACTERS", 10**9)
    text = "x" + " " * 600_000 + "x"
    assert encode(ours, [text], "tiktoken").tokens[:-1].tolist() == reference_ids(ours, text)


def test_expressions_that_differ_are_caught_by_the_probes(ours):
    # To `tokenizers` the flag lets the point match a line's end, to tiktoken it does not.
    pattern = r"(?m:.+)|\n"
    serialised = change(
        ours, ["pre_tokenizer"], in_sequence({**SPLIT, "pattern": {"Regex": pattern}})
    )
    backend, reason, _ = choose_backend(serialised, ["a plain document"])
    assert backend == "tokenizers"
    assert "encode the text that starts with" in reason


def test_difference_in_the_documents_alone_is_caught():
    # Only after "qqzz" do the libraries read the expression differently, and the one merge that
    # crosses that place shows it.
    tokenizer = bare_bpe(["z\u010a"], [("z", "\u010a")])
    pattern = {**SPLIT, "pattern": {"Regex": rf"qqzz(?m:.)qqzz|{GPT2_PATTERN}"}}
    serialised = change(tokenizer, ["pre_tokenizer"], in_sequence(pattern))
    document = "qqzz\nqqzz b"
    assert choose_backend(serialised, ["a"])[:2] == ("tiktoken", "")
    backend, reason, _ = choose_backend(serialised, ["a", document])
    assert backend == "tokenizers"
    assert repr(document) in reason
    encoder = make_encoder(EncodingSettings(serialised, "<u2", 0, append_eod=True), "tiktoken")
    with pytest.raises(EncodingMismatch, match="encode the text that starts with"):
        encoder.encode_batch([document])
    assert not issubclass(EncodingMismatch, DataError)


def test_tiktoken_is_refused_where_it_cannot_serve(ours):
    serialised = change(ours, ["normalizer"], {"type": "Lowercase"})
    with pytest.raises(Untranslatable, match="normalizer is Lowercase"):
        make_encoder(EncodingSettings(serialised, "<u2", 0, append_eod=True), "tiktoken")


def test_sample_is_small_and_depends_on_the_batch_alone(ours, fast, monkeypatch):
    samples = []
    for encoder in (fast["ours"], fast["gpt2"]):
        taken = []
        monkeypatch.setattr(encoder, "compare", taken.extend)
        for texts in (SOURCES, SOURCES[:1], ["", "ab"], []):
            encoder.encode_batch(texts)
        samples.append(taken)
    assert samples[0] == samples[1]
    assert all(sample in "\0".join([*SOURCES, "ab", ""]) for sample in samples[0])
    assert 0 < len(samples[0][0]) <= sum(map(len, SOURCES)) / 50


def encode_in_process(arguments):
    serialised, backend, texts = arguments
    encoder = make_encoder(EncodingSettings(serialised, "<u2", 0, append_eod=True), backend)
    batch = encoder.encode_batch(texts)
    return encoder.name, batch.tokens, batch.lengths


def test_encoders_are_made_in_other_processes(ours):
    work = [(ours.to_str(), backend, SOURCES) for backend in ("tiktoken", "tokenizers")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        first, second = pool.map(encode_in_process, work)
    assert (first[0], second[0]) == ("tiktoken", "tokenizers")
    assert first[1].tolist() == second[1].tolist()
    assert first[2].tolist() == second[2].tolist()


def test_adversarial_texts_are_the_same_every_time():
    code = (
        "import zlib; from megatron_mdm.corpus.probes import make_adversarial_texts as a;"
        "print(zlib.crc32('\\0'.join(a(['a', ' b', '\\n'])).encode()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            cwd=Path(__file__).resolve().parents[3],
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    texts = make_adversarial_texts([])
    assert any(text == "a" * 10_000 for text in texts)
    assert any("\0" in text for text in texts)


def test_tokenizer_is_translated_once_for_the_job_and_not_in_its_workers(ours, monkeypatch):
    real, calls = encoding_module.translate, []

    def count(serialised):
        calls.append(serialised)
        return real(serialised)

    monkeypatch.setattr(encoding_module, "translate", count)
    choice = choose_backend(ours.to_str(), SOURCES)
    settings = EncodingSettings(ours.to_str(), "<u2", 0, append_eod=True)
    reader = TextReader(settings=settings, text_key="text", choice=choice)
    # What a spawned process gets is what is pickled.
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        line = json.dumps({"text": SOURCES[0]}).encode()
        (side,) = copy.encode(Chunk("lines", line, 1, 0, len(line))).sides
        assert side.tokens.tolist() == encode(ours, SOURCES[:1], "tokenizers").tokens.tolist()
    assert len(calls) == 1
