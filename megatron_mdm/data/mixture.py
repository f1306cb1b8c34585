"""Mixtures: how often each source is seen, exactly, and which one stands at a position.

The visits of a run are shared out once, by largest remainder, and spread evenly: every prefix of
the run holds nearly the same mixture. Any position is computed alone, in exact integers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from megatron_mdm.config import TrainSourceConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.order import DocumentKey, IntArray, OrderKind, SourceOrder

# Keeps these keys apart from those of the noise, which hash the same seed.
_DOMAIN = 0x0DE2


def apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Shares out whole units by largest remainder (Hamilton's method).

    Args:
        total: Units to share out, 0 or more.
        weights: Positive weights, at least one.

    Returns:
        A whole number for each weight, less than one from its exact share; they sum to `total`.
        Of equal remainders the first wins.
    """
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [share.__floor__() for share in exact]
    remainders = [share - floor for share, floor in zip(exact, shares, strict=True)]
    winners = sorted(range(len(weights)), key=lambda index: (-remainders[index], index))
    for index in winners[: total - sum(shares)]:
        shares[index] += 1
    return shares


def count_stated_samples(
    sources: Sequence[TrainSourceConfig], windows: Sequence[int]
) -> Fraction | None:
    """Samples of a run that follow from its sources alone.

    Args:
        sources: The sources.
        windows: Windows of each.

    Returns:
        The sum of epochs times windows, or None unless every source states its epochs.
    """
    if not all(source.epochs for source in sources):
        return None
    return sum(
        (_count_stated(source, count) for source, count in zip(sources, windows, strict=True)),
        start=Fraction(0),
    )


def share_visits(
    sources: Sequence[TrainSourceConfig], windows: Sequence[int], total: int
) -> list[int]:
    """Shares the samples of a run out over its sources.

    A source with stated epochs gets them, rounded to whole windows. The others share the rest by
    weight, or by size where none has a weight, so that all are seen equally often. When every
    source states its epochs, the samples that fill the last step are shared out alike.

    Args:
        sources: The sources.
        windows: Windows of each.
        total: Samples of the run.

    Returns:
        Visits of each source; they sum to `total`.

    Raises:
        ConfigError: The stated epochs do not fit into the run.
    """
    stated = [
        _count_stated(source, count) if source.epochs else None
        for source, count in zip(sources, windows, strict=True)
    ]
    if None not in stated:
        return apportion(total, [samples for samples in stated if samples is not None])
    visits = [0 if samples is None else round(samples) for samples in stated]
    rest = total - sum(visits)
    if rest <= 0:
        raise ConfigError(
            f"data.train asks for {sum(visits)} windows by its epochs and the whole run has "
            f"{total}, which leaves none for the sources without epochs: lower the epochs or "
            "lengthen the run."
        )
    open_sources = [index for index, samples in enumerate(stated) if samples is None]
    weights = [Fraction(str(sources[index].weight or windows[index])) for index in open_sources]
    for index, share in zip(open_sources, apportion(rest, weights), strict=True):
        visits[index] = share
    return visits


def check_caps(
    sources: Sequence[TrainSourceConfig],
    windows: Sequence[int],
    total: int,
    *,
    seq_length: int,
    global_batch_size: int,
) -> None:
    """Checks that a run breaks no cap on epochs.

    Args:
        sources: The sources.
        windows: Windows of each.
        total: Samples of the run, a multiple of the global batch size.
        seq_length: Tokens per window.
        global_batch_size: Samples per step.

    Raises:
        ConfigError: A source would be seen more often than its `max_epochs`. The message says how
            many tokens are missing and how long a run would fit.
    """
    broken = _find_broken_cap(sources, windows, total)
    if broken is None:
        return
    index, visits = broken
    source, cap = sources[index], sources[index].max_epochs
    missing = (visits - _count_cap(source, windows[index])) * seq_length
    steps = _find_longest_fitting(sources, windows, total // global_batch_size, global_batch_size)
    remedy = f"shorten the run to schedule.steps={steps}, " if steps else ""
    raise ConfigError(
        f"data.train.{index}.max_epochs={cap} does not let {source.path} last: the run would see "
        f"its {windows[index]} windows {visits / windows[index]:.4g} times, {missing} tokens are "
        f"missing: {remedy}lower its share, add data, or raise max_epochs."
    )


class Interleaving:
    """Spreads the visits of several sources evenly over the positions of a run.

    The sources are leaves of a binary tree, the rarest ones deepest. At each node the visits of its
    two sides alternate as evenly as whole numbers allow (Bresenham's line), so any position is
    found on the way down in exact integers.

    Args:
        visits: Visits of each source, 0 or more, at least one of them positive.
    """

    def __init__(self, visits: Sequence[int]) -> None:
        self._num_sources = len(visits)
        heap: list[tuple[int, int, _Node]] = [
            (count, index, _Node(count, index)) for index, count in enumerate(visits) if count
        ]
        heapq.heapify(heap)
        order = len(visits)
        while len(heap) > 1:
            (_, _, low), (_, _, high) = heapq.heappop(heap), heapq.heappop(heap)
            node = _Node(low.total + high.total, -1, low, high)
            heapq.heappush(heap, (node.total, order, node))
            order += 1
        self._root: _Node = heap[0][2]

    @property
    def total(self) -> int:
        """Positions of the run."""
        return self._root.total

    def locate(self, position: int) -> tuple[int, int]:
        """The visit at a position.

        Args:
            position: In 0..total-1.

        Returns:
            The source, and the number of its visits before this one.
        """
        node = self._root
        while node.low is not None and node.high is not None:
            before = node.count_low_before(position)
            takes_low = node.count_low_before(position + 1) > before
            position = before if takes_low else position - before
            node = node.low if takes_low else node.high
        return node.source, position

    def count_visits(self, position: int) -> list[int]:
        """Visits of each source before a position.

        Args:
            position: In 0..total.

        Returns:
            A count for each source; they sum to `position`.
        """
        counts = [0] * self._num_sources
        remaining = [(self._root, position)]
        while remaining:
            node, before = remaining.pop()
            if node.low is None or node.high is None:
                counts[node.source] = before
            else:
                low = node.count_low_before(before)
                remaining += [(node.low, low), (node.high, before - low)]
        return counts


@dataclass(frozen=True)
class _Node:
    total: int
    source: int
    low: _Node | None = None
    high: _Node | None = None

    def count_low_before(self, position: int) -> int:
        """Visits of the rarer side among the first `position` of this node, rounded to nearest."""
        share = self.low.total if self.low is not None else 0
        return (position * share + self.total // 2) // self.total


class Visits(NamedTuple):
    """What stands at some positions of a run.

    Attributes:
        source_N: int64 [N], place of the source in `data.train`.
        epoch_N: int64 [N], pass over that source, from 0.
        window_N: int64 [N], window of that source.
        shift_N: int64 [N], tokens by which the windows of that pass start later.
    """

    source_N: IntArray
    epoch_N: IntArray
    window_N: IntArray
    shift_N: IntArray


class OrderStart(NamedTuple):
    """Where the order of a run begins that went on from another mixture or length.

    Attributes:
        sample: Samples before it.
        visits: Visits of each source before it; its passes go on there.
    """

    sample: int
    visits: tuple[int, ...]


class SampleOrder:
    """The global sample order of a run: position -> source, epoch and window.

    Args:
        visits: Visits of each source over the whole run, or over what follows `start`.
        windows: Windows of each source.
        seq_length: Tokens per window.
        kind: Order of a source's windows in each pass.
        seed: The run's seed.
        start: Where it begins; None: at the run's first sample.
    """

    def __init__(
        self,
        visits: Sequence[int],
        windows: Sequence[int],
        *,
        seq_length: int,
        kind: OrderKind,
        seed: int,
        start: OrderStart | None = None,
    ) -> None:
        self.windows = list(windows)
        self._start = OrderStart(0, (0,) * len(windows)) if start is None else start
        self._interleaving = Interleaving(visits)
        self._orders = [
            SourceOrder(count, seq_length, kind, (seed, _DOMAIN, index))
            for index, count in enumerate(windows)
        ]

    @property
    def total(self) -> int:
        """Samples of the run."""
        return self._start.sample + self._interleaving.total

    def find_visits(self, position_N: IntArray) -> Visits:
        """What stands at positions.

        Args:
            position_N: int64 [N], places in the global order, in 0..total-1, none before the start.

        Returns:
            Source, epoch, window and shift of each.
        """
        position_N = position_N - self._start.sample
        if len(self._orders) == 1:
            source_N, number_N = np.zeros_like(position_N), position_N
        else:
            located = [self._interleaving.locate(position) for position in position_N.tolist()]
            source_N, number_N = np.array(located, dtype=np.int64).reshape(-1, 2).T
        columns = [np.zeros_like(position_N) for _ in range(3)]
        for source in np.unique(source_N).tolist():
            here = source_N == source
            found = self._orders[source].find_visits(number_N[here] + self._start.visits[source])
            for column_N, values in zip(columns, found, strict=True):
                column_N[here] = values
        return Visits(source_N, *columns)

    def find_document_key(self, source: int, epoch: int) -> DocumentKey | None:
        """What names the order of a source's documents in a pass.

        Args:
            source: Place of the source.
            epoch: Pass over it, from 0.

        Returns:
            The key; None: documents stand as they are stored.
        """
        return self._orders[source].find_document_key(epoch)

    def count_visits(self, position: int) -> list[int]:
        """Visits of each source before a position.

        Args:
            position: In 0..total, not before the start.

        Returns:
            A count for each source.
        """
        counts = self._interleaving.count_visits(position - self._start.sample)
        return [sum(pair) for pair in zip(self._start.visits, counts, strict=True)]


def _count_stated(source: TrainSourceConfig, windows: int) -> Fraction:
    # By way of the text, 0.1 is one tenth: 0.1 epochs of 30 windows are exactly 3 windows.
    return Fraction(str(source.epochs)) * windows


def _count_cap(source: TrainSourceConfig, windows: int) -> int:
    return (Fraction(str(source.max_epochs)) * windows).__floor__()


def _find_broken_cap(
    sources: Sequence[TrainSourceConfig], windows: Sequence[int], total: int
) -> tuple[int, int] | None:
    """Returns the first source whose cap is broken, and its visits."""
    visits = share_visits(sources, windows, total)
    for index, source in enumerate(sources):
        # Stated epochs keep to the cap; the samples that fill the last step may go beyond.
        if source.epochs or not source.max_epochs:
            continue
        if visits[index] > _count_cap(source, windows[index]):
            return index, visits[index]
    return None


def _find_longest_fitting(
    sources: Sequence[TrainSourceConfig], windows: Sequence[int], too_long: int, batch_size: int
) -> int | None:
    """Returns the most steps below `too_long` that break no cap, None if there are none."""
    stated = sum(
        round(_count_stated(source, count))
        for source, count in zip(sources, windows, strict=True)
        if source.epochs
    )
    fitting = stated // batch_size + 1
    if fitting >= too_long or _find_broken_cap(sources, windows, fitting * batch_size):
        return None
    while too_long - fitting > 1:
        steps = (fitting + too_long) // 2
        if _find_broken_cap(sources, windows, steps * batch_size):
            too_long = steps
        else:
            fitting = steps
    return fitting
