from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.data.windows import SourceWindows, Windows, number_documents
from megatron_mdm.data.writer import ShardWriter


def shards_of(prefix: Path, *documents, dtype=np.int32) -> TokenStore:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document))
        writer.finish()
    return open_tokens(prefix)


def windows_of(sources, seq_length, vocab_size) -> Windows:
    return Windows([SourceWindows(source, seq_length, vocab_size) for source in sources])


def test_windows_cut_the_stream_without_regard_to_documents(tmp_path):
    windows = windows_of([shards_of(tmp_path / "a", [1, 2, 3], [4], [5, 6, 7])], 3, 10)
    assert windows.num_windows == 2
    assert windows.read_window(0).tokens_S.tolist() == [1, 2, 3]
    assert windows.read_window(1).tokens_S.tolist() == [4, 5, 6]
    assert windows.read_window(0).tokens_S.dtype == np.int64


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4),
    seq_length=st.integers(2, 4),
)
def test_no_window_crosses_from_one_source_into_the_next(tmp_path_factory, sizes, seq_length):
    folder = tmp_path_factory.mktemp("sources")
    tokens = [np.arange(size) + 100 * number for number, size in enumerate(sizes)]
    sources = [shards_of(folder / str(n), stream) for n, stream in enumerate(tokens)]
    windows = windows_of(sources, seq_length, vocab_size=1000)
    expected = [
        stream[start : start + seq_length].tolist()
        for stream in tokens
        for start in range(0, len(stream) - seq_length + 1, seq_length)
    ]
    assert windows.num_windows == len(expected)
    assert [
        windows.read_window(window).tokens_S.tolist() for window in range(len(expected))
    ] == expected


def test_a_window_may_fill_its_source_exactly(tmp_path):
    sources = [shards_of(tmp_path / name, [1, 2, 3]) for name in "ab"]
    windows = windows_of(sources, 3, 10)
    assert windows.num_windows == 2
    assert windows.read_window(1).tokens_S.tolist() == [1, 2, 3]


def test_windows_outside_the_data_are_refused(tmp_path):
    windows = windows_of([shards_of(tmp_path / "a", range(10))], 3, 10)
    for window in (-1, 3, 100):
        with pytest.raises(IndexError):
            windows.read_window(window)


def test_a_source_shorter_than_a_window_is_named(tmp_path):
    long, short = shards_of(tmp_path / "long", range(9)), shards_of(tmp_path / "short", range(4))
    with pytest.raises(DataError) as caught:
        windows_of([long, short], 5, 10)
    assert str(caught.value) == (
        f"{tmp_path}/short holds 4 tokens, less than one window of data.seq_length=5: use a longer "
        "corpus or a shorter window."
    )


@pytest.mark.parametrize("bad", [10, 65_000, -1])
def test_a_token_beyond_the_vocabulary_names_file_and_offset(tmp_path, bad):
    good = shards_of(tmp_path / "good", range(8))
    spoilt = shards_of(tmp_path / "spoilt", [1, 2, 3, 4, 5, 6, bad, 7, bad])
    windows = windows_of([good, spoilt], 4, vocab_size=10)
    assert windows.read_window(2).tokens_S.tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError) as caught:
        windows.read_window(3)
    assert str(caught.value).startswith(
        f"{tmp_path}/spoilt holds the token id {bad} at token 6, beyond the model's vocabulary of "
        "10: "
    )


def test_the_last_token_of_the_vocabulary_is_accepted(tmp_path):
    assert windows_of([shards_of(tmp_path / "a", [9, 0])], 2, 10).read_window(
        0
    ).tokens_S.tolist() == [9, 0]


def test_no_sources_are_no_windows():
    assert windows_of([], 4, 10).num_windows == 0


def test_the_fingerprint_tells_corpora_apart_and_knows_no_path(tmp_path):
    def fingerprint(name, *documents, seq_length=2):
        return windows_of([shards_of(tmp_path / name, *documents)], seq_length, 100).fingerprint()

    first = fingerprint("a", [1, 2, 3], [4])
    assert fingerprint("b", [1, 2, 3], [4]) == first
    others = [
        fingerprint("c", [1, 2, 3], [5]),
        fingerprint("d", [1, 2], [3], [4]),
        fingerprint("e", [1, 2, 3], [4], seq_length=4),
    ]
    assert len({first, *others}) == 4


def test_a_shift_moves_every_window_and_wraps_at_the_end(tmp_path):
    source = SourceWindows(shards_of(tmp_path / "a", range(10)), 3, 100)
    assert [source.read(window, shift=2).tolist() for window in range(3)] == [
        [2, 3, 4],
        [5, 6, 7],
        [8, 9, 0],
    ]


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 30), st.integers(1, 6), st.integers(0, 40), st.data())
def test_a_pass_shows_distinct_tokens_at_any_shift(tmp_path_factory, size, seq_length, shift, data):
    limit = data.draw(st.one_of(st.none(), st.integers(seq_length, 40)))
    used = min(size, limit or size)
    if used < seq_length:
        return
    shards = shards_of(tmp_path_factory.mktemp("shift") / "a", range(size))
    source = SourceWindows(shards, seq_length, 100, limit)
    assert source.num_windows == used // seq_length
    shown = [token for w in range(source.num_windows) for token in source.read(w, shift).tolist()]
    assert len(set(shown)) == len(shown) == used // seq_length * seq_length
    assert set(shown) <= set(range(used))


def test_a_limit_below_one_window_is_named(tmp_path):
    with pytest.raises(DataError, match="10 tokens of which max_unique_tokens=2, less than one"):
        SourceWindows(shards_of(tmp_path / "a", range(10)), 3, 100, 2)


def test_another_limit_is_other_data(tmp_path):
    shards = shards_of(tmp_path / "a", range(10))
    prints = {SourceWindows(shards, 3, 100, limit).fingerprint() for limit in (None, 9, 8, 10)}
    assert len(prints) == 3


def test_a_document_ends_with_its_end_token():
    tokens = np.array([5, 0, 6, 7, 0, 0, 8])
    assert number_documents(tokens, 0).tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert number_documents(np.array([0]), 0).tolist() == [0]
