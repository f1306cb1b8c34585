"""Questions to a masked-diffusion model: equal passes of all of them are made once.

With short continuations random masks repeat themselves, answers of the same length to one question
are the same text once they are hidden, and the pass of guidance that sees no context depends on its
length alone.

Shapes: R passes that are asked for, U distinct ones, S columns, K passes of a question, L tokens of
its continuation, N targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.inference.evaluation.passes import Passes, run_passes
from megatron_mdm.inference.evaluation.requests import Question, Reply
from megatron_mdm.inference.evaluation.scoring_model import Judgement, ScoringModel

# Questions are answered together as long as they have no more tokens: bounds the memory.
_TOKENS_AT_ONCE = 2**20


def ask_masked(
    model: ScoringModel,
    questions: Iterable[Question],
    *,
    max_tokens: int,
    guidance_scale: float = 0.0,
) -> Iterator[tuple[Question, Reply]]:
    """Has a model answer.

    Args:
        model: Masked diffusion.
        questions: The longest requests first; those with a context in common side by side.
        max_tokens: Most tokens of a forward pass.
        guidance_scale: w of classifier-free guidance, with the context masked in the other pass.

    Yields:
        Each question with its reply, in their order.
    """
    waiting: list[Question] = []
    tokens = 0
    for question in questions:
        size = len(question.hidden_KL) * question.request.length
        if waiting and tokens + size > _TOKENS_AT_ONCE:
            yield from _answer(model, waiting, max_tokens, guidance_scale)
            waiting, tokens = [], 0
        waiting.append(question)
        tokens += size
    if waiting:
        yield from _answer(model, waiting, max_tokens, guidance_scale)


def _answer(
    model: ScoringModel, questions: Sequence[Question], max_tokens: int, guidance_scale: float
) -> Iterator[tuple[Question, Reply]]:
    passes = _passes(questions, model.facts.mask_token_id, is_guided=guidance_scale != 0)
    found = run_passes(model, passes, max_tokens=max_tokens, guidance_scale=guidance_scale)
    start = 0
    for question in questions:
        stop = start + int(question.asked_KL.sum())
        yield question, _reply(question, Judgement(*(part[start:stop] for part in found)))
        start = stop


def _reply(question: Question, judgement: Judgement) -> Reply:
    shape, asked_KL = question.asked_KL.shape, question.asked_KL
    reply = Reply(np.zeros(shape), np.zeros(shape), np.ones(shape, dtype=bool))
    for part_KL, part_N in zip(reply, judgement, strict=True):
        part_KL[asked_KL] = part_N.numpy()
    return reply


def _passes(questions: Sequence[Question], mask_token_id: int, *, is_guided: bool) -> Passes:
    num_rows = sum(len(one.hidden_KL) for one in questions)
    width = max(one.request.length for one in questions)
    # -1 after the end, so that rows of several lengths differ.
    tokens_RS = np.full((num_rows, width), -1, dtype=np.int64)
    asked_RS = np.zeros((num_rows, width), dtype=bool)
    starts_R = np.empty(num_rows, dtype=np.int64)
    targets = []
    row = 0
    for request, hidden_KL, asked_KL in questions:
        rows = slice(row, row + len(hidden_KL))
        start, stop = len(request.context), request.length
        clean_L = np.array(request.continuation, dtype=np.int64)
        tokens_RS[rows, :start] = request.context
        tokens_RS[rows, start:stop] = np.where(hidden_KL, mask_token_id, clean_L)
        asked_RS[rows, start:stop] = asked_KL
        starts_R[rows] = start
        targets.append(np.broadcast_to(clean_L, asked_KL.shape)[asked_KL])
        row = rows.stop
    # A random mask that hides nothing asks nothing.
    is_needed_R = asked_RS.any(1)
    tokens_RS, asked_RS = tokens_RS[is_needed_R], asked_RS[is_needed_R]
    starts_R = starts_R[is_needed_R]
    # What is hidden decides what is asked; without a context, also where that ended.
    keys_RS = np.column_stack([starts_R, tokens_RS]) if is_guided else tokens_RS
    index_R, first_U = _distinct(keys_RS)
    rows_N, columns_N = asked_RS.nonzero()
    tokens_US, starts_U = tokens_RS[first_U], starts_R[first_U]
    others_CS = other_index_U = None
    if is_guided:
        is_context_US = np.arange(width) < starts_U[:, None]
        others_US = np.where(is_context_US, mask_token_id, tokens_US)
        other_index_U, first_C = _distinct(np.column_stack([starts_U, others_US]))
        others_CS = others_US[first_C].clip(min=0)
    return Passes(
        tokens_US=tokens_US.clip(min=0),
        lengths_U=(tokens_US >= 0).sum(1),
        asked_US=asked_RS[first_U],
        rows_N=index_R[rows_N],
        columns_N=columns_N,
        targets_N=np.concatenate(targets),
        others_CS=others_CS,
        other_index_U=other_index_U,
    )


def _distinct(keys_RS: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of each row's kind, [R], and the first row of each kind, [U]."""
    kinds: dict[bytes, int] = {}
    found = [kinds.setdefault(key.tobytes(), len(kinds)) for key in keys_RS]
    index_R = np.array(found, dtype=np.int64)
    return index_R, np.unique(index_R, return_index=True)[1]
