from __future__ import annotations

import itertools
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_objectives import build_objective

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.loader import Batch, TrainingBatches, read_ahead
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.samples import SEGMENT_IDS

SEQ, VOCAB = 6, 5000

layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenStore:
    """Window w starts with the token 10 w."""
    prefix: Path = tmp_path_factory.mktemp("shards") / "train"
    with ShardWriter(prefix, np.uint16) as writer:
        for window in range(60):
            writer.add_document(10 * window + np.arange(SEQ))
        writer.finish()
    return open_tokens(prefix)


class FirstWindows(SourceWindows):
    """The first windows of a source, so that epochs of any size can be tried."""

    def __init__(self, shards: TokenStore, num_windows: int, by_document: bool) -> None:
        super().__init__(shards, SEQ, VOCAB, num_windows * SEQ, by_document=by_document)


def loader_of(
    shards,
    *,
    num_windows=60,
    batch=12,
    micro=1,
    rank=0,
    size=1,
    seed=4,
    order="shuffle",
    by_document=False,
    draw_inputs=None,
    **objective,
):
    return TrainingBatches(
        [FirstWindows(shards, num_windows, by_document)],
        SampleOrder([10**15], [num_windows], seq_length=SEQ, kind=order, seed=seed),
        build_objective(seed=seed, global_batch_size=batch, mask_token_id=VOCAB, **objective),
        global_batch_size=batch,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        draw_inputs=draw_inputs,
    )


def windows_of(batches: list[Batch]) -> list[int]:
    return [int(first) // 10 for batch in batches for first in batch.targets_BS[:, 0]]


def assert_equal_batches(one: Batch, other: Batch) -> None:
    for name in ("inputs_BS", "targets_BS", "weights_BS", "lengths_B"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@settings(deadline=None, max_examples=40)
@given(layouts, st.integers(1, 60), st.integers(0, 2))
def test_every_epoch_covers_every_window_once_in_any_layout(shards, layout, num_windows, epoch):
    micro, size, num_micro_batches = layout
    batch = micro * size * num_micro_batches
    ranks = [
        loader_of(shards, num_windows=num_windows, batch=batch, micro=micro, rank=rank, size=size)
        for rank in range(size)
    ]
    first, last = epoch * num_windows, (epoch + 1) * num_windows
    seen = []
    for step in range(first // batch, -(-last // batch)):
        for rank in ranks:
            places = rank.list_positions(step).ravel()
            inside = (first <= places) & (places < last)
            found = np.array(windows_of(rank.read_step(step)))
            seen += found[inside].tolist()
    assert sorted(seen) == list(range(num_windows))


@settings(deadline=None, max_examples=40)
@given(layouts, st.integers(0, 10**12))
def test_the_global_batch_is_the_same_in_any_layout(shards, layout, step):
    micro, size, num_micro_batches = layout
    batch = micro * size * num_micro_batches
    positions = [
        loader_of(shards, batch=batch, micro=micro, rank=rank, size=size).list_positions(step)
        for rank in range(size)
    ]
    assert {block.shape for block in positions} == {(num_micro_batches, micro)}
    union = np.sort(np.concatenate(positions, axis=None))
    np.testing.assert_array_equal(union, step * batch + np.arange(batch))
    # Micro batch k of all ranks is one contiguous block, so its times stay spread evenly.
    for k in range(num_micro_batches):
        block = np.concatenate([own[k] for own in positions])
        np.testing.assert_array_equal(block, block[0] + np.arange(micro * size))


@pytest.mark.parametrize(("micro", "size"), [(1, 2), (3, 4), (4, 1), (2, 3)])
def test_samples_are_the_same_in_any_layout(shards, micro, size):
    settings_ = {"masking": "fixed_count", "stochastic_length_ratio": 0.4}
    (whole,) = loader_of(shards, micro=12, **settings_).read_step(3)
    for rank in range(size):
        loader = loader_of(shards, micro=micro, rank=rank, size=size, **settings_)
        for positions, batch in zip(loader.list_positions(3), loader.read_step(3), strict=True):
            rows = positions - 36
            np.testing.assert_array_equal(batch.inputs_BS, whole.inputs_BS[rows])
            np.testing.assert_array_equal(batch.targets_BS, whole.targets_BS[rows])
            np.testing.assert_array_equal(batch.weights_BS, whole.weights_BS[rows])
            np.testing.assert_array_equal(batch.lengths_B, whole.lengths_B[rows])


@pytest.mark.parametrize("first", [0, 1, 4, 5, 13])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(shards, first):
    uninterrupted = list(loader_of(shards, micro=3).iterate(0, 14))
    resumed = list(loader_of(shards, micro=3).iterate(first, 14))
    assert len(resumed) == 14 - first
    for expected, found in zip(uninterrupted[first:], resumed, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert_equal_batches(one, other)


def test_a_resume_under_another_layout_goes_on_in_the_same_order(shards):
    whole = [loader_of(shards).read_step(step) for step in range(5)]
    for step in range(5):
        parts = [loader_of(shards, micro=2, rank=rank, size=3) for rank in range(3)]
        seen = [window for part in parts for window in windows_of(part.read_step(step))]
        assert sorted(seen) == sorted(windows_of(whole[step]))


def test_after_one_epoch_all_windows_were_seen(shards):
    steps = list(loader_of(shards).iterate(0, 5))
    assert sorted(itertools.chain(*map(windows_of, steps))) == list(range(60))


def test_a_second_visit_has_noise_of_its_own(shards):
    loader = loader_of(shards, num_windows=1, batch=2)
    first, second = loader.read_step(0)
    np.testing.assert_array_equal(first.targets_BS, second.targets_BS)
    assert (first.weights_BS != second.weights_BS).any()


def test_a_batch_has_the_stated_shapes_and_dtypes(shards):
    (batch,) = loader_of(shards, batch=4, micro=4).read_step(0)
    assert batch.inputs_BS.shape == batch.targets_BS.shape == batch.weights_BS.shape == (4, SEQ)
    assert (batch.inputs_BS.dtype, batch.targets_BS.dtype) == (np.int64, np.int64)
    assert (batch.weights_BS.dtype, batch.lengths_B.dtype) == (np.float32, np.int64)
    assert batch.lengths_B.tolist() == [SEQ] * 4


def test_a_damaged_window_is_reported_when_its_step_comes(shards, tmp_path):
    with ShardWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_document(np.append(np.zeros(59), VOCAB))
        writer.finish()
    loader = loader_of(open_tokens(tmp_path / "bad"), num_windows=10, batch=10)
    with pytest.raises(DataError, match="bad holds the token id 5000 at token 59"):
        next(loader.iterate(0, 3))


def test_fresh_noise_is_new_at_each_visit_and_repeated_noise_comes_back(shards):
    def visits_of(noise):
        seen: dict[int, list[Batch]] = {}
        for batches in loader_of(shards, batch=12, noise=noise).iterate(0, 15):
            for batch in batches:
                seen.setdefault(windows_of([batch])[0], []).append(batch)
        return seen

    for visits in visits_of("repeated").values():
        assert len(visits) == 3
        for again in visits[1:]:
            assert_equal_batches(visits[0], again)
    fresh = visits_of("fresh").values()
    assert sum((visits[0].inputs_BS != visits[1].inputs_BS).any() for visits in fresh) > 50


def test_repeated_noise_is_even_over_the_windows_and_covers_all_rates(shards):
    loader = loader_of(shards, noise="repeated", masking="fixed_count")
    masked = [
        int((batch.inputs_BS == VOCAB).sum())
        for step in range(5)
        for batch in loader.read_step(step)
    ]
    counts = np.bincount(masked, minlength=SEQ + 1)[1:]
    assert counts.sum() == 60
    assert counts.min() >= 8  # exactly 10 each but for the edges of the golden-ratio sequence
    assert counts.max() <= 12


def test_documents_are_numbered_on_request(tmp_path):
    manifest = {
        "tokenizer": "t",
        "tokenizer_sha256": "0" * 64,
        "vocab_size": VOCAB,
        "eod_token_id": 0,
        "special_tokens": {"<|endoftext|>": 0},
        "num_documents": 6,
        "num_tokens": 24,
        "max_token_id": 5,
        "dtype": "uint16",
        "source_files": [],
    }
    with ShardWriter(tmp_path / "d", np.uint16) as writer:
        for _ in range(6):
            writer.add_document([5, 4, 3, 0])
        writer.finish()
    Manifest(**manifest).write(manifest_path(tmp_path / "d"))
    shards = open_tokens(tmp_path / "d")
    (batch,) = loader_of(shards, num_windows=4, batch=4, micro=4, by_document=True).read_step(0)
    segment_ids_BS = batch.model_inputs[SEGMENT_IDS]
    assert segment_ids_BS.dtype == np.int32
    for documents, tokens in zip(segment_ids_BS, batch.targets_BS, strict=True):
        expected, number = [], 0
        for token in tokens:
            expected.append(number)
            number += token == 0
        assert documents.tolist() == expected
    (plain,) = loader_of(shards, num_windows=4, batch=4, micro=4).read_step(0)
    assert not plain.model_inputs


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_batches(shards, threads):
    expected = [loader_of(shards).read_step(step) for step in range(12)]
    found = list(loader_of(shards).iterate(0, 12, threads=threads, depth=7))
    for one_step, other_step in zip(expected, found, strict=True):
        for one, other in zip(one_step, other_step, strict=True):
            assert_equal_batches(one, other)


def test_a_terabyte_plan_starts_at_once(tmp_path):
    prefix = tmp_path / "sparse"
    lengths = np.full(500, 2 * 10**9, dtype="<i4")
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 500, 501))
        stream.write(lengths.tobytes())
        stream.write((2 * np.arange(500, dtype="<i8") * 2 * 10**9).tobytes())
        stream.write(np.arange(501, dtype="<i8").tobytes())
    windows = SourceWindows(open_tokens(prefix), 2048, VOCAB)
    assert windows.num_windows == 10**12 // 2048
    order = SampleOrder(
        [100 * windows.num_windows], [windows.num_windows], seq_length=2048, kind="shuffle", seed=0
    )
    late = order.find_visits(np.array([100 * windows.num_windows - 1]))
    assert late.epoch_N.tolist() == [99]
    assert windows.read(int(late.window_N[0])).tolist() == [0] * 2048


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batch-reader")]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_reading_ahead_keeps_the_order(depth):
    assert list(read_ahead(lambda step: step * step, range(3, 40), 1, depth)) == [
        step * step for step in range(3, 40)
    ]
    assert list(read_ahead(lambda step: step, range(0), 2, depth)) == []
    assert not reader_threads()


def test_an_error_is_raised_in_its_turn_with_its_message():
    def make(step: int) -> int:
        if step == 3:
            raise DataError("step 3 is bad")
        return step

    items = read_ahead(make, range(10), 2, depth=8)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="step 3 is bad"):
        next(items)
    assert not reader_threads()


def test_a_consumer_that_stops_early_stops_the_thread():
    made = []
    items = read_ahead(lambda step: made.append(step) or step, range(10**9), 1, depth=2)
    assert next(items) == 0
    assert reader_threads()
    items.close()
    assert not reader_threads()
    assert len(made) <= 5


def test_at_most_depth_items_wait():
    made = []
    items = read_ahead(lambda step: made.append(step) or step, range(100), 1, depth=3)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, and one in the maker's hand
    items.close()


def test_work_goes_on_while_the_consumer_is_busy():
    second_made = threading.Event()

    def make(step: int) -> int:
        if step == 1:
            second_made.set()
        return step

    items = read_ahead(make, range(3), 1, depth=1)
    next(items)
    assert second_made.wait(timeout=5)
    items.close()


@pytest.mark.parametrize("objective", [{}, {"noise": "repeated"}])
def test_further_inputs_are_drawn_for_the_position_whatever_keys_the_noise(shards, objective):
    def draw(position: int) -> dict[str, np.ndarray]:
        return {"place": np.array([position, 1])}

    loaders = [
        loader_of(shards, micro=2, rank=rank, size=2, draw_inputs=draw, **objective)
        for rank in range(2)
    ]
    plain = loader_of(shards, micro=2, rank=1, size=2, **objective)
    for step in (0, 7):
        for loader in loaders:
            found = [batch.model_inputs["place"][:, 0] for batch in loader.read_step(step)]
            np.testing.assert_array_equal(found, loader.list_positions(step))
        for batch, other in zip(loaders[1].read_step(step), plain.read_step(step), strict=True):
            assert_equal_batches(batch, other)
            assert not other.model_inputs
