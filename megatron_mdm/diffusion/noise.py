"""Noise as a function of (seed, position): no stream, no state, nothing to save or broadcast.

A position is a sample's place in the run's global sample order. It fixes the sample and its visit,
so every peer, layout and restart computes the same draws, and no two positions share any.
"""

from __future__ import annotations

import functools
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Purpose(IntEnum):
    """What a draw is for. Each purpose has a counter space of its own."""

    STEP_OFFSET = 0
    TIME = 1
    MASK = 2
    LENGTH = 3
    VALIDATION = 4
    DIRECTION = 5
    ORDER = 6
    KEYS = 7
    PROMPT = 8
    STEP_BACK = 9
    BLOCKS = 10
    KINDS = 11


def seed_sequence(*key: int) -> np.random.SeedSequence:
    """Hashes a tuple of integers: different tuples give unrelated states.

    Unlike a sum, (1, 2) and (2, 1) differ. NumPy alone cuts integers into words of 32 bits and pads
    with zeros, so that to it (1,) equals (1, 0) and (2**32, 5) equals (0, 1, 5); the number of
    words of every integer, and of integers, keeps them apart.

    Args:
        key: Non-negative integers of any size.

    Returns:
        The hashed tuple.
    """
    words = [word for value in key for word in (-(-value.bit_length() // 32), value)]
    return np.random.SeedSequence([len(key), *words])


class CounterNoise:
    """Random draws that depend on nothing but (seed, purpose, position).

    Args:
        seed: The run's seed, a non-negative integer of any size.
        domain: Separates uses that may share a seed, such as training and validation.
    """

    def __init__(self, seed: int, domain: int = 0) -> None:
        self._key = seed_sequence(seed, domain).generate_state(2, np.uint64)

    def make_generator(self, purpose: Purpose, position: int) -> np.random.Generator:
        """A fresh generator for one purpose at one position.

        Args:
            purpose: What the draws are for.
            position: Place in the global order, from 0.

        Returns:
            A Philox generator; its low counter words are free for 2**128 draws.
        """
        counter = np.array([0, 0, int(purpose), position], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))

    def uniform(self, purpose: Purpose, position: int) -> float:
        """One draw from U[0, 1).

        Args:
            purpose: What the draw is for.
            position: Place in the global order, from 0.

        Returns:
            A float64 in [0, 1).
        """
        return float(self.make_generator(purpose, position).random())

    def uniforms(self, purpose: Purpose, position: int, size: int) -> FloatArray:
        """Independent draws from U[0, 1).

        Args:
            purpose: What the draws are for.
            position: Place in the global order, from 0.
            size: How many.

        Returns:
            float64 array [size].
        """
        return self.make_generator(purpose, position).random(size)


def van_der_corput_ranks(size: int) -> IntArray:
    """A permutation of 0..size-1 whose every aligned block is spread evenly over the range.

    Slot i of a global batch takes stratum `ranks[i]` of t. Micro batches are contiguous blocks of
    slots, so each has low, middle and high t, and the work on masked tokens is even across ranks.

    Args:
        size: Number of slots, at least 1.

    Returns:
        int64 array [size], a permutation.
    """
    bits = max(1, (size - 1).bit_length())
    slots = np.arange(size, dtype=np.int64)
    reversed_bits = np.zeros(size, dtype=np.int64)
    for bit in range(bits):
        reversed_bits |= ((slots >> bit) & 1) << (bits - 1 - bit)
    return np.argsort(np.argsort(reversed_bits))


# A run has one or two sizes.
_cached_ranks = functools.lru_cache(maxsize=8)(van_der_corput_ranks)


class TimeSampler:
    """The time t of every training position.

    Args:
        noise: Source of draws.
        global_batch_size: Samples per optimizer step, B.
        low_discrepancy: t_i = frac(u + rank_i / B) with one u per step, or independent t.
    """

    def __init__(self, noise: CounterNoise, global_batch_size: int, low_discrepancy: bool) -> None:
        self._noise = noise
        self._batch = global_batch_size
        self._is_spread = low_discrepancy

    def __call__(self, position: int) -> float:
        """The time of the sample at a position.

        Args:
            position: Place in the global order, from 0.

        Returns:
            t in (0, 1], uniform over seeds.
        """
        return self.among(position, position % self._batch, self._batch)

    def among(self, position: int, slot: int, count: int) -> float:
        """The time of a sample where only some of a step have one.

        Args:
            position: Place in the global order, from 0.
            slot: Its number among those of its step that have a time, from 0.
            count: Samples of the step that have one.

        Returns:
            As for a call, stratified over those samples.
        """
        if not self._is_spread:
            return 1.0 - self._noise.uniform(Purpose.TIME, position)
        offset = self._noise.uniform(Purpose.STEP_OFFSET, position // self._batch)
        return 1.0 - (offset + float(_cached_ranks(count)[slot]) / count) % 1.0


def spread_times(first: float, count: int) -> list[float]:
    """Times of several texts that share a window.

    Args:
        first: Time of the first, in (0, 1].
        count: Texts.

    Returns:
        Times in (0, 1], evenly spread; each is uniform where the first is.
    """
    # The first is passed on as it is, since the sum below could round it.
    rest = [1.0 - (1.0 - first + index / count) % 1.0 for index in range(1, count)]
    return [first, *rest]
