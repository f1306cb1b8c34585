"""Requests to a causal model: a context that several continuations share is computed once.

A row is a context and its continuations one after the other. None of them sees another, and each
counts its positions from the end of the context, so that it is scored as if it stood alone.

Shapes: U rows, S columns, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_mdm.inference.evaluation.passes import Passes, run_passes
from megatron_mdm.inference.evaluation.requests import ScoringRequest
from megatron_mdm.inference.evaluation.scoring_model import Judgement, ScoringModel

# Most tokens of the continuations of a row, as a multiple of its context: attention goes over all.
_BRANCHES_OF_A_CONTEXT = 4
# Rows are built together as long as they have no more tokens: bounds the memory.
_TOKENS_AT_ONCE = 2**20


def ask_causal(
    model: ScoringModel, requests: Sequence[ScoringRequest], *, max_tokens: int
) -> Iterator[tuple[ScoringRequest, Judgement]]:
    """Has a model judge continuations.

    Args:
        model: A causal one.
        requests: Distinct, each with a context.
        max_tokens: Most tokens of a forward pass.

    Yields:
        Each request with the judgement of its continuation, those of one context together.
    """
    rows = sorted(_rows(requests, max_tokens), key=_length, reverse=True)
    start = 0
    while start < len(rows):
        count = max(1, _TOKENS_AT_ONCE // _length(rows[start]))
        chosen = rows[start : start + count]
        found = run_passes(model, _passes(chosen), max_tokens=max_tokens)
        place = 0
        for one in (one for row in chosen for one in row):
            stop = place + len(one.continuation)
            yield one, Judgement(*(part[place:stop] for part in found))
            place = stop
        start += count


def _rows(requests: Sequence[ScoringRequest], max_tokens: int) -> list[list[ScoringRequest]]:
    by_context: dict[tuple[int, ...], list[ScoringRequest]] = {}
    for one in sorted(requests):
        by_context.setdefault(one.context, []).append(one)
    rows: list[list[ScoringRequest]] = []
    for context, group in by_context.items():
        most = min(max_tokens, (1 + _BRANCHES_OF_A_CONTEXT) * len(context))
        row: list[ScoringRequest] = []
        for one in group:
            if row and _length([*row, one]) > most:
                rows.append(row)
                row = []
            row.append(one)
        rows.append(row)
    return rows


def _length(row: Sequence[ScoringRequest]) -> int:
    # Nothing is predicted at the last token of a continuation.
    return len(row[0].context) + sum(len(one.continuation) - 1 for one in row)


def _passes(rows: Sequence[Sequence[ScoringRequest]]) -> Passes:
    lengths_U = np.array([_length(row) for row in rows])
    shape = (len(rows), int(lengths_U.max()))
    tokens_US, branch_US, positions_US = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    asked_US = np.zeros(shape, dtype=bool)
    places: list[np.ndarray] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        start = size = len(row[0].context)
        tokens_US[number, :start] = row[0].context
        positions_US[number, :start] = np.arange(start)
        asked_US[number, start - 1] = True
        for branch, one in enumerate(row, start=1):
            stop = start + len(one.continuation) - 1
            tokens_US[number, start:stop] = one.continuation[:-1]
            branch_US[number, start:stop] = branch
            positions_US[number, start:stop] = np.arange(size, size + stop - start)
            asked_US[number, start:stop] = True
            # The first token is predicted at the end of the context, each other at the one before.
            columns = np.concatenate([[size - 1], np.arange(start, stop)])
            places.append(np.stack([np.full_like(columns, number), columns]))
            targets += one.continuation
            start = stop
    rows_N, columns_N = np.concatenate(places, axis=1)
    return Passes(
        tokens_US=tokens_US,
        lengths_U=lengths_U,
        asked_US=asked_US,
        rows_N=rows_N,
        columns_N=columns_N,
        targets_N=np.array(targets),
        branch_US=branch_US,
        positions_US=positions_US,
    )
