"""Which sequences share a forward pass, for generation and for scoring."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

# A row shares a pass with a longer one only if it is at least this share as long; and where padding
# rules out the fast kernels, only as long as the pass is almost empty.
_LEAST_SHARE_OF_LENGTH = 7 / 8
_ALMOST_EMPTY = 1 / 4


def cut_batches(
    lengths: Sequence[int],
    *,
    groups: Sequence[Hashable] | None = None,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    shared: Sequence[int] | None = None,
    padding_is_cheap: bool = True,
) -> Iterator[slice]:
    """Cuts a list of sequences into batches of neighbours.

    Args:
        lengths: Tokens of each sequence, in the order in which they are to be run; with
            `max_tokens` the longest of what may share a pass comes first.
        groups: Only sequences of one group share a pass; None: there is one group.
        max_rows: Most sequences of a batch.
        max_tokens: Most tokens of a batch, padding included; a longer sequence is a batch.
        shared: Number of a second row that each sequence needs, such as guidance's; neighbours
            with the same number share it. None: there is none.
        padding_is_cheap: Can padded batches use the fast kernels?

    Yields:
        The places of each batch.
    """
    start = rows = 0
    for place, length in enumerate(lengths):
        added = 1
        if shared is not None:
            added += place == start or shared[place] != shared[place - 1]
        is_full = place - start == max_rows
        is_full |= groups is not None and groups[place] != groups[start]
        if max_tokens is not None:
            longest = lengths[start]
            tokens = rows * longest
            is_full |= tokens + added * longest > max_tokens
            if length < longest:
                may_pad = padding_is_cheap or tokens < _ALMOST_EMPTY * max_tokens
                is_full |= not may_pad or length < _LEAST_SHARE_OF_LENGTH * longest
        if is_full and place > start:
            yield slice(start, place)
            start, rows, added = place, 0, 1 + (shared is not None)
        rows += added
    if lengths:
        yield slice(start, len(lengths))
