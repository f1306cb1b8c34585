"""Passes whose windows are cut out of a new order of documents, beside the order itself."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import write
from tiny_objectives import build_objective

from megatron_mdm.core.errors import DataError
from megatron_mdm.data import document_order
from megatron_mdm.data.document_order import DocumentOrder
from megatron_mdm.data.loader import Batch, TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import TokenShards
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.subset import make_subset
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.studies.benchmarks.data_loading import write_zero_shards

KEY = (7, 8, 9)
VOCAB = 60_000


class Listed(TokenSource):
    """Documents in memory, which nothing says the places of; 0 ends them."""

    eod_token_id = 0

    def __init__(self, documents) -> None:
        self.prefix = "listed"
        self.lengths = np.array([len(one) for one in documents])
        self.tokens = np.array([token for one in documents for token in one])

    @classmethod
    def open(cls, prefix):
        raise NotImplementedError

    @property
    def num_documents(self):
        return len(self.lengths)

    @property
    def num_tokens(self):
        return len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop].copy()


class Placed(Listed):
    """Documents in memory."""

    def locate_documents(self, document_N):
        starts = np.cumsum(self.lengths) - self.lengths
        columns = [0 * document_N, starts[document_N], self.lengths[document_N]]
        return np.stack(columns, axis=1)


def documents_of(lengths) -> list[list[int]]:
    """Every token is another one, 0 ends a document of several."""
    stream = iter(range(1, VOCAB))
    return [[*(next(stream) for _ in range(n - 1)), 0][:n] if n else [] for n in lengths]


def shuffled(documents, key=KEY) -> list[int]:
    """The documents in the order that the key names, one after the other."""
    order = Permutation(len(documents), key)(np.arange(len(documents)))
    return [token for number in order.tolist() for token in documents[number]]


def windows_of(source, seq_length, limit=None, **options) -> SourceWindows:
    return SourceWindows(source, seq_length, VOCAB, limit, shuffles_documents=True, **options)


def read_pass(windows: SourceWindows, key=KEY) -> list[int]:
    rows = [windows.read_window(n, 0, key).tokens_S for n in range(windows.num_windows)]
    return np.concatenate(rows).tolist()


def cut(documents, num_tokens) -> list[list[int]]:
    """The documents of the first so many tokens."""
    kept = []
    for document in documents:
        kept.append(document[:num_tokens])
        num_tokens -= len(document)
        if num_tokens <= 0:
            break
    return kept


lengths_lists = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 60)), min_size=1, max_size=90)


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 12), st.integers(1, 80), st.data())
def test_a_pass_shows_each_document_once_in_the_order_of_its_key(
    tmp_path_factory, lengths, seq_length, most_sums, data
):
    """Of any lengths, wherever the sums lie that are kept, and where the last document is cut."""
    documents = documents_of([*lengths, seq_length])
    total = sum(map(len, documents))
    limit = data.draw(st.one_of(st.none(), st.integers(seq_length, total)))
    source = open_tokens(write(tmp_path_factory.mktemp("s") / "a", documents))
    kept = documents if limit in (None, total) else cut(documents, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_order, "_MOST_SUMS", most_sums)
        patch.setattr(document_order, "_CHUNK_DOCUMENTS", 1 + most_sums // 2)
        windows = windows_of(source, seq_length, limit)
        for key in (KEY, (1, 2)):
            shown, expected = read_pass(windows, key), shuffled(kept, key)
            # Whole windows, and at the end of the pass fewer tokens than one are left out.
            assert len(shown) == windows.num_windows * seq_length
            assert 0 <= len(expected) - len(shown) < seq_length
            assert shown == expected[: len(shown)]


def test_merges_and_subsets_are_shuffled_as_the_stream_that_they_are(tmp_path):
    documents = documents_of(np.random.default_rng(0).integers(0, 20, 200))
    parts = [documents[:50], documents[50:51], documents[51:]]
    for number, part in enumerate(parts):
        write(tmp_path / f"part-{number}", part)
    opened = [TokenShards.open(tmp_path / f"part-{number}") for number in range(3)]
    ViewRecord(
        made_by="merge",
        num_documents=200,
        num_tokens=sum(map(len, documents)),
        dtype="uint16",
        parts=[ViewPart.of(one, tmp_path) for one in opened],
    ).write(tmp_path / "merged.json")
    merged = windows_of(open_tokens(tmp_path / "merged"), 16)
    whole = windows_of(open_tokens(write(tmp_path / "whole", documents)), 16)
    assert read_pass(merged) == read_pass(whole)
    assert merged.fingerprint() == whole.fingerprint()
    for copy in (False, True):
        subset = make_subset(tmp_path / "merged", tmp_path / f"s{copy}", 500, 3, copy)
        ends = np.cumsum(subset.document_lengths)
        taken = [part.tolist() for part in np.split(subset.read(0, 500), ends[:-1])]
        assert read_pass(windows_of(subset, 16)) == shuffled(taken)[:496]


def test_a_document_that_is_longer_than_windows_goes_on_in_the_next_ones():
    documents = documents_of([3, 100, 2])
    windows = windows_of(Placed(documents), 10, by_document=True)
    shown = [windows.read_window(n, 0, KEY) for n in range(10)]
    assert [token for one in shown for token in one.tokens_S.tolist()] == shuffled(documents)[:100]
    assert Counter(len(set(one.segment_ids_S.tolist())) for one in shown)[1] >= 8


def test_with_document_attention_a_document_that_nothing_ends_is_one_of_its_own():
    """The last one of a subset is cut, and others follow it once they are shuffled."""
    documents = [[5, 0], [6, 7, 8, 9, 0], [0], [4, 4, 4, 0]]
    kept = cut(documents, 10)
    windows = windows_of(Placed(documents), 10, 10, by_document=True)
    for epoch in range(20):
        window = windows.read_window(0, 0, (epoch,))
        order = Permutation(4, (epoch,))(np.arange(4)).tolist()
        expected = [place for place, number in enumerate(order) for _ in kept[number]]
        assert window.segment_ids_S.tolist() == expected
        assert window.tokens_S.tolist() == shuffled(kept, (epoch,))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(1)
    documents = [documents_of(generator.integers(1, 30, size)) for size in (70, 9)]
    paths = [write(folder / f"{n}", content) for n, content in enumerate(documents)]
    return documents, [windows_of(open_tokens(path), 8) for path in paths]


def batches_of(sources, *, micro=6, rank=0, size=1, **objective) -> TrainingBatches:
    return TrainingBatches(
        sources,
        SampleOrder(
            [900, 100], [one.num_windows for one in sources], seq_length=8, kind="documents", seed=4
        ),
        build_objective(global_batch_size=12, mask_token_id=VOCAB, **objective),
        global_batch_size=12,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )


def targets_of(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.targets_BS for batch in batches])


def test_every_pass_over_every_source_shows_its_own_order_of_documents_shuffled(sources):
    documents, windows = sources
    loader = batches_of(windows)
    steps = [loader.read_step(step) for step in range(80)]
    shown = {n: [] for n in range(2)}
    for batch in (batch for step in steps for batch in step):
        for source, row in zip(batch.sources_B.tolist(), batch.targets_BS.tolist(), strict=True):
            shown[source].append(row)
    orders = []
    for number, content in enumerate(documents):
        size = windows[number].num_windows
        assert len(shown[number]) >= 3 * size
        for epoch in range(3):
            found = shown[number][epoch * size : (epoch + 1) * size]
            key = loader._order.find_document_key(number, epoch)
            stream = np.array(shuffled(content, key))[: size * 8].reshape(size, 8).tolist()
            assert sorted(found) == sorted(stream)
            # The windows of a pass are shuffled too.
            assert found != stream
            orders.append(stream)
    assert all(one != other for one, other in pairwise(orders))


@pytest.mark.parametrize(("micro", "size"), [(1, 2), (3, 4), (12, 1), (2, 3)])
def test_any_layout_and_any_start_sees_the_same(sources, micro, size):
    _, windows = sources
    for step in (0, 14, 40):
        (whole,) = batches_of(windows, micro=12).read_step(step)
        for rank in range(size):
            # Opened anew, as a run that goes on does.
            again = [windows_of(one.source, 8) for one in windows]
            loader = batches_of(again, micro=micro, rank=rank, size=size)
            found = next(loader.iterate(step, step + 1))
            for places, batch in zip(loader.list_positions(step), found, strict=True):
                rows = places - 12 * step
                np.testing.assert_array_equal(batch.targets_BS, whole.targets_BS[rows])
                np.testing.assert_array_equal(batch.inputs_BS, whole.inputs_BS[rows])


def test_both_objectives_see_the_same_windows(sources):
    _, windows = sources
    for step in (0, 30):
        ar = batches_of(windows, kind="ar").read_step(step)
        inputs = np.concatenate([batch.inputs_BS for batch in ar])
        np.testing.assert_array_equal(inputs, targets_of(batches_of(windows).read_step(step)))


def test_threads_look_at_the_documents_of_a_pass_once_and_read_the_same(tmp_path, monkeypatch):
    documents = documents_of([5] * 300)
    source = open_tokens(write(tmp_path / "a", documents))
    windows = windows_of(source, 10)
    begun = []
    begin = DocumentOrder._begin_pass
    monkeypatch.setattr(
        DocumentOrder, "_begin_pass", lambda self, key: (begun.append(key), begin(self, key))[1]
    )
    asked = [(n, (epoch,)) for epoch in range(2) for n in range(windows.num_windows)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: windows.read_window(one[0], 0, one[1]).tokens_S, asked))
    expected = np.concatenate([shuffled(documents, (epoch,)) for epoch in range(2)])
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert sorted(begun) == [(0,), (1,)]


def test_a_pass_over_millions_of_documents_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(document_order, "_MOST_SUMS", 1 << 12)
    write_zero_shards(tmp_path / "a", 1_000_000, 3)
    windows = windows_of(open_tokens(tmp_path / "a"), 50)
    windows.read_window(0, 0, KEY)
    tracemalloc.start()
    for epoch in range(3):
        windows.read_window(17, 0, (epoch,))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two passes of 4,082 sums, and what looking at 131,072 documents takes at a time.
    assert kept < 150_000
    assert peak < 25_000_000


def test_the_fingerprint_tells_where_documents_lie_and_held_out_windows_do_not_need_it(tmp_path):
    one = open_tokens(write(tmp_path / "a", [[1, 2], [3, 4, 5], [6]]))
    other = open_tokens(write(tmp_path / "b", [[1, 2, 3], [4, 5], [6]]))
    assert windows_of(one, 3).fingerprint() != windows_of(other, 3).fingerprint()
    stored = [SourceWindows(source, 3, VOCAB) for source in (one, other)]
    assert stored[0].fingerprint() == stored[1].fingerprint() != windows_of(one, 3).fingerprint()
    assert windows_of(one, 3).read_window(1).tokens_S.tolist() == [4, 5, 6]


def test_a_token_source_of_ones_own_is_shuffled_where_it_knows_its_documents():
    documents = np.arange(1, 41).reshape(4, 10).tolist()
    assert read_pass(windows_of(Placed(documents), 4)) == shuffled(documents)
    with pytest.raises(DataError) as caught:
        windows_of(Listed(documents), 4)
    assert str(caught.value) == (
        "data.order=documents needs to know where the documents of listed lie, and Listed does not "
        "say so: give it locate_documents, or use data.order=shuffle."
    )
    wrong = Placed(documents)
    wrong.lengths = np.full(4, 9)
    for _ in range(2):
        with pytest.raises(DataError, match="hold 36 tokens together, and the stream has 40"):
            windows_of(wrong, 4).read_window(0, 0, KEY)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tmp_path):
    source = open_tokens(write(tmp_path / "a", [[1, 2], [3, 65_000], [5]]))
    with pytest.raises(DataError, match="holds the token id 65000 at token 3, beyond"):
        read_pass(windows_of(source, 5))
