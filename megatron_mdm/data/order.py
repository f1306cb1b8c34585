"""The order of a source's windows: an epoch is an epoch, and any visit is computed in O(1).

Every pass shows each window exactly once, in an order of its own: a keyed bijection of
0..N-1 per epoch. There is no index to build or store, and no layout in it. Where documents are
shuffled too, a second bijection orders those that the windows of the pass are cut out of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.noise import seed_sequence

IntArray = NDArray[np.int64]
OrderKind = Literal["shuffle", "fixed", "shifted", "documents"]
# Names the order of documents in a pass: equal keys give equal orders.
DocumentKey = tuple[int, ...]

# Up to this size a permutation is a shuffled table, and each order is equally likely.
_TABLE_SIZE = 64
_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_SHIFT = np.uint64(32)
_SHIFT_DOMAIN, _DOCUMENT_DOMAIN = 0x5417, 0xD0C5


class Permutation:
    """A pseudo-random bijection of 0..size-1, keyed by a tuple of integers.

    Up to 64 elements are shuffled, so that over keys each order is equally likely. More are
    permuted by a Feistel network over the next power of four; values that fall outside are walked
    along their cycle until they come back in (about three extra rounds at worst, on average). Over
    the few bits of a small set a network favours some orders, and makes none that is an odd number
    of swaps.

    Args:
        size: Number of elements, at least 1.
        key: Integers; different tuples give unrelated permutations.

    Source:
        Fisher and Yates, *Statistical Tables*, in the form of Durstenfeld, 1964, algorithm 235;
        Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, 2002 (cycle walking).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self.size = size
        self._table: IntArray | None = None
        if size <= _TABLE_SIZE:
            self._table = _shuffle_table(size, key)
            return
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half_bits)
        self._low = np.uint64((1 << half_bits) - 1)
        self._keys = seed_sequence(*key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, index_N: IntArray) -> IntArray:
        """Images of indices.

        Args:
            index_N: int64 [N], each in 0..size-1.

        Returns:
            int64 [N], each in 0..size-1; distinct for distinct indices.
        """
        if self._table is not None:
            return self._table[index_N]
        return self._walk(self._feistel, index_N)

    def invert(self, image_N: IntArray) -> IntArray:
        """Indices of images.

        Args:
            image_N: int64 [N], each in 0..size-1.

        Returns:
            int64 [N]: what this bijection maps to them.
        """
        if self._table is not None:
            return np.argsort(self._table)[image_N]
        return self._walk(self._invert_feistel, image_N)

    def _walk(
        self, step: Callable[[NDArray[np.uint64]], NDArray[np.uint64]], start_N: IntArray
    ) -> IntArray:
        """Steps along the cycles of the network until all values are inside."""
        value_N = step(np.asarray(start_N).astype(np.uint64))
        outside = np.flatnonzero(value_N >= self.size)
        while outside.size:
            value_N[outside] = step(value_N[outside])
            outside = outside[value_N[outside] >= self.size]
        return value_N.astype(np.int64)

    def _feistel(self, value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_N, right_N = value_N >> self._half, value_N & self._low
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ self._mix(right_N, key)
        return (left_N << self._half) | right_N

    def _invert_feistel(self, value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_N, right_N = value_N >> self._half, value_N & self._low
        for key in self._keys[::-1]:
            left_N, right_N = right_N ^ self._mix(left_N, key), left_N
        return (left_N << self._half) | right_N

    def _mix(self, value_N: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        mixed_N = (value_N ^ key) * _MULTIPLIERS[0]
        mixed_N = (mixed_N ^ (mixed_N >> _SHIFT)) * _MULTIPLIERS[1]
        return (mixed_N >> _SHIFT) & self._low


def _shuffle_table(size: int, key: tuple[int, ...]) -> IntArray:
    """A shuffled table of 0..size-1, int64 [size]."""
    words = seed_sequence(*key).generate_state(size, np.uint64).tolist()
    order = list(range(size))
    for last in range(size - 1, 0, -1):
        # The remainder of one of 2**64 values favours none by more than one part in 2**58.
        chosen = words[last] % (last + 1)
        order[last], order[chosen] = order[chosen], order[last]
    return np.array(order, dtype=np.int64)


class SourceOrder:
    """The order of one source's windows: visit number -> (epoch, window, shift).

    Args:
        num_windows: Windows of a pass, at least 1.
        seq_length: Tokens per window, S.
        kind: `shuffle`: a new order each pass. `fixed`: the first pass's order each pass.
            `shifted`: a new order each pass, and from the second pass on all windows start later
            by a new number of tokens. `documents`: a new order each pass, of windows that are cut
            out of a new order of documents.
        key: Integers that name the run and the source.
    """

    def __init__(
        self, num_windows: int, seq_length: int, kind: OrderKind, key: tuple[int, ...]
    ) -> None:
        self.num_windows = num_windows
        self._seq_length = seq_length
        self._kind = kind
        self._key = key

    def find_visits(self, number_N: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """What visits show.

        Args:
            number_N: int64 [N], visits of this source counted from 0 over the whole run.

        Returns:
            Three int64 [N]: epoch from 0, window in 0..num_windows-1, shift in 0..S-1.
        """
        epoch_N, index_N = np.divmod(number_N, self.num_windows)
        window_N, shift_N = np.empty_like(index_N), np.zeros_like(index_N)
        # Nearly always one epoch. Permutations are not kept, so that threads share nothing.
        for epoch in np.unique(epoch_N).tolist():
            here = epoch_N == epoch
            shown = 0 if self._kind == "fixed" else epoch
            window_N[here] = Permutation(self.num_windows, (*self._key, shown))(index_N[here])
            shift_N[here] = self._draw_shift(epoch)
        return epoch_N, window_N, shift_N

    def find_document_key(self, epoch: int) -> DocumentKey | None:
        """What names the order of documents in a pass; None: they stand as they are stored."""
        return (*self._key, epoch, _DOCUMENT_DOMAIN) if self._kind == "documents" else None

    def _draw_shift(self, epoch: int) -> int:
        if self._kind != "shifted" or epoch == 0:
            return 0
        state = seed_sequence(*self._key, epoch, _SHIFT_DOMAIN).generate_state(1, np.uint64)
        return int(state[0]) % self._seq_length
