from __future__ import annotations

import hashlib
import os
import pickle
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from shard_examples import DOCUMENTS, build_with_megatron, write

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.index import HEADER, MAGIC
from megatron_mdm.data.manifest import Manifest, SourceFile, check_manifest, manifest_path
from megatron_mdm.data.shards import TokenShards, bin_path, choose_token_dtype, idx_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.writer import ShardWriter


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
    shards = open_tokens(build_with_megatron(tmp_path / "m", documents, dtype))
    shards.verify()
    assert shards.locate_documents(np.array([3, 0, 2])).tolist() == [
        [0, 6, 3],
        [0, 0, 3],
        [0, 6, 0],
    ]
    assert shards.dtype == np.dtype(dtype)
    assert shards.num_documents == 4
    assert shards.document_lengths.tolist() == [3, 3, 0, 3]
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
    shards = open_tokens(write(prefix, documents))
    assert shards.document_lengths.tolist() == [len(document) for document in documents]
    assert shards.read(0, len(flat)).tolist() == flat
    assert [x.tolist() for x in IndexedDataset(str(prefix))] == documents


def test_index_in_chunks_equals_index_at_once(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")
    monkeypatch.setattr("megatron_mdm.data.source.CHUNK_ITEMS", 2)
    parts = write(tmp_path / "parts")
    assert idx_path(whole).read_bytes() == idx_path(parts).read_bytes()
    shards = open_tokens(parts)
    shards.verify()
    assert shards.document_lengths.tolist() == [3, 1, 0, 3, 2]
    assert shards.num_tokens == 9
    assert shards.find_token_outside(65_000) == (6, 65_000)
    assert shards.find_token_outside(9) == (4, 9)
    assert shards.find_token_outside(65_001) is None
    assert shards.find_token_outside(1_000_000) is None


def test_token_dtype_follows_megatron():
    for vocab_size in (1, 300, 65_499, 65_500, 65_535, 65_536, 200_000):
        assert choose_token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_read_returns_a_part_and_refuses_what_is_outside(tmp_path):
    shards = open_tokens(write(tmp_path / "p"))
    part = shards.read(2, 5)
    assert part.tolist() == [7, 8, 9]
    assert part.dtype == np.int64
    assert shards.read(9, 9).size == 0
    for start, stop in ((-1, 1), (8, 10), (1, 0)):
        with pytest.raises(IndexError):
            shards.read(start, stop)


def test_pickle_carries_the_path_and_not_the_tokens(tmp_path):
    shards = open_tokens(write(tmp_path / "p", [list(range(1000)) * 20]))
    pickled = pickle.dumps(shards)
    assert len(pickled) < 1000
    assert (pickle.loads(pickled).read(0, 20_000) == shards.read(0, 20_000)).all()


def test_a_billion_documents_open_in_constant_time_and_memory(tmp_path):
    count = 10**9
    with idx_path(tmp_path / "p").open("wb") as stream:
        # The rest is a hole: documents without tokens, at offset 0.
        stream.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        stream.seek(HEADER.size + 4 * (count - 1))
        stream.write(struct.pack("<i", 7))
        stream.seek(HEADER.size + 12 * count + 8 * count)
        stream.write(struct.pack("<q", count))
    bin_path(tmp_path / "p").write_bytes(bytes(14))
    tracemalloc.start()
    start_seconds = time.perf_counter()
    shards = open_tokens(tmp_path / "p")
    elapsed_seconds = time.perf_counter() - start_seconds
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (shards.num_documents, shards.num_tokens) == (count, 7)
    assert elapsed_seconds < 0.5
    assert peak_bytes < 1 << 20


def test_files_that_get_shorter_or_are_replaced_give_data_errors(tmp_path):
    shards = open_tokens(write(tmp_path / "p", [list(range(5000))]))
    assert shards.read(4000, 5000).tolist() == list(range(4000, 5000))
    with bin_path(tmp_path / "p").open("r+b") as stream:
        stream.truncate(9001)
    assert shards.read(4000, 4500).tolist() == list(range(4000, 4500))
    with pytest.raises(DataError, match=r"p\.bin ends at byte 9001"):
        shards.read(4000, 4501)
    other = open_tokens(write(tmp_path / "q", [[1]]))
    write(tmp_path / "q", [[1]])
    with pytest.raises(DataError, match=r"q\.bin was replaced"):
        other.read(0, 1)
    bin_path(tmp_path / "q").unlink()
    with pytest.raises(DataError, match=r"q\.bin cannot be read at byte 0"):
        other.read(0, 1)


def test_threads_read_at_once(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 100_000)
    shards = open_tokens(write(tmp_path / "p", [tokens]))

    def is_right(seed: int) -> bool:
        generator = np.random.default_rng(seed)
        starts = generator.integers(0, len(tokens) - 300, 300).tolist()
        return all(
            (shards.read(start, start + 250) == tokens[start : start + 250]).all()
            for start in starts
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, range(16)))


def test_fingerprint_is_of_counts_and_spread_blocks(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 3_000_000).astype(np.uint16)
    shards = open_tokens(write(tmp_path / "p", [tokens[:10], tokens[10:]]))
    digest = hashlib.sha256(b"3000000 2")
    for block in range(1024):
        start = block * (3_000_000 - 512) // 1023
        digest.update(tokens[start : start + 512].astype("<i8").tobytes())
    assert shards.fingerprint() == digest.hexdigest()
    wide = open_tokens(write(tmp_path / "w", [tokens[:10], tokens[10:]], np.int32))
    assert wide.fingerprint() == shards.fingerprint()
    other = open_tokens(write(tmp_path / "o", [tokens]))
    assert other.fingerprint() != shards.fingerprint()


def test_empty_shards_open_only_on_request(tmp_path):
    idx_path(tmp_path / "p").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8))
    bin_path(tmp_path / "p").write_bytes(b"")
    make_manifest(num_documents=0, num_tokens=0, max_token_id=0).write(
        manifest_path(tmp_path / "p")
    )
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(tmp_path / "p")
    shards = TokenShards.open(tmp_path / "p", allow_empty=True)
    shards.index.verify()
    assert (shards.num_documents, shards.num_tokens) == (0, 0)
    assert shards.read(0, 0).size == 0
    assert shards.find_token_outside(0) is None


def test_large_source_files_are_hashed_by_blocks(tmp_path):
    path = tmp_path / "large"
    content = np.random.default_rng(0).bytes(17 << 20)
    path.write_bytes(content)
    digest = hashlib.sha256(str(17 << 20).encode())
    for block in range(256):
        start = block * (len(content) - 65536) // 255
        digest.update(content[start : start + 65536])
    assert SourceFile.of(path).sha256 == digest.hexdigest()
    os.truncate(path, 16 << 20)
    small = SourceFile.of(path)
    assert small.sha256 == hashlib.sha256(content[: 16 << 20]).hexdigest()
    assert small.size_bytes == 16 << 20
    slices = [small.model_copy(update={"start": start, "stop": 9}) for start in (3, 4)]
    assert slices[0].has_content_of(slices[0])
    assert not slices[0].has_content_of(slices[1])


def test_missing_files_are_named(tmp_path):
    write(tmp_path / "p")
    for suffix in ("bin", "idx"):
        (tmp_path / f"p.{suffix}").rename(tmp_path / "aside")
        with pytest.raises(DataError, match=rf"p\.{suffix} does not exist"):
            open_tokens(tmp_path / "p")
        (tmp_path / "aside").rename(tmp_path / f"p.{suffix}")


def test_shards_of_empty_documents_are_refused(tmp_path):
    build_with_megatron(tmp_path / "p", [[[]]], np.uint16)
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(tmp_path / "p")


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
        open_tokens(tmp_path / "p")


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
    assert open_tokens(prefix).manifest == make_manifest()
    make_manifest(num_tokens=8).write(manifest_path(prefix))
    with pytest.raises(DataError, match=r"describes 5 documents, 8 tokens .* hold 5, 9 of uint16"):
        open_tokens(prefix)


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
    check_manifest(manifest, path=path, vocab_size=4224)
    with pytest.raises(DataError) as caught:
        check_manifest(manifest, path=path, vocab_size=4000)
    again = "run mdm prepare again with the tokenizer of"
    assert str(caught.value) == (
        "p.json has a vocabulary of 4096 tokens, more than model.vocab_size=4000: set "
        f"model.vocab_size=4096, or {again} the run."
    )
    with pytest.raises(DataError, match=rf"'tok' .* {again} the run, or set data.tokenizer=tok\.$"):
        check_manifest(manifest, path=path, vocab_size=4096, tokenizer_sha256="cd" * 32)


def test_what_cannot_be_set_is_not_advised():
    manifest, path = make_manifest(vocab_size=4096), Path("p.json")
    again = "run mdm prepare again with the tokenizer of"
    check_manifest(manifest, path=path, vocab_size=4096, num_rows=4096, export=Path("hf"))
    for num_rows, remedy in ((4095, ""), (4096, "set model.vocab_size=4096, or ")):
        with pytest.raises(DataError, match=rf"=4000: {remedy}{again} the run\.$"):
            check_manifest(manifest, path=path, vocab_size=4000, num_rows=num_rows)
    with pytest.raises(DataError, match=rf"more than the 4000 of hf: {again} hf\.$"):
        check_manifest(manifest, path=path, vocab_size=4000, export=Path("hf"))
    other = {"tokenizer_sha256": "cd" * 32, "export": Path("hf")}
    with pytest.raises(DataError, match=rf"that of hf differs \(sha256 c\w+\): {again} hf\.$"):
        check_manifest(manifest, path=path, vocab_size=4096, **other)
