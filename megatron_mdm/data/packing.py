"""Packing: which texts share a window, so that few windows hold them all."""

from __future__ import annotations

from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins: best fit, the largest first.

    Deterministic, and at most 11/9 of the fewest bins plus one. A set of bits says which amounts of
    free room exist, so that a million items take seconds.

    Args:
        sizes: Size of each item, from 1 to `capacity`.
        capacity: Size of a bin.

    Returns:
        The items of each bin, the largest first; equal items in their order.

    Raises:
        ValueError: An item fits into no bin.

    Source:
        D. S. Johnson, *Near-optimal bin packing algorithms*, 1973.
    """
    if sizes and not 1 <= min(sizes) <= max(sizes) <= capacity:
        raise ValueError(f"sizes from {min(sizes)} to {max(sizes)} for bins of {capacity}")
    bins: list[list[int]] = []
    # Bins by their free room, and the amounts of room that some bin has as a set of bits.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for item in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[item]
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        by_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return bins
