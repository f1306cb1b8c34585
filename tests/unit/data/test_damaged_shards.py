"""Shards that are cut, too long, or hold other bytes: refused, and never read as something else."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import DOCUMENTS, build_with_megatron, write

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.index import HEADER, MAGIC
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.store import open_tokens


@pytest.mark.parametrize("size", [0, 4, 9, 20, 33, 34, 40, 60, -8, -1])
def test_truncated_index_is_refused(tmp_path, size):
    path = idx_path(write(tmp_path / "p"))
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(DataError, match=r"p\.idx is truncated: it has \d+ bytes and .* take \d+"):
        open_tokens(tmp_path / "p")


def test_index_that_is_too_long_is_refused(tmp_path):
    path = idx_path(write(tmp_path / "p"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"p\.idx is too long"):
        open_tokens(tmp_path / "p")


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (-18, "truncated"), (2, "too")])
def test_token_file_of_wrong_size_is_refused(tmp_path, change, state):
    path = bin_path(write(tmp_path / "p"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) + change] + b"\0" * max(change, 0))
    message = rf"p\.bin is {state}.*it has {18 + change} bytes and 9 tokens of uint16 take 18"
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "p")


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
        open_tokens(tmp_path / "p")


@pytest.mark.parametrize(
    ("num_sequences", "num_indices"),
    [
        (2**64 - 1, 1),
        (0, 2**64 - 1),
        (2**63, 2**63),
        (5, 0),
        # 34 + 12 n + 8 m is 142, as it should be, modulo 2^64.
        (5 + 2**62, 6),
        (10**15, 10**15 + 1),
    ],
)
def test_header_of_impossible_counts_is_refused(tmp_path, num_sequences, num_indices):
    path = idx_path(write(tmp_path / "p"))
    content = path.read_bytes()
    header = HEADER.pack(MAGIC, 1, 8, num_sequences, num_indices)
    path.write_bytes(header + content[len(header) :])
    with pytest.raises(DataError, match=r"p\.idx is (truncated|damaged|too long)"):
        open_tokens(tmp_path / "p")


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 141), st.binary(max_size=8))),
    cut=st.tuples(st.booleans(), st.integers(-40, 40)),
    multiple=st.booleans(),
)
def test_damaged_bytes_give_a_data_error_or_nothing(tmp_path_factory, changes, cut, multiple):
    prefix = tmp_path_factory.mktemp("fuzz") / "p"
    sequences = [[[5, 6], [7]], [[8]], [], [[9, 10], [], [11]], [[1]], [[0]]]
    build_with_megatron(prefix, sequences if multiple else [[x] for x in DOCUMENTS], np.uint16)
    contents = {True: bytearray(bin_path(prefix).read_bytes())}
    contents[False] = bytearray(idx_path(prefix).read_bytes())
    for in_bin, offset, replacement in changes:
        content = contents[in_bin]
        content[offset : offset + len(replacement)] = replacement[: max(0, len(content) - offset)]
    in_bin, length = cut
    contents[in_bin][len(contents[in_bin]) + min(length, 0) :] = b"\1" * max(length, 0)
    bin_path(prefix).write_bytes(contents[True])
    idx_path(prefix).write_bytes(contents[False])
    try:
        shards = open_tokens(prefix)
        assert shards.read(0, shards.num_tokens).size == shards.num_tokens
        shards.fingerprint()
        if shards.num_documents:
            shards.locate_documents(np.arange(shards.num_documents))
        lengths = shards.document_lengths
        shards.verify()
    except DataError:
        return
    assert lengths.sum() == shards.num_tokens
    assert np.array_equal(lengths, shards.locate_documents(np.arange(len(lengths)))[:, 2])


def test_damage_between_the_spots_is_found_by_verify(tmp_path):
    path = idx_path(write(tmp_path / "p", [[1, 2]] * 1000))
    with path.open("r+b") as stream:
        stream.seek(HEADER.size + 4 * 500)
        stream.write(struct.pack("<ii", 3, 1))
    with pytest.raises(DataError, match="sequence 501 has a length or an offset"):
        open_tokens(tmp_path / "p").verify()
    with path.open("r+b") as stream:
        stream.seek(HEADER.size + 4 * 500)
        stream.write(struct.pack("<ii", 2, 2))
        stream.flush()
        open_tokens(tmp_path / "p").verify()
        stream.seek(HEADER.size + 12 * 1000 + 8 * 500)
        stream.write(struct.pack("<q", 502))
    with pytest.raises(DataError, match="document indices decrease"):
        open_tokens(tmp_path / "p").verify()
