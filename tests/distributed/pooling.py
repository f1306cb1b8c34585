"""What ranks do in the tests of work that one of them hands out."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_mdm.inference.rank_pool import RankPool


def _squares(items: list[int]) -> list[tuple[int, int]]:
    # A world of one need not have a process group.
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [(item * item, rank) for item in items]


def _odd_ones_fail(items: list[int]) -> list[int]:
    for item in items:
        if item % 2:
            raise ValueError(f"{item} is odd")
    return items


def lead(num_items: int) -> dict[str, Any]:
    """Squares some numbers twice, and has some fail; what the leading rank saw."""
    seen: dict[str, Any] = {}
    pool = RankPool({"square": _squares, "even": _odd_ones_fail})

    def work() -> None:
        seen["first"] = pool.map("square", range(num_items))
        try:
            pool.map("even", range(num_items))
        except ValueError as error:
            seen["error"] = str(error)
        # All ranks are still there.
        seen["second"] = pool.map("square", range(3))
        seen["grouped"] = pool.map("square", range(num_items), together=lambda item: item // 3)

    pool.run_on_driver(work)
    return seen


def fail() -> str:
    """The work itself fails: the others must not wait for more."""
    pool = RankPool({"square": _squares})

    def work() -> None:
        raise ValueError("no such task")

    try:
        pool.run_on_driver(work)
    except ValueError as error:
        return str(error)
    return "served"
