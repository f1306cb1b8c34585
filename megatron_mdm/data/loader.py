"""Batches of a rank: a pure function of the step, read ahead by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.order import EpochOrder
from megatron_mdm.data.windows import Windows
from megatron_mdm.diffusion.objectives import Objective, TrainingSample

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Samples of one micro batch, stacked.

    Attributes:
        inputs_BS: int64 [B, S], tokens that the model sees.
        targets_BS: int64 [B, S], tokens that it should predict.
        weights_BS: float32 [B, S]; the weighted cross-entropy sums to nats per token a sample.
        lengths_B: int64 [B], tokens of each sample that count.
    """

    inputs_BS: NDArray[np.int64]
    targets_BS: NDArray[np.int64]
    weights_BS: NDArray[np.float32]
    lengths_B: NDArray[np.int64]

    @classmethod
    def stack(cls, samples: list[TrainingSample]) -> Batch:
        """Stacks samples of equal window length.

        Args:
            samples: At least one.

        Returns:
            The batch.
        """
        inputs, targets, weights, lengths = zip(*samples, strict=True)
        return cls(
            np.stack(inputs), np.stack(targets), np.stack(weights), np.array(lengths, np.int64)
        )


class TrainingBatches:
    """The micro batches of one data-parallel rank.

    Step s holds the positions s*B .. s*B + B - 1 of the global order. Micro batch k of rank r takes
    the contiguous block number k*R + r, so the global batch does not depend on the layout.

    Args:
        windows: Training windows.
        order: Global sample order.
        objective: Makes samples of windows.
        global_batch_size: Samples a step, B.
        micro_batch_size: Samples a micro batch.
        data_parallel_rank: This rank's replica, in 0..R-1.
        data_parallel_size: Replicas, R.
    """

    def __init__(
        self,
        windows: Windows,
        order: EpochOrder,
        objective: Objective,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._windows = windows
        self._order = order
        self._objective = objective
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size

    def positions(self, step: int) -> NDArray[np.int64]:
        """Positions that this rank takes in a step.

        Args:
            step: Optimizer step, from 0.

        Returns:
            int64 [micro batches, micro batch size].
        """
        blocks = np.arange(self._global, dtype=np.int64).reshape(-1, self._size, self._micro)
        return step * self._global + blocks[:, self._rank]

    def step_batches(self, step: int) -> list[Batch]:
        """The micro batches of a step.

        Args:
            step: Optimizer step, from 0.

        Returns:
            One batch per micro batch.

        Raises:
            DataError: A window holds a token id beyond the vocabulary.
        """
        return [
            Batch.stack([self._sample(int(position)) for position in block])
            for block in self.positions(step)
        ]

    def iterate(self, first_step: int, last_step: int, depth: int = 4) -> Iterator[list[Batch]]:
        """Steps in order, prepared ahead of their use.

        Args:
            first_step: First optimizer step.
            last_step: One past the last.
            depth: Steps to prepare ahead.

        Returns:
            Iterator over the micro batches of each step.
        """
        return read_ahead(self.step_batches, range(first_step, last_step), depth)

    def _sample(self, position: int) -> TrainingSample:
        visit = self._order.visit(position)
        return self._objective(self._windows.read(visit.window), position)


def read_ahead(make: Callable[[int], T], steps: range, depth: int) -> Iterator[T]:
    """Calls a function for each step in a background thread, a few steps ahead of its use.

    Args:
        make: Called once for each step, in order.
        steps: Steps to make.
        depth: Finished items that may wait, at least 1.

    Yields:
        What `make` returned, in order. An exception in `make` is raised here in its turn.
    """
    ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for step in steps:
                if not put(make(step)):
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batch-reader")
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
