"""Rows of tokens and what is asked of them, run in batches of a size that suits the device.

Shapes: U rows, S columns, C rows of the other pass of guidance, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mdm.inference.evaluation.scoring_model import (
    Branches,
    Judgement,
    ScoringBatch,
    ScoringModel,
)

# Rows share a pass with a longer one only if it is hardly longer, and masked ones, to which padding
# costs the fast kernels, only if the pass would be almost empty without them.
_LEAST_SHARE_OF_LENGTH = 7 / 8
_ALMOST_EMPTY = 1 / 4


@dataclass(frozen=True)
class Passes:
    """Rows to run.

    Attributes:
        tokens_US: int64 [U, S], 0 after the end of a row.
        lengths_U: int64 [U], tokens of each row.
        asked_US: Bool [U, S], positions whose logits are needed, at least one in a row.
        rows_N: int64 [N], row of each target.
        columns_N: int64 [N], where it is asked for.
        targets_N: int64 [N], the token.
        others_CS: int64 [C, S], distinct rows of the other pass of guidance; None: no guidance.
        other_index_U: int64 [U], which of them belongs to each row.
        branch_US: int64 [U, S], see `scoring_model.Branches`; None: no row has branches.
        positions_US: int64 [U, S], as there.
    """

    tokens_US: NDArray[np.int64]
    lengths_U: NDArray[np.int64]
    asked_US: NDArray[np.bool_]
    rows_N: NDArray[np.int64]
    columns_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    others_CS: NDArray[np.int64] | None = None
    other_index_U: NDArray[np.int64] | None = None
    branch_US: NDArray[np.int64] | None = None
    positions_US: NDArray[np.int64] | None = None


def run_passes(
    model: ScoringModel, passes: Passes, *, max_tokens: int, guidance_scale: float = 0.0
) -> Judgement:
    """Runs rows in batches.

    Args:
        model: The model.
        passes: The rows.
        max_tokens: Most tokens of a batch; a row that is longer is a batch.
        guidance_scale: w of classifier-free guidance.

    Returns:
        The judgement of all N targets.
    """
    order_U = _order(passes)
    place_U = np.empty_like(order_U)
    place_U[order_U] = np.arange(len(order_U))
    # Targets in the order of the rows that they are asked of.
    order_N = np.argsort(place_U[passes.rows_N], kind="stable")
    places_N = place_U[passes.rows_N][order_N]
    size = len(passes.rows_N)
    found = Judgement(torch.empty(size), torch.empty(size), torch.empty(size, dtype=torch.bool))
    for start, stop in _batches(passes, order_U, max_tokens, pads=model.facts.is_causal):
        chosen_N = order_N[slice(*np.searchsorted(places_N, (start, stop)))]
        batch = _batch(passes, order_U[start:stop], chosen_N, place_U - start, guidance_scale)
        for whole_N, part in zip(found, model.judge(batch), strict=True):
            whole_N[torch.from_numpy(chosen_N)] = part
    return found


def _order(passes: Passes) -> NDArray[np.int64]:
    """Rows with something in common side by side, the longest first."""
    keys = [passes.asked_US.sum(1), -passes.lengths_U]
    if passes.other_index_U is not None:
        keys.insert(0, passes.other_index_U)
    return np.lexsort(keys)


def _batches(
    passes: Passes, order_U: NDArray[np.int64], max_tokens: int, *, pads: bool
) -> Iterator[tuple[int, int]]:
    """First and last place, excluded, of each batch."""
    start, rows = 0, 0
    lengths = passes.lengths_U[order_U].tolist()
    index_U = passes.other_index_U
    others = None if index_U is None else index_U[order_U].tolist()
    for place, length in enumerate(lengths):
        is_new = others is None or place == start or others[place] != others[place - 1]
        added = 1 if others is None else 1 + is_new
        tokens, longest = rows * lengths[start], lengths[start]
        is_full = tokens + added * longest > max_tokens
        if length < longest:
            may_pad = pads or tokens < _ALMOST_EMPTY * max_tokens
            is_full |= not may_pad or length < _LEAST_SHARE_OF_LENGTH * longest
        if is_full and place > start:
            yield start, place
            start, rows, added = place, 0, 1 if others is None else 2
        rows += added
    if lengths:
        yield start, len(lengths)


def _batch(
    passes: Passes,
    chosen_B: NDArray[np.int64],
    chosen_N: NDArray[np.int64],
    place_U: NDArray[np.int64],
    guidance_scale: float,
) -> ScoringBatch:
    lengths_B = passes.lengths_U[chosen_B]
    longest = int(lengths_B.max())

    def rows(part_US: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(part_US[chosen_B, :longest])

    asked_BS = passes.asked_US[chosen_B, :longest]
    # Which of the asked positions each is.
    number_BS = asked_BS.cumsum().reshape(asked_BS.shape) - 1
    others_CS = index_B = branches = None
    if passes.others_CS is not None and passes.other_index_U is not None:
        used_C, index_B = np.unique(passes.other_index_U[chosen_B], return_inverse=True)
        others_CS = torch.from_numpy(passes.others_CS[used_C, :longest])
    if passes.branch_US is not None and passes.positions_US is not None:
        branches_BS = rows(passes.branch_US)
        # Rows of one text each need no mask.
        if bool((branches_BS > 1).any()):
            branches = Branches(branches_BS, rows(passes.positions_US))
    return ScoringBatch(
        tokens_BS=rows(passes.tokens_US),
        is_real_BS=torch.from_numpy(np.arange(longest) < lengths_B[:, None]),
        asked_BS=torch.from_numpy(asked_BS),
        targets_N=torch.from_numpy(passes.targets_N[chosen_N]),
        places_N=torch.from_numpy(
            number_BS[place_U[passes.rows_N[chosen_N]], passes.columns_N[chosen_N]]
        ),
        hidden_CS=others_CS,
        hidden_index_B=None if index_B is None else torch.from_numpy(index_B),
        guidance_scale=guidance_scale,
        branches=branches,
    )
