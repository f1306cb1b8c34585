from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.config import ObjectiveConfig
from megatron_mdm.data.loader import Batch, TrainingBatches, read_ahead
from megatron_mdm.data.order import EpochOrder
from megatron_mdm.data.shards import TokenShards
from megatron_mdm.data.windows import Windows
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.errors import DataError

SEQ, VOCAB = 6, 5000

layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """Window w starts with the token 10 w."""
    prefix: Path = tmp_path_factory.mktemp("shards") / "train"
    with ShardWriter(prefix, np.uint16) as writer:
        for window in range(60):
            writer.add_document(10 * window + np.arange(SEQ))
        writer.finish()
    return TokenShards.open(prefix)


class FirstWindows(Windows):
    """The first windows of a source, so that epochs of any size can be tried."""

    def __init__(self, shards: TokenShards, num_windows: int) -> None:
        super().__init__([shards], SEQ, VOCAB)
        self._count = num_windows

    @property
    def num_windows(self) -> int:
        return self._count


def loader_of(shards, *, num_windows=60, batch=12, micro=1, rank=0, size=1, seed=4, **objective):
    windows = FirstWindows(shards, num_windows)
    return TrainingBatches(
        windows,
        EpochOrder(num_windows, seed),
        build_objective(
            ObjectiveConfig(**objective), seed=seed, global_batch_size=batch, mask_token_id=VOCAB
        ),
        global_batch_size=batch,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
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
            places = rank.positions(step).ravel()
            inside = (first <= places) & (places < last)
            found = np.array(windows_of(rank.step_batches(step)))
            seen += found[inside].tolist()
    assert sorted(seen) == list(range(num_windows))


@settings(deadline=None, max_examples=40)
@given(layouts, st.integers(0, 10**12))
def test_the_global_batch_is_the_same_in_any_layout(shards, layout, step):
    micro, size, num_micro_batches = layout
    batch = micro * size * num_micro_batches
    positions = [
        loader_of(shards, batch=batch, micro=micro, rank=rank, size=size).positions(step)
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
    (whole,) = loader_of(shards, micro=12, **settings_).step_batches(3)
    for rank in range(size):
        loader = loader_of(shards, micro=micro, rank=rank, size=size, **settings_)
        for positions, batch in zip(loader.positions(3), loader.step_batches(3), strict=True):
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
    whole = [loader_of(shards).step_batches(step) for step in range(5)]
    for step in range(5):
        parts = [loader_of(shards, micro=2, rank=rank, size=3) for rank in range(3)]
        seen = [window for part in parts for window in windows_of(part.step_batches(step))]
        assert sorted(seen) == sorted(windows_of(whole[step]))


def test_after_one_epoch_all_windows_were_seen(shards):
    steps = list(loader_of(shards).iterate(0, 5))
    assert sorted(itertools.chain(*map(windows_of, steps))) == list(range(60))


def test_a_second_visit_has_noise_of_its_own(shards):
    loader = loader_of(shards, num_windows=1, batch=2)
    first, second = loader.step_batches(0)
    np.testing.assert_array_equal(first.targets_BS, second.targets_BS)
    assert (first.weights_BS != second.weights_BS).any()


def test_a_batch_has_the_stated_shapes_and_dtypes(shards):
    (batch,) = loader_of(shards, batch=4, micro=4).step_batches(0)
    assert batch.inputs_BS.shape == batch.targets_BS.shape == batch.weights_BS.shape == (4, SEQ)
    assert (batch.inputs_BS.dtype, batch.targets_BS.dtype) == (np.int64, np.int64)
    assert (batch.weights_BS.dtype, batch.lengths_B.dtype) == (np.float32, np.int64)
    assert batch.lengths_B.tolist() == [SEQ] * 4


def test_a_damaged_window_is_reported_when_its_step_comes(shards, tmp_path):
    with ShardWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_document(np.append(np.zeros(59), VOCAB))
        writer.finish()
    windows = Windows([TokenShards.open(tmp_path / "bad")], SEQ, VOCAB)
    loader = loader_of(shards, num_windows=10, batch=10)
    loader._windows = windows
    with pytest.raises(DataError, match=r"bad\.bin holds the token id 5000 at token 59"):
        next(loader.iterate(0, 3))


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch-reader"]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_reading_ahead_keeps_the_order(depth):
    assert list(read_ahead(lambda step: step * step, range(3, 40), depth)) == [
        step * step for step in range(3, 40)
    ]
    assert list(read_ahead(lambda step: step, range(0), depth)) == []
    assert not reader_threads()


def test_an_error_is_raised_in_its_turn_with_its_message():
    def make(step: int) -> int:
        if step == 3:
            raise DataError("step 3 is bad")
        return step

    items = read_ahead(make, range(10), depth=8)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="step 3 is bad"):
        next(items)
    assert not reader_threads()


def test_a_consumer_that_stops_early_stops_the_thread():
    made = []
    items = read_ahead(lambda step: made.append(step) or step, range(10**9), depth=2)
    assert next(items) == 0
    assert reader_threads()
    items.close()
    assert not reader_threads()
    assert len(made) <= 5


def test_at_most_depth_items_wait():
    made = []
    items = read_ahead(lambda step: made.append(step) or step, range(100), depth=3)
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

    items = read_ahead(make, range(3), depth=1)
    next(items)
    assert second_made.wait(timeout=5)
    items.close()
