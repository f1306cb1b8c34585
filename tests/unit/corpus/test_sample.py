from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from preprocess_helpers import assert_one_error_line, preprocess, run, write_jsonl

from megatron_mdm.corpus.sample import decode_sample, show_documents, show_source
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.subset import make_subset
from megatron_mdm.data.writer import ShardWriter

TEXTS = ["one\ntwo\x1b[2J\u202e", "日本語", "x" * 5000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(["some text"], 257), path)
    return path


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture
def prefix(tmp_path, folder) -> Path:
    preprocess([write_jsonl(tmp_path / "texts.jsonl", TEXTS)], str(folder), tmp_path / "p")
    return tmp_path / "p"


def encoded(tokenizer, text, end=True):
    return np.array(tokenizer.encode_batch([text])[0] + [tokenizer.eod_token_id] * end)


def test_a_document_is_shown_with_length_ids_end_and_text(tokenizer):
    documents = [encoded(tokenizer, "abc"), encoded(tokenizer, "abcdefghi", end=False)]
    a = documents[0][0]
    assert list(show_documents(documents, tokenizer, 5)) == [
        f"document 0: 4 tokens [{a}, {a + 1}, {a + 2}, 0], ends with the end-of-document id 0",
        "    'abc<|endoftext|>'",
        f"document 1: 9 tokens [{', '.join(str(a + i) for i in range(8))}, ...], ends with {a + 8} "
        "and not with the end-of-document id 0",
        "    'abcdefghi'",
    ]


def test_no_text_breaks_the_terminal(tokenizer):
    lines = list(show_documents([encoded(tokenizer, TEXTS[0])], tokenizer, 1))
    assert lines[1] == r"    'one\ntwo\x1b[2J\u202e<|endoftext|>'"
    every = encoded(tokenizer, "".join(map(chr, range(0x300))))
    assert all(line.isprintable() for line in show_documents([every], tokenizer, 1))


def test_no_more_documents_are_taken_than_shown(tokenizer):
    taken = itertools.count()
    documents = (np.array([next(taken)]) for _ in itertools.count())
    assert len(list(show_documents(documents, tokenizer, 3))) == 6
    assert next(taken) == 3


def test_long_documents_are_cut_where_a_character_ends(tokenizer):
    lines = list(show_documents([encoded(tokenizer, "🙂" * 1000)], tokenizer, 1))
    assert lines[0].startswith("document 0: 4001 tokens")
    assert lines[1] == f"    '{'🙂' * 300}' ..."
    assert list(show_documents([encoded(tokenizer, "a" * 301, False)], tokenizer, 1))[1] == (
        f"    '{'a' * 300}' ..."
    )
    exact = list(show_documents([encoded(tokenizer, "a" * 300, False)], tokenizer, 1))
    assert exact[1] == f"    '{'a' * 300}'"


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_ids_outside_the_vocabulary_are_told_and_left_out(tokenizer, dtype):
    a = encoded(tokenizer, "a")[0]
    document = np.array([a, 257, -1, np.iinfo(dtype).max, a], dtype=dtype)
    line, text = show_documents([document], tokenizer, 1)
    assert line.endswith(", 3 of the first 5 outside the vocabulary of 257")
    assert text == "    'aa'"


def test_empty_documents_are_shown(tokenizer):
    empty = np.array([], dtype=np.uint16)
    assert list(show_documents([empty], tokenizer, 1)) == ["document 0: 0 tokens []", "    ''"]


def test_shards_and_views_show_their_documents(prefix, tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_mdm.corpus.sample._LOCATED_AT_ONCE", 2)
    source = open_tokens(prefix)
    documents = [encoded(tokenizer, text) for text in TEXTS]
    assert list(show_source(source, 99)) == list(show_documents(documents, tokenizer, 99))
    assert list(show_source(source, 1)) == list(show_documents(documents, tokenizer, 1))
    subset = make_subset(prefix, prefix.with_name("s"), 40, 0)
    lines = list(show_source(subset, 99))
    assert "and not with the end-of-document id 0" in lines[-2]
    assert decode_sample(source, source.manifest).startswith(r"'one\ntwo\x1b")


def test_ids_are_shown_where_the_tokenizer_is_not_known(prefix, folder):
    manifest = Manifest.read(manifest_path(prefix))
    for changes, why in (
        ({"tokenizer": "./gone"}, "./gone does not exist"),
        ({"tokenizer_sha256": "ab" * 32}, f"{folder} has changed since"),
    ):
        manifest.model_copy(update=changes).write(manifest_path(prefix))
        lines = list(show_source(open_tokens(prefix), 2))
        assert lines[0].startswith(f"text not shown: {why}")
        assert [line.split(":")[0] for line in lines[1:]] == ["document 0", "document 1"]
        assert lines[1].endswith("ends with the end-of-document id 0")
        sample = decode_sample(open_tokens(prefix), Manifest.read(manifest_path(prefix)))
        assert sample.startswith(f"not shown: {why}")
    manifest_path(prefix).unlink()
    lines = list(show_source(open_tokens(prefix), 1))
    assert lines[0] == "text not shown: there is no manifest, so the tokenizer is not known"
    assert lines[1].endswith(", the last is 0")


def test_command_line(prefix):
    def inspect(*arguments):
        return run("inspect_data.py", *arguments, cwd=prefix.parent)

    lines = inspect("p", "--show", "2").stdout.splitlines()
    assert lines[:4] == list(show_source(open_tokens(prefix), 2))
    assert lines[4] == "documents   3"
    assert lines[-1] == "integrity   OK"
    assert not any(line.startswith("sample") for line in lines)
    assert inspect("--show", "9", "p").stdout.count("end-of-document id 0\n") == 3
    for arguments, why in (
        (("p", "--show", "0"), "--show=0 shows nothing: give at least 1"),
        (("--show", "1", "--plan", "c"), "--show shows documents and --plan a run"),
        (("--show", "1"), "give the path of one set of shards"),
    ):
        result = inspect(*arguments)
        assert result.returncode == 2
        assert why in result.stderr
    assert_one_error_line(inspect("gone", "--show", "1"), "gone.idx does not exist")


def test_documents_are_shown_before_a_wrong_id_is_refused(prefix):
    manifest = Manifest.read(manifest_path(prefix))
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array([300, 0]))
        writer.finish()
    update = {"num_documents": 1, "num_tokens": 2}
    manifest.model_copy(update=update).write(manifest_path(prefix))
    result = run("inspect_data.py", "p", "--show", "1", cwd=prefix.parent)
    assert "1 of the first 2 outside the vocabulary of 257\n" in result.stdout
    assert_one_error_line(result, "p has token id 300 at position 0, place 0 of document 0, outs")
