"""Content that stands in several sources of a run, or several times in one: found by extent.

The same shards named twice, nested subsets, views over the same parts and copies of shards are seen
as often as all of their entries together say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_mdm.data.source import PART_BLOCKS, IntArray, TokenSource, fingerprint_stream


class SharedContent(NamedTuple):
    """Tokens that stand more than once in a run's sources.

    Attributes:
        times: How often they stand in each source that holds them, by the source's number.
        num_tokens: How many they are.
    """

    times: dict[int, int]
    num_tokens: int

    def epochs(self, epochs: Sequence[float]) -> float:
        """How often a run shows them.

        Args:
            epochs: Its passes over each source.

        Returns:
            The passes over them in all.
        """
        return sum(count * epochs[source] for source, count in self.times.items())


def find_shared_content(sources: Sequence[TokenSource], used: Sequence[int]) -> list[SharedContent]:
    """Finds tokens that stand more than once.

    Takes time proportional to the extents of the sources that share a part with another. Parts are
    compared by up to 32 blocks of their tokens, where another has as many documents and tokens.

    Args:
        sources: The sources of a run.
        used: The tokens at the beginning of each that the run uses.

    Returns:
        The shared content, the largest first.
    """
    keys = _name_parts(sources)
    holders = Counter(key for parts in keys for key in parts)
    repeated = {key for key, count in holders.items() if count > 1}
    # A source takes each token of a part at most once: a part that is listed once needs no look.
    stretches: dict[str, list[tuple[int, IntArray]]] = {key: [] for key in repeated}
    for number, (source, parts) in enumerate(zip(sources, keys, strict=True)):
        if repeated.isdisjoint(parts):
            continue
        located_N3 = _cut(source.locate_extents(), used[number])
        for part, key in enumerate(parts):
            if key in repeated:
                mine_N3 = located_N3[located_N3[:, 0] == part]
                bounds_N2 = np.stack([mine_N3[:, 1], mine_N3[:, 1] + mine_N3[:, 2]], axis=1)
                stretches[key].append((number, bounds_N2))
    tokens: Counter[tuple[int, ...]] = Counter()
    for found in stretches.values():
        tokens.update(_count_overlaps(found, len(sources)))
    shared = [
        SharedContent({source: n for source, n in enumerate(times) if n}, count)
        for times, count in tokens.items()
    ]
    return sorted(shared, key=lambda content: -content.num_tokens)


def describe_shared_content(
    shared: Sequence[SharedContent], names: Sequence[str], epochs: Sequence[float]
) -> list[str]:
    """Says in words what stands more than once.

    Args:
        shared: The content, of the sources named.
        names: What to call each source.
        epochs: The run's passes over each.

    Returns:
        A line for each kind of content.
    """
    return [
        f"{content.num_tokens:,} tokens stand in {_name_sources(content.times, names)}: the run "
        f"sees each {content.epochs(epochs):.4f} times"
        for content in shared
    ]


def _name_parts(sources: Sequence[TokenSource]) -> list[list[str]]:
    """Names the parts of each source by their content; equal parts have equal names."""
    sizes = [[f"{part.num_documents} {part.num_tokens}" for part in one.parts] for one in sources]
    holders = Counter(size for parts in sizes for size in parts)
    # A subset's parts and those of its siblings are the same files, opened again.
    fingerprints: dict[Path, str] = {}
    keys = []
    for source, parts in zip(sources, sizes, strict=True):
        mine = []
        for part, size in zip(source.parts, parts, strict=True):
            # A size that no other part has identifies the part.
            if holders[size] > 1:
                path = part.prefix.resolve()
                if path not in fingerprints:
                    fingerprints[path] = fingerprint_stream(part, PART_BLOCKS)
                size = f"{size} {fingerprints[path]}"
            mine.append(size)
        keys.append(mine)
    return keys


def _cut(located_N3: IntArray, num_tokens: int) -> IntArray:
    """Keeps the stretches that the first tokens of a stream lie in."""
    ends = located_N3[:, 2].cumsum()
    last = int(np.searchsorted(ends, num_tokens))
    kept = located_N3[: last + 1].copy()
    if last < len(ends):
        kept[last, 2] -= ends[last] - num_tokens
    return kept


def _count_overlaps(
    found: Sequence[tuple[int, IntArray]], num_sources: int
) -> dict[tuple[int, ...], int]:
    """Counts a part's tokens by how often each source holds them, if more than once in all."""
    bounds = np.concatenate([bounds_N2.ravel() for _, bounds_N2 in found])
    number = np.concatenate([np.full(bounds_N2.size, source) for source, bounds_N2 in found])
    # Each stretch begins at the first of its two bounds and ends at the second.
    step = np.tile([1, -1], len(bounds) // 2)
    order = np.argsort(bounds, kind="stable")
    deltas = np.zeros((len(bounds), num_sources), dtype=np.int64)
    deltas[np.arange(len(bounds)), number[order]] = step[order]
    times = deltas.cumsum(axis=0)[:-1]
    lengths = np.diff(bounds[order])
    is_shared = (times.sum(axis=1) > 1) & (lengths > 0)
    kinds, which = np.unique(times[is_shared], axis=0, return_inverse=True)
    totals = np.bincount(which.ravel(), weights=lengths[is_shared], minlength=len(kinds))
    return {tuple(kind.tolist()): int(total) for kind, total in zip(kinds, totals, strict=True)}


def _name_sources(times: Mapping[int, int], names: Sequence[str]) -> str:
    every = [
        names[source] + (f" ({count} times)" if count > 1 else "")
        for source, count in times.items()
    ]
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}"
