"""How much of the data planning reads: counts of reads and of bytes, not seconds."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from plan_examples import SEQ, plan_of, write_shards

from megatron_mdm.data import source as source_module
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.source import fingerprint_stream
from megatron_mdm.data.store import open_tokens

NUM_SOURCES = 300


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small sources, each of another size, so that none can be a copy of another."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    return [
        write_shards(folder / str(number), rng.integers(0, 299, 1200 + number))
        for number in range(NUM_SOURCES)
    ]


@pytest.fixture
def reads(monkeypatch):
    """Reads of each file of tokens, and their bytes."""
    counts, num_bytes = Counter(), Counter()
    real = PositionalFile.fill

    def count(self, out, offset_bytes):
        if self.path.suffix == ".bin":
            counts[self.path.stem] += 1
            num_bytes[self.path.stem] += out.nbytes
        real(self, out, offset_bytes)

    monkeypatch.setattr(PositionalFile, "fill", count)
    return counts, num_bytes


def test_small_sources_are_read_once_for_each_question(tree, sources, reads):
    train = [{"path": str(path), "weight": 1} for path in sources]
    plan = plan_of(tree, data={"train": train}, schedule={"steps": 400})
    counts, num_bytes = reads
    # Once for ids beyond the vocabulary, and once for the fingerprint.
    assert set(counts.values()) == {2}
    assert len(counts) == NUM_SOURCES
    assert all(num_bytes[path.name] == 2 * 2 * (1200 + int(path.name)) for path in sources)
    # Asked again, nothing is read again.
    assert len(plan.data.fingerprint) == 64
    assert sum(counts.values()) == 2 * NUM_SOURCES


def test_ranks_beside_the_first_of_their_machine_read_no_tokens(tree, sources, reads, monkeypatch):
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    train = [{"path": str(path), "weight": 1} for path in sources]
    plan_of(tree, data={"train": train}, schedule={"steps": 400})
    assert not reads[0]


def test_first_rank_of_another_machine_reads_what_tells_the_data_from_other_data(
    tree, sources, reads, monkeypatch
):
    for name, value in {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    train = [{"path": str(path), "weight": 1} for path in sources]
    plan_of(tree, data={"train": train}, schedule={"steps": 400})
    assert set(reads[0].values()) == {1}


def test_sources_of_one_size_are_read_once_more_to_find_copies(tree, tmp_path, reads):
    for number in range(3):
        write_shards(tmp_path / f"s{number}", np.arange(100) + number)
    train = [{"path": str(tmp_path / f"s{number}")} for number in (0, 1, 2, 0)]
    plan_of(tree, data={"train": train})
    # The same shards stand there twice: opened twice, and compared with the others once.
    assert reads[0] == {"s0": 5, "s1": 3, "s2": 3}


@pytest.mark.parametrize("num_tokens", [1, SEQ, 511, 512, 513, 1306, 16_384, 16_385, 40_000])
def test_fingerprint_of_a_short_stream_is_that_of_its_blocks(tmp_path, num_tokens):
    """Checkpoints hold fingerprints that were made block by block."""
    source = open_tokens(write_shards(tmp_path / "a", np.arange(num_tokens) % 299))
    told = [fingerprint_stream(source, num_blocks) for num_blocks in (1, 2, 32, 1024)]
    for num_blocks, fingerprint in zip((1, 2, 32, 1024), told, strict=True):
        digest = hashlib.sha256(f"{num_tokens} 1".encode())
        length = min(source_module._BLOCK_TOKENS, num_tokens)
        last = num_tokens - length
        for start in sorted({b * last // max(num_blocks - 1, 1) for b in range(num_blocks)}):
            digest.update(source.read(start, start + length).tobytes())
        assert digest.hexdigest() == fingerprint
