"""Batches of a rank: a pure function of the step, made ahead of their use by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.mixture import SampleOrder, Visits
from megatron_mdm.data.windows import WindowReader
from megatron_mdm.diffusion.attention_rules import FullAttention
from megatron_mdm.diffusion.samples import ModelInputs, Objective, Sample

T = TypeVar("T")
# Makes an empty array; on a GPU machine, in memory that the GPU can copy from by itself.
Allocate = Callable[[tuple[int, ...], npt.DTypeLike], NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Samples of one micro batch, stacked.

    Attributes:
        inputs_BS: int64 [B, S], tokens that the model sees.
        targets_BS: int64 [B, S], tokens that it should predict.
        weights_BS: float32 [B, S]; the weighted cross-entropy sums to nats per token per sample.
        lengths_B: int64 [B], tokens of each sample that count.
        model_inputs: What else the model is given, by name, stacked: [B, ...].
        loss_inputs: What else the loss head is given, by name, float32 [B, S].
        sources_B: int64 [B], place of each sample's source in `data.train`; None in validation.
        attention: Which tokens see which; None: as the objective says.
    """

    inputs_BS: NDArray[np.int64]
    targets_BS: NDArray[np.int64]
    weights_BS: NDArray[np.float32]
    lengths_B: NDArray[np.int64]
    model_inputs: ModelInputs = field(default_factory=dict)
    sources_B: NDArray[np.int64] | None = None
    loss_inputs: ModelInputs = field(default_factory=dict)
    attention: FullAttention | None = None

    @classmethod
    def stack(
        cls,
        samples: Sequence[Sample],
        sources_B: NDArray[np.int64] | None = None,
        allocate: Allocate = np.empty,
    ) -> Batch:
        """Stacks samples of equal window length.

        Args:
            samples: At least one.
            sources_B: int64 [B], the samples' sources, if they are counted.
            allocate: Makes the arrays that go to the device.

        Returns:
            The batch.

        Raises:
            DataError: Samples that attend differently are in one batch, which no kernel computes.
        """
        attention = samples[0].attention
        if any(sample.attention is not attention for sample in samples):
            raise DataError(
                "A micro batch holds samples that attend differently, which one kernel cannot "
                "compute: let the objective give neighbouring positions one attention rule, the "
                "same object for all."
            )

        def stack_rows(rows: list[Any]) -> NDArray[Any]:
            out = allocate((len(rows), *rows[0].shape), rows[0].dtype)
            return np.stack(rows, out=out)

        def stack_inputs(inputs: list[ModelInputs]) -> ModelInputs:
            names = dict.fromkeys(name for one in inputs for name in one)
            return {name: stack_rows(_list_rows(inputs, name)) for name in names}

        return cls(
            inputs_BS=stack_rows([sample.inputs_S for sample in samples]),
            targets_BS=stack_rows([sample.targets_S for sample in samples]),
            weights_BS=stack_rows([sample.weights_S for sample in samples]),
            lengths_B=np.array([sample.length for sample in samples], np.int64),
            model_inputs=stack_inputs([sample.model_inputs for sample in samples]),
            sources_B=sources_B,
            loss_inputs=stack_inputs([sample.loss_inputs for sample in samples]),
            attention=attention,
        )


def _list_rows(inputs: Sequence[ModelInputs], name: str) -> list[NDArray[Any]]:
    """One input of each sample; where some have none theirs is 0, such as one segment."""
    rows = [one.get(name) for one in inputs]
    known = next(row for row in rows if row is not None)
    return [np.zeros_like(known) if row is None else row for row in rows]


class TrainingBatches:
    """The micro batches of one data-parallel rank.

    Step s holds the positions s*B .. s*B + B - 1 of the global order. Micro batch k of rank r takes
    the contiguous block number k*R + r, so the global batch does not depend on the layout. Peers of
    a tensor- or pipeline-parallel group read the same windows themselves and send nothing.

    Args:
        sources: Windows of each source.
        order: Global sample order.
        objective: Makes samples of windows.
        global_batch_size: Samples per step, B.
        micro_batch_size: Samples per micro batch.
        data_parallel_rank: This rank's replica, in 0..R-1.
        data_parallel_size: Replicas, R.
        allocate: Makes the arrays that go to the device.
        draw_inputs: Draws further inputs of the model for a position, whatever is learned; None:
            there are none.
    """

    def __init__(
        self,
        sources: Sequence[WindowReader],
        order: SampleOrder,
        objective: Objective,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        allocate: Allocate = np.empty,
        draw_inputs: Callable[[int], ModelInputs] | None = None,
    ) -> None:
        self._sources = sources
        self._order = order
        self._objective = objective
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._allocate = allocate
        self._draw_inputs = draw_inputs
        self._first_window = np.cumsum([0, *(source.num_windows for source in sources)])

    def list_positions(self, step: int) -> NDArray[np.int64]:
        """Positions that this rank takes in a step.

        Args:
            step: Optimizer step, from 0.

        Returns:
            int64 [micro batches, micro batch size].
        """
        blocks = np.arange(self._global, dtype=np.int64).reshape(-1, self._size, self._micro)
        return step * self._global + blocks[:, self._rank]

    def read_step(self, step: int) -> list[Batch]:
        """Reads the micro batches of a step. Threads may ask for several steps at once.

        Args:
            step: Optimizer step, from 0.

        Returns:
            One batch per micro batch.

        Raises:
            DataError: A window cannot be read, or holds a token id beyond the vocabulary.
        """
        noise_keys_N = positions_N = self.list_positions(step).reshape(-1)
        visits = self._order.find_visits(positions_N)
        if self._objective.repeats_noise:
            noise_keys_N = self._first_window[visits.source_N] + visits.window_N
        batches = []
        for start in range(0, positions_N.size, self._micro):
            rows = range(start, start + self._micro)
            samples = [
                self._sample(visits, row, int(positions_N[row]), int(noise_keys_N[row]))
                for row in rows
            ]
            sources_B = visits.source_N[start : start + self._micro]
            batches.append(Batch.stack(samples, sources_B, self._allocate))
        return batches

    def iterate(
        self, first_step: int, last_step: int, *, threads: int = 1, depth: int = 4
    ) -> Iterator[list[Batch]]:
        """Steps in order, prepared ahead of their use.

        Args:
            first_step: First optimizer step.
            last_step: One past the last.
            threads: Threads that prepare, at least 1.
            depth: Steps to prepare ahead.

        Returns:
            Iterator over the micro batches of each step.
        """
        return read_ahead(self.read_step, range(first_step, last_step), threads, depth)

    def _sample(self, visits: Visits, row: int, position: int, noise_key: int) -> Sample:
        source, epoch, window, shift = (int(column_N[row]) for column_N in visits)
        document_key = self._order.find_document_key(source, epoch)
        text = self._sources[source].read_window(window, shift, document_key)
        sample = self._objective.sample(text, noise_key)
        if self._draw_inputs is None:
            return sample
        return sample._replace(model_inputs={**sample.model_inputs, **self._draw_inputs(position)})


def read_ahead(make: Callable[[int], T], steps: range, threads: int, depth: int) -> Iterator[T]:
    """Calls a function for each step in background threads, a few steps ahead of their use.

    Args:
        make: Called once for each step; several threads may be inside it.
        steps: Steps to make.
        threads: Threads, at least 1.
        depth: Steps that may be under way or waiting, at least 1.

    Yields:
        What `make` returned, in order. An exception in `make` is raised here in its turn.
    """
    remaining = iter(steps)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-reader")
    try:
        pending: deque[Future[T]] = deque()
        for step in remaining:
            pending.append(pool.submit(make, step))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
