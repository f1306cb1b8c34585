"""Lays requests out as forward passes, in which equal passes are made once.

Masked diffusion: random masks of short continuations repeat, fully masked continuations of one
length after one context are the same tokens, and the unconditional pass of guidance depends on its
length alone. A hidden token is asked for where it is hidden, or one place before. A causal model: a
context that several continuations share is computed once. A row is a context and its continuations
one after the other; none of them sees another, and the positions of each count from the end of the
context.

Shapes: R passes that are asked for, later the distinct ones; S columns, K passes of a question, L
tokens of its continuation, N targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.inference.batching import cut_batches
from megatron_mdm.inference.models import ModelFacts, ScoringModel
from megatron_mdm.inference.passes import Branches, Guidance, Judgement, NoiseTargets, Passes
from megatron_mdm.inference.requests import Request

# Most tokens of passes that are laid out together, which bounds the memory.
_TOKENS_AT_ONCE = 2**20
# Most tokens of a row's continuations, over those of its context: attention runs over all of them.
_BRANCHES_OF_A_CONTEXT = 4


class Question(NamedTuple):
    """Forward passes of masked diffusion over one request.

    Attributes:
        request: What is scored.
        hidden_KL: Bool [K, L], tokens of the continuation that are masked in each pass.
        weights_KL: float64 [K, L], of their log-probabilities; 0: not asked for. The mask of a
            pass decides which are 0.
        shown_KL: int64 [K, L], what the model sees of the continuation; None: what is not masked.
        chances_K2: float64 [K, 2], of hybrid or uniform noise: see `Probe.chances`; None: masks
            alone.
        log_snr_K: float32 [K], of that noise, for a model that takes it; None: it takes none.
    """

    request: Request
    hidden_KL: NDArray[np.bool_]
    weights_KL: NDArray[np.float64]
    shown_KL: NDArray[np.int64] | None = None
    chances_K2: NDArray[np.float64] | None = None
    log_snr_K: NDArray[np.float32] | None = None


def ask_masked(
    model: ScoringModel,
    questions: Iterable[Question],
    *,
    max_tokens: int,
    guidance_scale: float = 0.0,
) -> Iterator[tuple[Question, Judgement]]:
    """Asks a masked-diffusion model.

    Args:
        model: The model.
        questions: The longest requests first; those with a context in common side by side.
        max_tokens: Most tokens of a forward pass.
        guidance_scale: w of classifier-free guidance, with the context masked in the other pass.

    Yields:
        Each question with what the model says, [K, L], in their order.
    """

    def answer(waiting: Sequence[Question]) -> Iterator[tuple[Question, Judgement]]:
        passes = _make_masked_passes(waiting, model.facts, guidance_scale)
        found = _run(model, passes, max_tokens)
        start = 0
        for question in waiting:
            asked_KL = question.weights_KL != 0
            stop = start + int(asked_KL.sum())
            reply = Judgement.make_blank(*asked_KL.shape)
            for part_KL, part_N in zip(reply, found, strict=True):
                part_KL[asked_KL] = part_N[start:stop]
            yield question, reply
            start = stop

    waiting: list[Question] = []
    tokens = 0
    for question in questions:
        size = len(question.hidden_KL) * question.request.length
        if waiting and tokens + size > _TOKENS_AT_ONCE:
            yield from answer(waiting)
            waiting, tokens = [], 0
        waiting.append(question)
        tokens += size
    if waiting:
        yield from answer(waiting)


def ask_causal(
    model: ScoringModel, requests: Sequence[Request], *, max_tokens: int
) -> Iterator[tuple[Request, Judgement]]:
    """Asks a causal model to judge continuations.

    Args:
        model: The model.
        requests: Distinct, each with a context.
        max_tokens: Most tokens of a forward pass.

    Yields:
        Each request with the judgement of its continuation, those of one context together.
    """
    rows = sorted(_group_by_context(requests, max_tokens), key=_count_tokens, reverse=True)
    lengths = [_count_tokens(row) for row in rows]
    start = 0
    while start < len(rows):
        stop = start + max(1, _TOKENS_AT_ONCE // lengths[start])
        passes = _make_causal_passes(rows[start:stop], sees_prompt=model.facts.sees_prompt)
        found = _run(model, passes, max_tokens)
        place = 0
        for one in (one for row in rows[start:stop] for one in row):
            end = place + len(one.continuation)
            yield one, found.take(place, end)
            place = end
        start = stop


def _run(model: ScoringModel, passes: Passes, max_tokens: int) -> Judgement:
    """The judgement of all N targets, the rows run in batches."""
    # Rows with a guidance pass in common side by side; the longest first.
    keys = [passes.asked_RS.sum(1), -passes.lengths_R]
    shared_R = None if passes.guidance is None else passes.guidance.index_R
    if shared_R is not None:
        keys.insert(0, shared_R)
    order_R = np.lexsort(keys)
    place_R = np.argsort(order_R)
    # Targets in the order of the rows that they are asked of.
    order_N = np.argsort(place_R[passes.rows_N], kind="stable")
    places_N = place_R[passes.rows_N][order_N]
    found = Judgement.make_blank(len(passes.rows_N))
    for batch in cut_batches(
        passes.lengths_R[order_R].tolist(),
        max_tokens=max_tokens,
        shared=None if shared_R is None else shared_R[order_R].tolist(),
        padding_is_cheap=model.facts.is_causal,
    ):
        chosen_N = order_N[slice(*np.searchsorted(places_N, (batch.start, batch.stop)))]
        judged = model.judge(passes.take(order_R[batch], chosen_N))
        for whole_N, part_N in zip(found, judged, strict=True):
            whole_N[chosen_N] = part_N
    return found


def _make_masked_passes(
    questions: Sequence[Question], facts: ModelFacts, guidance_scale: float
) -> Passes:
    mask_token_id, shift = facts.mask_token_id, int(facts.is_shifted)
    num_rows = sum(len(one.hidden_KL) for one in questions)
    width = max(one.request.length for one in questions)
    # -1 after the end, so that rows of several lengths differ.
    tokens_RS = np.full((num_rows, width), -1, dtype=np.int64)
    asked_RS = np.zeros((num_rows, width), dtype=bool)
    starts_R = np.empty(num_rows, dtype=np.int64)
    log_snr_R = np.zeros(num_rows, dtype=np.float32)
    targets, chances = [], []
    row = 0
    for question in questions:
        request, hidden_KL = question.request, question.hidden_KL
        rows = slice(row, row + len(hidden_KL))
        start, stop = len(request.context), request.length
        clean_L, asked_KL = np.array(request.continuation), question.weights_KL != 0
        tokens_RS[rows, :start] = request.context
        shown_KL = np.where(hidden_KL, mask_token_id, clean_L)
        tokens_RS[rows, start:stop] = shown_KL if question.shown_KL is None else question.shown_KL
        asked_RS[rows, start - shift : stop - shift] = asked_KL
        starts_R[rows] = start
        targets.append(np.broadcast_to(clean_L, asked_KL.shape)[asked_KL])
        if question.chances_K2 is not None:
            chances.append(question.chances_K2.repeat(asked_KL.sum(1), axis=0))
        if question.log_snr_K is not None:
            log_snr_R[rows] = question.log_snr_K
        row = rows.stop
    # A random mask that hides nothing asks nothing.
    is_needed_R = asked_RS.any(1)
    tokens_RS, asked_RS = tokens_RS[is_needed_R], asked_RS[is_needed_R]
    starts_R, log_snr_R = starts_R[is_needed_R], log_snr_R[is_needed_R]
    # Rows are equal if their tokens are, and what is told of their noise; under guidance the end of
    # the context has to agree too.
    is_guided = guidance_scale != 0
    also: list[NDArray[Any]] = [log_snr_R.view(np.int32)] if facts.takes_log_snr else []
    also += [starts_R] if is_guided else []
    index_R, first_R = _number_distinct(np.column_stack([*also, tokens_RS]) if also else tokens_RS)
    rows_N, columns_N = asked_RS.nonzero()
    passes = Passes(
        tokens_RS=tokens_RS[first_R].clip(min=0),
        lengths_R=(tokens_RS[first_R] >= 0).sum(1),
        asked_RS=asked_RS[first_R],
        rows_N=index_R[rows_N],
        columns_N=columns_N,
        targets_N=np.concatenate(targets),
        noise=NoiseTargets(np.concatenate(chances), mask_token_id) if chances else None,
        log_snr_R=log_snr_R[first_R] if facts.takes_log_snr else None,
    )
    if not is_guided:
        return passes
    starts_R = starts_R[first_R]
    is_context_RS = np.arange(width) < starts_R[:, None]
    others_RS = np.where(is_context_RS, mask_token_id, tokens_RS[first_R])
    keys = [*(one[first_R] for one in also), others_RS]
    other_R, first_C = _number_distinct(np.column_stack(keys))
    guidance = Guidance(others_RS[first_C].clip(min=0), other_R, guidance_scale)
    return replace(passes, guidance=guidance)


def _number_distinct(keys_RS: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers distinct rows: the number of each row, [R], and the first row of each number."""
    kinds: dict[bytes, int] = {}
    found = [kinds.setdefault(key.tobytes(), len(kinds)) for key in keys_RS]
    index_R = np.array(found, dtype=np.int64)
    return index_R, np.unique(index_R, return_index=True)[1]


def _group_by_context(requests: Sequence[Request], max_tokens: int) -> list[list[Request]]:
    by_context: dict[tuple[int, ...], list[Request]] = {}
    for one in sorted(requests):
        by_context.setdefault(one.context, []).append(one)
    rows: list[list[Request]] = []
    for context, group in by_context.items():
        most = min(max_tokens, (1 + _BRANCHES_OF_A_CONTEXT) * len(context))
        row: list[Request] = []
        for one in group:
            if row and _count_tokens([*row, one]) > most:
                rows.append(row)
                row = []
            row.append(one)
        rows.append(row)
    return rows


def _count_tokens(row: Sequence[Request]) -> int:
    # Nothing is predicted at the last token of a continuation.
    return len(row[0].context) + sum(len(one.continuation) - 1 for one in row)


def _make_causal_passes(rows: Sequence[Sequence[Request]], *, sees_prompt: bool) -> Passes:
    lengths_R = np.array([_count_tokens(row) for row in rows])
    shape = (len(rows), int(lengths_R.max()))
    tokens_RS, branch_RS, positions_RS = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    asked_RS = np.zeros(shape, dtype=bool)
    places: list[NDArray[np.int64]] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        start = size = len(row[0].context)
        tokens_RS[number, :start] = row[0].context
        positions_RS[number, :start] = np.arange(start)
        asked_RS[number, start - 1] = True
        for branch, one in enumerate(row, start=1):
            stop = start + len(one.continuation) - 1
            tokens_RS[number, start:stop] = one.continuation[:-1]
            branch_RS[number, start:stop] = branch
            positions_RS[number, start:stop] = np.arange(size, size + stop - start)
            asked_RS[number, start:stop] = True
            # The first token is predicted at the end of the context, each other at the one before.
            columns = np.concatenate([[size - 1], np.arange(start, stop)])
            places.append(np.stack([np.full_like(columns, number), columns]))
            targets += one.continuation
            start = stop
    rows_N, columns_N = np.concatenate(places, axis=1)
    return Passes(
        tokens_RS=tokens_RS,
        lengths_R=lengths_R,
        asked_RS=asked_RS,
        rows_N=rows_N,
        columns_N=columns_N,
        targets_N=np.array(targets),
        branches=Branches(branch_RS, positions_RS),
        prefix_R=np.array([len(row[0].context) for row in rows]) if sees_prompt else None,
    )
