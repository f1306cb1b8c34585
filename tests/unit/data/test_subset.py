from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.data.subset import make_subset, name_subset
from megatron_mdm.data.writer import ShardWriter

REPOSITORY = Path(__file__).resolve().parents[3]


def write(prefix: Path, documents, *, with_manifest=True) -> TokenStore:
    with ShardWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()
    if with_manifest:
        Manifest(
            tokenizer="tok",
            tokenizer_sha256="ab" * 32,
            vocab_size=60_000,
            eod_token_id=0,
            special_tokens={},
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            max_token_id=59_999,
            dtype="uint16",
            source_files=[],
        ).write(manifest_path(prefix))
    return open_tokens(prefix)


@pytest.fixture
def documents() -> list[list[int]]:
    """Document n starts with n and its own length tells it from the others; some are empty."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 400)
    lengths[::17] = 0
    return [[n, *generator.integers(400, 60_000, k).tolist()][:k] for n, k in enumerate(lengths)]


@pytest.fixture
def parent(tmp_path, documents) -> Path:
    return write(tmp_path / "parent", documents).prefix


def documents_of(source) -> list[list[int]]:
    ends = np.cumsum(source.document_lengths)
    return [x.tolist() for x in np.split(source.read(0, source.num_tokens), ends[:-1])]


def test_subsets_hold_whole_documents_and_the_last_one_cut(tmp_path, parent, documents):
    subset = make_subset(parent, tmp_path / "s", 3000, 1)
    assert subset.view is not None
    subset.verify()
    taken = documents_of(subset)
    assert sum(map(len, taken)) == subset.num_tokens == 3000
    numbers = [document[0] for document in taken]
    assert len(set(numbers)) == len(numbers) == subset.num_documents
    assert numbers != sorted(numbers)
    for number, document in zip(numbers[:-1], taken[:-1], strict=True):
        assert document == documents[number]
    assert taken[-1] == documents[numbers[-1]][: len(taken[-1])]


def test_smaller_subsets_are_prefixes_of_larger_ones(tmp_path, parent, monkeypatch):
    monkeypatch.setattr("megatron_mdm.data.subset._CHUNK_DOCUMENTS", 16)
    num_tokens = open_tokens(parent).num_tokens
    sizes = [1, 700, 1400, 5000, num_tokens]
    streams = [
        make_subset(parent, tmp_path / f"s{size}", size, 0).read(0, size).tolist() for size in sizes
    ]
    for smaller, larger in itertools.pairwise(streams):
        assert larger[: len(smaller)] == smaller
    everything = open_tokens(tmp_path / f"s{num_tokens}")
    wanted = sorted(filter(None, documents_of(open_tokens(parent))))
    assert sorted(documents_of(everything)) == wanted


@pytest.mark.parametrize("seed", [None, 3])
def test_a_subset_goes_on_behind_another_without_sharing_a_document(
    tmp_path, parent, documents, seed, monkeypatch
):
    monkeypatch.setattr("megatron_mdm.data.subset._CHUNK_DOCUMENTS", 16)
    everything = make_subset(parent, tmp_path / "all", sum(map(len, documents)), seed)
    order = documents_of(everything)
    if seed is None:
        assert order == [document for document in documents if document]
    # Inside a document, at its end, and one token into the next.
    to_end = sum(map(len, order[:30]))
    for skipped, taken_from in ((to_end - 1, 30), (to_end, 30), (to_end + 1, 31)):
        last = documents_of(make_subset(parent, tmp_path / f"v{skipped}", skipped, seed))[-1]
        assert last == order[taken_from - 1][: len(last)]
        rest = make_subset(parent, tmp_path / f"t{skipped}", 2000, seed, num_skipped_tokens=skipped)
        stream = [token for document in order[taken_from:] for token in document]
        assert rest.read(0, 2000).tolist() == stream[:2000]
        assert rest.subset.num_skipped_tokens == skipped
        copy = make_subset(parent, tmp_path / "c", 2000, seed, True, True, skipped)
        assert documents_of(copy) == documents_of(rest)
        assert copy.manifest == rest.manifest
    told = "in its order" if seed is None else "seed 3"
    assert rest.subset.describe() == f"{parent}, 2000 tokens behind the first {to_end + 1}, {told}"
    with pytest.raises(DataError, match=rf"behind the first {to_end + 1}, .* what is skipped diff"):
        make_subset(parent, tmp_path / f"t{to_end + 1}", 2000, seed)


def test_every_document_has_the_same_chance_to_be_taken(tmp_path):
    parent = write(tmp_path / "p", [[number] for number in range(40)]).prefix
    counts = np.zeros(40)
    for seed in range(200):
        counts[make_subset(parent, tmp_path / f"s{seed}", 10, seed).read(0, 10)] += 1
    # Chi-squared of 39 degrees of freedom, less for want of replacement: above 70 in 1 of 1,000.
    expected = 200 * 10 / 40
    assert ((counts - expected) ** 2 / (expected * (1 - 10 / 40))).sum() * 39 / 40 < 70


def test_a_copy_is_the_same_stream_and_megatron_reads_it(tmp_path, parent):
    view = make_subset(parent, tmp_path / "v", 2500, 5)
    copy = make_subset(parent, tmp_path / "c", 2500, 5, copy=True)
    assert copy.view is None
    copy.verify()
    assert documents_of(copy) == documents_of(view)
    assert copy.fingerprint() == view.fingerprint()
    assert copy.manifest == view.manifest
    assert copy.manifest is not None
    assert (copy.manifest.num_tokens, copy.manifest.vocab_size) == (2500, 60_000)
    assert copy.manifest.subset.seed == 5
    assert [x.tolist() for x in IndexedDataset(str(tmp_path / "c"))] == documents_of(view)


def test_subsets_of_views_refer_to_the_shards(tmp_path, documents):
    shards = [
        write(tmp_path / "a", documents[:150], with_manifest=False),
        write(tmp_path / "b", documents[150:], with_manifest=False),
    ]
    whole = tmp_path / "whole"
    ViewRecord(
        made_by="merge",
        num_documents=400,
        num_tokens=sum(part.num_tokens for part in shards),
        dtype="uint16",
        parts=[ViewPart.of(part, whole.parent) for part in shards],
    ).write(manifest_path(whole))
    single = write(tmp_path / "single", documents, with_manifest=False).prefix
    (tmp_path / "deep").mkdir()
    half = make_subset(whole, tmp_path / "deep" / "half", 4000, 2)
    assert [part.path for part in half.view.parts] == ["../a", "../b"]
    assert documents_of(half) == documents_of(make_subset(single, tmp_path / "h", 4000, 2))
    quarter = make_subset(tmp_path / "deep" / "half", tmp_path / "quarter", 2000, 3)
    assert [part.path for part in quarter.view.parts] == ["a", "b"]
    halved = {document[0]: document for document in documents_of(half)}
    for path in (manifest_path(whole), *(tmp_path / "deep").iterdir()):
        path.unlink()
    taken = documents_of(open_tokens(tmp_path / "quarter"))
    for document in taken[:-1]:
        assert document == halved[document[0]]


def test_documents_of_several_sequences_stay_whole(tmp_path):
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "m")), dtype=np.uint16)
    for sequences in ([[1, 2], [3]], [[4]], [], [[5], [], [6, 7]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(idx_path(tmp_path / "m")))
    subset = make_subset(tmp_path / "m", tmp_path / "s", 7, 0)
    assert sorted(documents_of(subset)) == [[1, 2, 3], [4], [5, 6, 7]]
    assert subset.manifest is None


def test_the_same_request_is_reused_and_another_is_refused(tmp_path, parent, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "s"
    for copy, other in ((False, "a view"), (True, "a copy")):
        made = make_subset(parent, output, 900, 0, copy, overwrite=True)
        before = manifest_path(output).stat().st_mtime_ns
        caplog.clear()
        assert make_subset(parent, output, 900, 0, copy).fingerprint() == made.fingerprint()
        assert caplog.messages == [f"reusing {output}: the same request made it"]
        assert manifest_path(output).stat().st_mtime_ns == before
        with pytest.raises(DataError, match=rf"s exists and is {other}: replace it with --over"):
            make_subset(parent, output, 900, 0, not copy)
        for request in ((901, 0), (900, 1)):
            with pytest.raises(DataError, match=r"is the subset of .*parent, 900 tokens, seed 0,"):
                make_subset(parent, output, *request, copy)
    assert sorted(path.name for path in tmp_path.glob("s.*")) == ["s.bin", "s.idx", "s.json"]
    make_subset(parent, output, 901, 1, overwrite=True).verify()
    assert sorted(path.name for path in tmp_path.glob("s.*")) == ["s.extents.npy", "s.json"]
    write(tmp_path / "parent", [[7] * 2000])
    with pytest.raises(DataError, match=r"s exists and does not open .* --overwrite"):
        make_subset(parent, output, 901, 1)
    make_subset(parent, output, 901, 1, overwrite=True)
    write(tmp_path / "s", [[1]])
    with pytest.raises(DataError, match="does not say that it is a subset"):
        make_subset(parent, tmp_path / "s", 900, 0, copy=True)


def test_requests_that_cannot_be_met_are_refused(tmp_path, parent):
    num_tokens = open_tokens(parent).num_tokens
    with pytest.raises(DataError, match=rf"more than the {num_tokens} tokens .* 5 are missing"):
        make_subset(parent, tmp_path / "s", num_tokens + 5, 0)
    with pytest.raises(DataError, match="--tokens=0 has to be at least 1"):
        make_subset(parent, tmp_path / "s", 0, 0)
    with pytest.raises(DataError, match="--seed=-1 has to be at least 0"):
        make_subset(parent, tmp_path / "s", 1, -1)
    with pytest.raises(DataError, match="--skip-tokens=-1 has to be at least 0"):
        make_subset(parent, tmp_path / "s", 1, 0, num_skipped_tokens=-1)
    with pytest.raises(DataError, match=r"--skip-tokens=10 is more than .* 1 are missing: ask"):
        make_subset(parent, tmp_path / "s", num_tokens - 9, 0, num_skipped_tokens=10)
    with pytest.raises(DataError, match=r"last of --skip-tokens=1, \d+ of --tokens=\d+ are m"):
        make_subset(parent, tmp_path / "s", num_tokens - 1, None, num_skipped_tokens=1)
    with pytest.raises(DataError, match="is what the subset is taken from"):
        make_subset(parent, tmp_path / "." / "parent", 1, 0, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        make_subset(parent, tmp_path / "file" / "s", 1, 0)
    assert not list(tmp_path.glob("s*"))


def test_references_larger_than_the_tokens_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    parent = write(tmp_path / "p", [[1] * 11] * 20).prefix
    assert make_subset(parent, tmp_path / "s", 110, 0).num_tokens == 110
    assert "references take 240 bytes and the tokens themselves 220: --copy" in caplog.text
    caplog.clear()
    parent = write(tmp_path / "q", [[1] * 12] * 20).prefix
    make_subset(parent, tmp_path / "t", 120, 0)
    assert caplog.messages == []


def test_sizes_have_short_names():
    names = {25_000_000: "25M", 10**9: "1B", 1_500_000: "1500K", 999: "999", 1001: "1001"}
    assert {size: name_subset(size) for size in names} == names


def test_command_lines(tmp_path, parent):
    def run(tool, *arguments):
        command = [sys.executable, REPOSITORY / "tools" / tool, *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    request = ["--input", "parent", "--tokens", "2000", "1000", "--output-prefix", "out/s"]
    result = run("subset_data.py", *request)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["out/s-1K", "out/s-2K"]
    assert open_tokens(tmp_path / "out" / "s-2K").num_tokens == 2000
    result = run("inspect_data.py", "out/s-1K")
    assert result.returncode == 0, result.stderr
    for expected in (
        "tokens      1000",
        "view        subset of 1 pairs of shards",
        "out/../parent: 400 documents",
        "subset of   parent, 1000 tokens, seed 0",
        "60000 tokens of tok",
        "sample      not shown",
        "integrity   OK",
    ):
        assert expected in result.stdout
    path = tmp_path / "out" / "s-1K.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_tokens": 999}))
    result = run("inspect_data.py", "out/s-1K")
    assert result.returncode == 2
    assert result.stderr.startswith("error: out/s-1K.json tells of")
    assert result.stderr.count("\n") == 1
