"""A choice of windows to judge models on, spread over documents."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.order import Permutation

IntArray = NDArray[np.int64]

# The most windows that are looked at in all, and per window that is chosen.
_MOST_CANDIDATES = 1 << 14
_MOST_CANDIDATES_PER_WINDOW = 16


class _Windows(Protocol):
    """Windows whose documents are known."""

    @property
    def num_windows(self) -> int:
        """Windows of a pass."""
        ...

    def find_documents(self, number_N: IntArray, /) -> IntArray:
        """Which document each window is of; int64 [N, D]."""
        ...


class ChosenWindows(NamedTuple):
    """Windows to judge models on.

    Attributes:
        window_N: int64 [N], their numbers, each once.
        document_N: int64 [N], number of the document that each is of, from 0.
    """

    window_N: IntArray
    document_N: IntArray


def choose_windows(windows: _Windows, number: int, key: tuple[int, ...]) -> ChosenWindows:
    """Chooses windows at random, from as many documents as there are.

    No document gives a second window before each of those seen gave its first, so that one long
    file is not most of what is judged. Where no window shares its document with another, all are
    equally likely. Documents are looked for among all windows up to 16,384, and in a larger corpus
    among as many that are drawn from it, or 16 for every one that is chosen.

    Args:
        windows: To choose from.
        number: How many, at most.
        key: Of the choice.

    Returns:
        The choice, in random order.
    """
    count = min(number, windows.num_windows)
    permutation = Permutation(windows.num_windows, key)
    most = max(count * _MOST_CANDIDATES_PER_WINDOW, _MOST_CANDIDATES)
    most = min(most, windows.num_windows)
    num_candidates = min(2 * count, most)
    while True:
        candidate_M = permutation(np.arange(num_candidates))
        found_MD = windows.find_documents(candidate_M)
        document_M = np.unique(found_MD, axis=0, return_inverse=True)[1].reshape(-1)
        rank_M = _rank_within(document_M)
        chosen_N = np.argsort(rank_M, kind="stable")[:count]
        # More candidates would not change a choice of different documents.
        if num_candidates == most or not rank_M[chosen_N].any():
            break
        num_candidates = min(4 * num_candidates, most)
    _, document_N = np.unique(document_M[chosen_N], return_inverse=True)
    return ChosenWindows(candidate_M[chosen_N], document_N.astype(np.int64))


def _rank_within(group_M: IntArray) -> IntArray:
    """How many of its group stand before each element."""
    order_M = np.argsort(group_M, kind="stable")
    sizes = np.bincount(group_M)
    starts_M = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank_M = np.empty_like(order_M)
    rank_M[order_M] = np.arange(len(group_M)) - starts_M
    return rank_M
