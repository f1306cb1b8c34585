"""How many tokens each step of sampling is due, and how blocks share the steps.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from .decoding import Decoding


def count_unmasked_after(step: int, num_steps: int, num_masks: int) -> int:
    """How many of a block's masks the schedule has unmasked after some of its steps.

    Args:
        step: Steps taken, 0 to `num_steps`.
        num_steps: Steps of the block, at least 1.
        num_masks: Masks of the block, at least 0.

    Returns:
        ceil(step * num_masks / num_steps): 0 at the start, all at the end, and with no more steps
        than masks every step unmasks one at least, and one more than another at most.
    """
    return -(-step * num_masks // num_steps)


def plan_block_steps(num_masks: int, decoding: Decoding) -> list[int]:
    """Steps of each block of one sequence.

    Args:
        num_masks: Masks of the sequence, at least 0.
        decoding: Steps and length of a block.

    Returns:
        Steps of each block, from left to right.

    Raises:
        ValueError: There are fewer steps than blocks.
    """
    length = decoding.block_length or max(num_masks, 1)
    sizes = [min(length, num_masks - start) for start in range(0, num_masks, length)]
    num_steps = num_masks if decoding.num_steps is None else decoding.num_steps
    if decoding.order != "ancestral" and not decoding.remasking:
        num_steps = min(num_steps, num_masks)
    if num_steps < len(sizes):
        raise ValueError(
            f"num_steps={num_steps} is fewer than the {len(sizes)} blocks of "
            f"block_length={length}: raise num_steps or block_length."
        )
    return share_steps(sizes, num_steps) if sizes else []


def share_steps(block_sizes: Sequence[int], num_steps: int) -> list[int]:
    """Gives each block one step and shares the others by size.

    Args:
        block_sizes: Masks of each block, each at least 1.
        num_steps: At least the number of blocks.

    Returns:
        Steps of each block; they sum to `num_steps`, and no block has more steps than masks if
        there are no more steps than masks in all.
    """
    spare_steps = num_steps - len(block_sizes)
    spare_tokens = max(sum(block_sizes) - len(block_sizes), 1)
    shares, seen_tokens, given = [], 0, 0
    for size in block_sizes:
        seen_tokens += size - 1
        total = spare_steps * seen_tokens // spare_tokens
        shares.append(1 + total - given)
        given = total
    # Only remasking has more steps than masks: the last block gets what the shares left over.
    shares[-1] += num_steps - sum(shares)
    return shares
