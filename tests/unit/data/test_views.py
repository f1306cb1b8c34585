from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.extents import Extents, extents_path
from megatron_mdm.data.inspection import draw_histogram, report_store
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import idx_path
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.data.view_writer import write_extents
from megatron_mdm.data.writer import ShardWriter

REPOSITORY = Path(__file__).resolve().parents[3]


def write(prefix: Path, documents, dtype=np.uint16) -> TokenStore:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()
    return open_tokens(prefix)


def view_of(prefix: Path, parts: list[TokenStore], located=None, **changes) -> Path:
    """Whole parts, or the stretches of `located`: part number, first token there, tokens."""
    counts = [(part.num_documents, part.num_tokens) for part in parts]
    sha256 = None
    if located is not None:
        with write_extents(extents_path(prefix)) as writer:
            # In two pieces, as a subset of many documents is written.
            writer.append(np.array(located[:1], dtype=np.int64).reshape(-1, 3))
            writer.append(np.array(located[1:], dtype=np.int64).reshape(-1, 3))
        sha256 = writer.sha256()
        counts = [(len(located), sum(length for _, _, length in located))]
    fields = {
        "made_by": "merge" if located is None else "subset",
        "num_documents": sum(number for number, _ in counts),
        "num_tokens": sum(number for _, number in counts),
        "dtype": parts[0].dtype.name,
        "extents_sha256": sha256,
        "parts": [ViewPart.of(part, prefix.parent) for part in parts],
    }
    ViewRecord(**(fields | changes)).write(manifest_path(prefix))
    return prefix


@pytest.fixture
def parts(tmp_path) -> list[TokenStore]:
    return [
        write(tmp_path / "data" / "a", [[1, 2, 3], [4], [5, 6]]),
        write(tmp_path / "data" / "b", [[7, 8]]),
        write(tmp_path / "other" / "c", [[9], [10, 11, 12, 13]]),
    ]


@pytest.fixture
def subset(tmp_path, parts) -> Path:
    return view_of(tmp_path / "s", parts, [(2, 1, 4), (0, 0, 3), (1, 1, 1), (0, 3, 1)])


STREAM = [10, 11, 12, 13, 1, 2, 3, 8, 4]


def test_whole_parts_are_read_in_order(tmp_path, parts):
    view = open_tokens(view_of(tmp_path / "v", parts))
    assert view.view is not None
    view.verify()
    assert view.read(0, view.num_tokens).tolist() == list(range(1, 14))
    assert view.document_lengths.tolist() == [3, 1, 2, 2, 1, 4]
    located = view.locate_documents(np.array([5, 0, 3, 2]))
    assert located.tolist() == [[2, 1, 4], [0, 0, 3], [1, 0, 2], [0, 4, 2]]
    assert view.find_token_outside(9) == (8, 9)
    assert view.find_token_outside(14) is None
    assert list(tmp_path.glob("v.*")) == [tmp_path / "v.json"]
    assert view.manifest is None
    for start, stop in ((-1, 1), (13, 14), (1, 0)):
        with pytest.raises(IndexError):
            view.read(start, stop)


def test_extents_are_gathered(subset, monkeypatch):
    monkeypatch.setattr("megatron_mdm.data.source.CHUNK_ITEMS", 3)
    view = open_tokens(subset)
    view.verify()
    for start in range(10):
        for stop in range(start, 10):
            assert view.read(start, stop).tolist() == STREAM[start:stop]
    assert view.document_lengths.tolist() == [4, 3, 1, 1]
    assert view.locate_documents(np.array([3, 0])).tolist() == [[0, 3, 1], [2, 1, 4]]


def test_equal_streams_have_equal_fingerprints(tmp_path, subset):
    copy = write(tmp_path / "copy", [[10, 11, 12, 13], [1, 2, 3], [8], [4]])
    assert open_tokens(subset).fingerprint() == copy.fingerprint()
    other = write(tmp_path / "other-copy", [[10, 11, 12, 13], [1, 2, 3], [8], [5]])
    assert open_tokens(subset).fingerprint() != other.fingerprint()


def test_extents_are_a_plain_numpy_array(subset):
    rows = np.load(extents_path(subset), allow_pickle=False)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 2, 1], [4, 0, 0], [7, 1, 1], [8, 0, 3]]


def test_views_pickle_as_paths_and_threads_read_at_once(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, (4, 5000))
    shards = [write(tmp_path / f"p{number}", [row]) for number, row in enumerate(tokens)]
    generator = np.random.default_rng(1)
    located = [
        (int(part), int(start), 7)
        for part, start in zip(
            generator.integers(0, 4, 900), generator.integers(0, 4993, 900), strict=True
        )
    ]
    expected = np.concatenate([tokens[part, start : start + 7] for part, start, _ in located])
    pickled = pickle.dumps(open_tokens(view_of(tmp_path / "v", shards, located)))
    assert len(pickled) < 1000
    view = pickle.loads(pickled)

    def is_right(start: int) -> bool:
        return view.read(start, start + 200).tolist() == expected[start : start + 200].tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, range(0, 6000, 11)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_gather_equals_numpy(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("gather")
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    contents = [100 * number + np.arange(size) for number, size in enumerate(sizes)]
    shards = [write(folder / f"p{n}", [content]) for n, content in enumerate(contents)]
    located = []
    for _ in range(data.draw(st.integers(1, 12))):
        part = data.draw(st.integers(0, len(sizes) - 1))
        start = data.draw(st.integers(0, sizes[part] - 1))
        located.append((part, start, data.draw(st.integers(1, sizes[part] - start))))
    expected = np.concatenate([contents[p][s : s + n] for p, s, n in located])
    view = open_tokens(view_of(folder / "v", shards, located))
    start = data.draw(st.integers(0, len(expected)))
    length = data.draw(st.integers(0, len(expected) - start))
    assert view.read(start, start + length).tolist() == expected[start : start + length].tolist()


def test_views_move_with_their_parts_and_through_links(tmp_path, parts, subset):
    root = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(tmp_path, root)
    assert open_tokens(root / "s").parts[0].prefix == root / "data" / "a"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    linked = view_of(tmp_path / "link" / "v", parts)
    assert open_tokens(linked).num_tokens == 13
    assert open_tokens(tmp_path / "deep" / "er" / "v").num_tokens == 13


def test_missing_and_changed_parts_are_named(tmp_path, subset):
    write(tmp_path / "data" / "b", [[7, 9]])
    with pytest.raises(DataError, match=r"s\.json refers to .*data/b, whose tokens have changed"):
        open_tokens(subset)
    write(tmp_path / "data" / "b", [[7, 8, 9]])
    with pytest.raises(DataError, match=r"1 documents, 2 tokens of uint16 in .*b, which now has"):
        open_tokens(subset)
    write(tmp_path / "data" / "b", [[7, 8]], np.int32)
    with pytest.raises(DataError, match="which now has 1, 2 of int32: put back"):
        open_tokens(subset)
    idx_path(tmp_path / "data" / "b").unlink()
    with pytest.raises(DataError, match=r"refers to the shards .*data/b, which do not exist: put"):
        open_tokens(subset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "shards"}, r"s\.idx does not exist"),
        ({"made_by": "guess"}, "s.json is not a view: made_by"),
        ({"num_tokens": 8}, "extent 3 does not follow"),
        ({"num_tokens": 10}, "extents are not those that were written"),
        ({"num_tokens": 12}, "extent 3 does not follow"),
        ({"extents_sha256": "00"}, "extents are not those that were written"),
        ({"extents_sha256": None}, "a subset has extents_sha256"),
        ({"num_tokens": 2**70}, "s.json is not a view: num_tokens"),
        ({"num_tokens": -1}, "s.json is not a view: num_tokens"),
        ({"num_documents": 3}, r"int64 \[4, 3\] and the view needs int64 \[3, 3\]"),
        ({"dtype": "int32"}, "which now has"),
        ({"parts": []}, "s.json is not a view: parts"),
        ({"made_by": "merge", "extents_sha256": None}, "of 4 documents, 9 tokens .* of 6, 13"),
        ({"unknown": 1}, "s.json is not a view: unknown"),
    ],
)
def test_wrong_records_are_refused(subset, change, message):
    path = manifest_path(subset)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        open_tokens(subset).verify()


@settings(max_examples=300, deadline=None)
@given(
    place=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    value=st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12),
)
def test_wrong_extents_never_lead_outside_their_parts(place, value):
    rows = np.array([[0, 2, 1], [4, 0, 0], [7, 1, 1], [8, 0, 3]])
    part_tokens = [6, 2, 5]
    rows[place] = value
    try:
        extents = Extents(rows, part_tokens, 9, Path("s"))
        for start in range(9):
            for length in range(1, 10 - start):
                located = extents.locate(start, start + length)
                assert sum(stop - first for _, first, stop in located) == length
                for part, first, stop in located:
                    assert 0 <= first < stop <= part_tokens[part]
                for part, first, count in extents.select(np.arange(4)).tolist():
                    assert 0 <= first < first + count <= part_tokens[part]
    except DataError:
        pass


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 223), st.binary(max_size=4)), max_size=3),
    cut=st.integers(-224, 20),
)
def test_damaged_extent_files_give_data_errors_or_nothing(tmp_path_factory, changes, cut):
    path = tmp_path_factory.mktemp("extents") / "s.extents.npy"
    with write_extents(path) as writer:
        writer.append(np.array([(2, 1, 4), (0, 0, 3), (1, 1, 1), (0, 3, 1)]))
    content = bytearray(path.read_bytes())
    assert len(content) == 128 + 4 * 24
    for offset, replacement in changes:
        content[offset : offset + len(replacement)] = replacement[: len(content) - offset]
    content = content[: len(content) + min(cut, 0)] + b"\1" * max(cut, 0)
    path.write_bytes(content)
    try:
        extents = Extents.open(path, 4, [6, 2, 5], 9)
        assert extents.select(np.arange(4))[:, 2].sum() == 9
        for start in range(9):
            assert sum(stop - first for _, first, stop in extents.locate(start, 9)) == 9 - start
    except DataError:
        pass


def test_damage_between_the_spots_is_met_by_reads_and_by_verify(tmp_path):
    shards = write(tmp_path / "p", [range(1000)])
    prefix = view_of(tmp_path / "v", [shards], [(0, number, 1) for number in range(1000)])
    rows = np.lib.format.open_memmap(extents_path(prefix), mode="r+")
    rows[500, 2] = 1000
    rows.flush()
    view = open_tokens(prefix)
    assert view.read(0, 500).tolist() == list(range(500))
    for use in (view.verify, lambda: view.read(490, 510), lambda: view.document_lengths):
        with pytest.raises(DataError, match="extent 500 does not follow"):
            use()


def test_other_arrays_are_no_extents(subset):
    path = extents_path(subset)
    for array in (np.zeros((4, 3)), np.zeros((3, 4), dtype=np.int64), np.zeros(12, dtype=np.int64)):
        np.save(path, array)
        with pytest.raises(DataError, match=r"is an array of .* and the view needs int64 \[4, 3\]"):
            open_tokens(subset)
    np.save(path, np.array([[None] * 3] * 4), allow_pickle=True)
    with pytest.raises(DataError, match="is not an array of extents"):
        open_tokens(subset)
    path.unlink()
    with pytest.raises(DataError, match=r"s\.extents\.npy does not exist: copy it"):
        open_tokens(subset)


def test_shards_and_a_view_at_one_path_are_refused(tmp_path, parts, subset):
    assert open_tokens(tmp_path / "data" / "a").view is None
    with pytest.raises(DataError, match=r"gone\.idx does not exist"):
        open_tokens(tmp_path / "gone")
    shutil.copy(idx_path(parts[0].prefix), idx_path(subset))
    with pytest.raises(DataError, match=r"s\.json is a view and .*s\.idx exists beside it"):
        open_tokens(subset)


def test_a_view_has_the_manifest_of_its_tokens(tmp_path, parts):
    manifest = Manifest(
        tokenizer="tok",
        tokenizer_sha256="ab" * 32,
        vocab_size=300,
        eod_token_id=0,
        special_tokens={},
        num_documents=6,
        num_tokens=13,
        max_token_id=13,
        dtype="uint16",
        source_files=[],
    )
    prefix = view_of(tmp_path / "v", parts, manifest=manifest)
    assert open_tokens(prefix).manifest == manifest
    assert Manifest.read(manifest_path(prefix)) == manifest
    path = manifest_path(prefix)
    tree = json.loads(path.read_text())
    tree["manifest"]["num_tokens"] = 12
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"13 tokens of uint16, and its parts or its manifest"):
        open_tokens(prefix)


@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 20), min_size=1))
def test_histogram_bins_double_and_hold_every_length(lengths):
    counted = Counter(length.bit_length() for length in lengths)
    _, *lines = draw_histogram(np.array(lengths, dtype=np.int32))
    assert len(lines) == max(counted) - min(counted) + 1
    for bits, line in zip(range(min(counted), max(counted) + 1), lines, strict=True):
        span, count, *bar = line.split()
        low, _, high = span.partition("-")
        assert (int(low).bit_length(), int(high or low).bit_length()) == (bits, bits)
        assert int(count) == counted[bits]
        assert bool(bar) == bool(counted[bits])
        assert (bar == ["#" * 40]) >= (counted[bits] == max(counted.values()))


def test_a_view_may_have_more_parts_than_files_may_be_open(tmp_path):
    shards = [write(tmp_path / f"p{number}", [[number]]) for number in range(100)]
    view_of(tmp_path / "v", shards)
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from megatron_mdm.data.store import open_tokens
view = open_tokens(sys.argv[1])
assert [view.read(n, n + 1).tolist() for n in range(100)] == [[n] for n in range(100)]
assert view.read(0, 100).tolist() == list(range(100))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "v"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_links_to_the_files_of_a_view_are_the_view(tmp_path):
    parts = [write(tmp_path / "data" / name, [[1, 2, 3], [4, 5]]) for name in "ab"]
    view_of(tmp_path / "data" / "v", parts, [(0, 0, 3), (1, 3, 2)])
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "data").glob("v.*"):
        (tmp_path / "links" / path.name).symlink_to(path)
    assert open_tokens(tmp_path / "links" / "v").read(0, 5).tolist() == [1, 2, 3, 4, 5]
    (tmp_path / "links" / "v.extents.npy").unlink()
    with pytest.raises(DataError, match=r"v\.extents\.npy does not exist: copy it to its view"):
        open_tokens(tmp_path / "links" / "v")


@pytest.mark.parametrize("vocab_size", [None, 10])
def test_inspection_names_an_id_that_cannot_be(tmp_path, vocab_size):
    shards = write(tmp_path / "a", [[1, 2], [3, -1, 4]], np.int32)
    if vocab_size is not None:
        fields = {"num_documents": 2, "num_tokens": 5, "max_token_id": 4, "dtype": "int32"}
        fields |= {"tokenizer": "t", "tokenizer_sha256": "x", "eod_token_id": 0}
        Manifest(**fields, vocab_size=vocab_size, special_tokens={}, source_files=[]).write(
            manifest_path(shards.prefix)
        )
    said = r"a has token id -1 at position 3, place 1 of document 1, and ids begin at 0: write"
    with pytest.raises(DataError, match=said):
        list(report_store(open_tokens(shards.prefix)))
