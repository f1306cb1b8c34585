"""A pool of ranks: the driver deals out items, and a result depends on its item alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Import this before the process group exists. Its functions keep the group of that moment as a
# default argument; transformers imports them with a model, and a group kept that way would outlive
# its end: a gloo thread that frees a tensor while the interpreter ends aborts the process.
import torch.distributed.nn.functional

# One rank may work for long after another has finished its share.
_TIMEOUT = timedelta(days=1)

Task = Callable[[list[Any]], list[Any]]


class _Failure(NamedTuple):
    error: BaseException


class RankPool:
    """All ranks of a launcher, or this process alone.

    Args:
        tasks: What can be asked for, by name: from items to a result for each. The same on every
            rank.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_driver(self) -> bool:
        """Is this the rank that deals items out?"""
        return self._rank == 0

    def run_on_driver(self, work: Callable[[], None]) -> None:
        """Does work on the driver, the first rank, which may call `map`; the workers serve it.

        Args:
            work: What to do.

        Raises:
            BaseException: On the driver, what the work raised.
        """
        if not self.is_driver:
            self._serve()
            return
        try:
            work()
        finally:
            self._announce(None)

    def map(
        self,
        name: str,
        items: Sequence[Any],
        *,
        together: Callable[[Any], Hashable] | None = None,
        cost: Callable[[Any], float] | None = None,
    ) -> list[Any]:
        """Maps items to results on all ranks. Within `run_on_driver` alone.

        Args:
            name: Of the task.
            items: Dealt out in turn.
            together: Items with an equal key go to the same rank; None: each by itself.
            cost: The most costly are dealt out first, so that items of similar cost go to different
                ranks; None: in their order.

        Returns:
            A result for each, in their order.

        Raises:
            BaseException: What the task raised, on whichever rank.
        """
        if self._size == 1:
            return self._tasks[name](list(items))
        order = list(range(len(items)))
        if cost is not None:
            order.sort(key=lambda place: -cost(items[place]))
        groups = order if together is None else [together(items[place]) for place in order]
        places = [[order[turn] for turn in mine] for mine in deal(groups, self._size)]
        dealt = [[items[place] for place in mine] for mine in places]
        self._announce((name, dealt))
        shares = self._do(name, dealt)
        for share in shares:
            if isinstance(share, _Failure):
                raise share.error
        results: list[Any] = [None] * len(items)
        for mine, share in zip(places, shares, strict=True):
            for place, result in zip(mine, share, strict=True):
                results[place] = result
        return results

    def _serve(self) -> None:
        while (asked := self._announce(None)) is not None:
            self._do(*asked)

    def _announce(
        self, asked: tuple[str, list[list[Any]]] | None
    ) -> tuple[str, list[list[Any]]] | None:
        if self._size == 1:
            return None
        box = [asked]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _do(self, name: str, dealt: Sequence[list[Any]]) -> list[Any]:
        """Does this rank's share; returns all shares on the driver."""
        share: list[Any] | _Failure
        try:
            share = self._tasks[name](dealt[self._rank])
        except Exception as error:
            # The driver raises it: a worker that ended here would leave the others waiting.
            share = _Failure(error)
        shares: list[Any] | None = [None] * self._size if self.is_driver else None
        dist.gather_object(share, shares, dst=0)
        return shares or []


def deal(groups: Iterable[Hashable], num_ranks: int) -> list[list[int]]:
    """Deals items out in turn, those of a group to one rank.

    Args:
        groups: The group of each item.
        num_ranks: Ranks.

    Returns:
        For each rank the places of its items, in their order.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    rank_of: dict[Hashable, int] = {}
    for place, group in enumerate(groups):
        dealt[rank_of.setdefault(group, len(rank_of) % num_ranks)].append(place)
    return dealt


@contextmanager
def join_launched_ranks() -> Iterator[None]:
    """Joins the other processes of torchrun, if there are any, and takes this rank's GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Objects go through the CPU: results are small.
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
