from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_mdm.data.manifest import Manifest, check_manifest, manifest_path
from megatron_mdm.data.shards import TokenShards, bin_path, idx_path, token_dtype
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 65_000], [1, 0]]


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()
    return prefix


def build_with_megatron(prefix: Path, documents, dtype) -> Path:
    """Documents are lists of sequences."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    return prefix


def make_manifest(**changes) -> Manifest:
    fields = {
        "tokenizer": "tok",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 65_001,
        "eod_token_id": 0,
        "special_tokens": {"<|endoftext|>": 0},
        "num_documents": 5,
        "num_tokens": 9,
        "max_token_id": 65_000,
        "dtype": "uint16",
        "source_files": [{"path": "a.txt", "size_bytes": 3, "sha256": None}],
    }
    return Manifest(**{**fields, **changes})


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path, dtype):
    dataset = IndexedDataset(str(write(tmp_path / "a.b", dtype=dtype)))
    assert [sequence.tolist() for sequence in dataset] == DOCUMENTS
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    assert dataset.index.dtype is dtype


def test_we_write_the_bytes_that_megatron_writes(tmp_path):
    ours = write(tmp_path / "ours")
    theirs = build_with_megatron(tmp_path / "theirs", [[x] for x in DOCUMENTS], np.uint16)
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_we_read_what_megatron_writes(tmp_path, dtype):
    documents = [[[1, 2], [3]], [[4, 5, 6]], [], [[7], [], [8, 9]]]
    shards = TokenShards.open(build_with_megatron(tmp_path / "m", documents, dtype))
    assert shards.dtype == np.dtype(dtype)
    assert shards.num_documents == 4
    assert shards.document_lengths.tolist() == [3, 3, 0, 3]
    assert shards.document_lengths.dtype == np.int32
    assert shards.read(0, shards.num_tokens).tolist() == list(range(1, 10))
    assert shards.manifest is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=20), min_size=1))
def test_documents_round_trip(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("round") / "p"
    flat = [token for document in documents for token in document]
    if not flat:
        with pytest.raises(DataError, match="no tokens"):
            write(prefix, documents)
        assert list(prefix.parent.iterdir()) == []
        return
    shards = TokenShards.open(write(prefix, documents))
    assert shards.document_lengths.tolist() == [len(document) for document in documents]
    assert shards.tokens.tolist() == flat
    assert [x.tolist() for x in IndexedDataset(str(prefix))] == documents


def test_index_in_chunks_equals_index_at_once(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")
    monkeypatch.setattr("megatron_mdm.data.shards.CHUNK_ITEMS", 2)
    monkeypatch.setattr("megatron_mdm.data.writer.CHUNK_ITEMS", 2)
    parts = write(tmp_path / "parts")
    assert idx_path(whole).read_bytes() == idx_path(parts).read_bytes()
    shards = TokenShards.open(parts)
    assert shards.num_tokens == 9
    assert shards.find_token_at_or_above(65_000) == (6, 65_000)
    assert shards.find_token_at_or_above(9) == (4, 9)
    assert shards.find_token_at_or_above(65_001) is None
    assert shards.find_token_at_or_above(1_000_000) is None


def test_token_dtype_follows_megatron():
    for vocab_size in (1, 300, 65_499, 65_500, 65_535, 65_536, 200_000):
        assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_read_returns_a_part_and_refuses_what_is_outside(tmp_path):
    shards = TokenShards.open(write(tmp_path / "p"))
    part = shards.read(2, 3)
    assert part.tolist() == [7, 8, 9]
    assert part.dtype == np.int64
    assert shards.read(9, 0).size == 0
    for start, length in ((-1, 2), (8, 2), (0, -1)):
        with pytest.raises(IndexError):
            shards.read(start, length)


def test_pickle_carries_the_path_and_not_the_tokens(tmp_path):
    shards = TokenShards.open(write(tmp_path / "p", [list(range(1000)) * 20]))
    pickled = pickle.dumps(shards)
    assert len(pickled) < 1000
    assert (pickle.loads(pickled).tokens == shards.tokens).all()


@pytest.mark.parametrize("size", [0, 4, 9, 20, 33, 34, 40, 60, -8, -1])
def test_truncated_index_is_refused(tmp_path, size):
    path = idx_path(write(tmp_path / "p"))
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(DataError, match=r"p\.idx is truncated: it has \d+ bytes and .* take \d+"):
        TokenShards.open(tmp_path / "p")


def test_index_that_is_too_long_is_refused(tmp_path):
    path = idx_path(write(tmp_path / "p"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"p\.idx is too long"):
        TokenShards.open(tmp_path / "p")


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (-18, "truncated"), (2, "too")])
def test_token_file_of_wrong_size_is_refused(tmp_path, change, state):
    path = bin_path(write(tmp_path / "p"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) + change] + b"\0" * max(change, 0))
    message = rf"p\.bin is {state}.*it has {18 + change} bytes and 9 tokens of uint16 take 18"
    with pytest.raises(DataError, match=message):
        TokenShards.open(tmp_path / "p")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"NOTANIDX\0", "so it is no index"),
        (9, struct.pack("<Q", 2), "has format version 2 and only 1"),
        (17, b"\x63", "has dtype code 99 and tokens need one of 1 \\(uint8\\)"),
        (17, b"\x06", "has dtype code 6 \\(float64\\)"),
        (17, b"\x07", "has dtype code 7 \\(float32\\)"),
        (34, struct.pack("<i", -3), "sequence 0 has a length"),
        (34, struct.pack("<i", 4), "sequence 1 has a length or an offset"),
        (54 + 8, struct.pack("<q", 8), "sequence 1 has a length or an offset"),
        (94, struct.pack("<q", 1), "do not run from 0 to the 5"),
        (134, struct.pack("<q", 4), "do not run from 0 to the 5"),
        (102, struct.pack("<q", 3), "document indices decrease"),
    ],
)
def test_damaged_index_is_refused(tmp_path, offset, content, message):
    path = idx_path(write(tmp_path / "p"))
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + len(content)] = content
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=message):
        TokenShards.open(tmp_path / "p")


def test_missing_files_are_named(tmp_path):
    write(tmp_path / "p")
    for suffix in ("bin", "idx"):
        (tmp_path / f"p.{suffix}").rename(tmp_path / "aside")
        with pytest.raises(DataError, match=rf"p\.{suffix} does not exist"):
            TokenShards.open(tmp_path / "p")
        (tmp_path / "aside").rename(tmp_path / f"p.{suffix}")


def test_shards_of_empty_documents_are_refused(tmp_path):
    build_with_megatron(tmp_path / "p", [[[]]], np.uint16)
    with pytest.raises(DataError, match="holds no tokens"):
        TokenShards.open(tmp_path / "p")


def test_abort_leaves_nothing_and_keeps_what_was_there(tmp_path):
    before = bin_path(write(tmp_path / "p")).read_bytes()

    def fail() -> None:
        with ShardWriter(tmp_path / "p", np.uint16) as writer:
            writer.add_document([1, 2])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx"]
    assert bin_path(tmp_path / "p").read_bytes() == before


def test_kill_between_the_renames_leaves_shards_that_do_not_open(tmp_path, monkeypatch):
    write(tmp_path / "p")
    make_manifest().write(manifest_path(tmp_path / "p"))
    real = Path.replace

    def replace(self, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", [[1] * 9])
    with pytest.raises(DataError, match=r"p\.idx does not exist"):
        TokenShards.open(tmp_path / "p")


def test_writer_refuses_ids_and_types_that_do_not_fit(tmp_path):
    for bad in ([70_000], [-1]):
        with (
            ShardWriter(tmp_path / "p", np.uint16) as writer,
            pytest.raises(DataError, match="do not fit uint16"),
        ):
            writer.add_document(np.array(bad))
    with pytest.raises(DataError, match="cannot hold tokens of type float32"):
        ShardWriter(tmp_path / "p", np.float32)
    assert list(tmp_path.iterdir()) == []


def test_manifest_round_trips_and_has_to_agree_with_its_shards(tmp_path):
    prefix = write(tmp_path / "p")
    make_manifest().write(manifest_path(prefix))
    assert TokenShards.open(prefix).manifest == make_manifest()
    make_manifest(num_tokens=8).write(manifest_path(prefix))
    with pytest.raises(DataError, match=r"describes 5 documents, 8 tokens .* hold 5, 9 of uint16"):
        TokenShards.open(prefix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a shard manifest: the whole file"),
        ('{"format_version": 2}', "is not a shard manifest: format_version"),
    ],
)
def test_bad_manifest_is_refused(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"p\.json {message}"):
        Manifest.read(path)


def test_manifest_with_unknown_field_is_refused(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(make_manifest().model_dump_json().replace('"tokenizer":', '"tokeniser":'))
    with pytest.raises(DataError, match=r"is not a shard manifest: tokeni[sz]er"):
        Manifest.read(path)


def test_manifest_is_checked_against_a_run():
    manifest = make_manifest(vocab_size=4096)
    path = Path("p.json")
    check_manifest(manifest, path=path, vocab_size=4096)
    check_manifest(manifest, path=path, vocab_size=4096, tokenizer_sha256="ab" * 32)
    for other in (4000, 4224):
        with pytest.raises(DataError, match=rf"model.vocab_size={other} is not .*=4096, or run"):
            check_manifest(manifest, path=path, vocab_size=other)
    with pytest.raises(DataError, match=r"made by the tokenizer 'tok' .* run tools/preprocess"):
        check_manifest(manifest, path=path, vocab_size=4096, tokenizer_sha256="cd" * 32)
