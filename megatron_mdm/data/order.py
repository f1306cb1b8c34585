"""Sample order: an epoch is an epoch, and any position of the run is computed in O(1).

Every pass shows each window exactly once, in an order of its own: a keyed bijection of
0..N-1 per epoch. There is no index to build or store, and no layout in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.noise import seed_sequence

IntArray = NDArray[np.int64]

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_SHIFT = np.uint64(32)


class Permutation:
    """A pseudo-random bijection of 0..size-1, keyed by a tuple of integers.

    A Feistel network permutes the next power of four; values that fall outside are walked along
    their cycle until they come back in (about three extra rounds at worst, on average).

    Args:
        size: Number of elements, at least 1.
        key: Integers; different tuples give unrelated permutations.

    Source:
        Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, 2002 (cycle walking).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self.size = size
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
        value_N = self._feistel(np.asarray(index_N).astype(np.uint64))
        outside = np.flatnonzero(value_N >= self.size)
        while outside.size:
            value_N[outside] = self._feistel(value_N[outside])
            outside = outside[value_N[outside] >= self.size]
        return value_N.astype(np.int64)

    def _feistel(self, value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_N, right_N = value_N >> self._half, value_N & self._low
        for key in self._keys:
            mixed_N = (right_N ^ key) * _MULTIPLIERS[0]
            mixed_N = (mixed_N ^ (mixed_N >> _SHIFT)) * _MULTIPLIERS[1]
            left_N, right_N = right_N, left_N ^ ((mixed_N >> _SHIFT) & self._low)
        return (left_N << self._half) | right_N


class Visit(NamedTuple):
    """What stands at one position of the run.

    Attributes:
        epoch: Pass over the data, from 0.
        window: Window index, in 0..num_windows-1.
    """

    epoch: int
    window: int


class EpochOrder:
    """The run's global sample order: position -> (epoch, window).

    Args:
        num_windows: Windows of an epoch, at least 1.
        seed: The run's seed.
    """

    # Keeps these keys apart from those of the noise, which hash the same seed.
    _DOMAIN = 0x0DE2

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows = num_windows
        self._seed = seed
        # One tuple, replaced whole: the loader's thread and another may stand in different epochs.
        self._latest = (-1, Permutation(1, (0,)))

    def visit(self, position: int) -> Visit:
        """The window at a position.

        Args:
            position: Place in the global order, from 0.

        Returns:
            Epoch and window.
        """
        epoch, index = divmod(position, self.num_windows)
        known_epoch, permutation = self._latest
        if epoch != known_epoch:
            permutation = Permutation(self.num_windows, (self._seed, self._DOMAIN, epoch))
            self._latest = (epoch, permutation)
        return Visit(epoch, int(permutation(np.array([index]))[0]))
