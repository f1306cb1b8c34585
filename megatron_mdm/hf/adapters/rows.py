"""Packed windows as rows, one per pair: a prompt with its response.

The trainer packs pairs into windows and separates them by an attention mask, which an exported
model does not take. Rotary attention depends on distances alone, so a pair in a row of its own
has the same logits, and the loss of a window is the sum over its pairs.

Shapes: B samples of a micro batch, S window, R rows of a pass, L their greatest length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.samples import SEGMENT_IDS


class Row(NamedTuple):
    """A pair, or a window that is one text.

    Attributes:
        sample: Which sample of the batch it belongs to.
        inputs_L: int64 [L], what the model sees.
        targets_L: int64 [L], what it should predict.
        weights_L: float32 [L], of each cross-entropy.
    """

    sample: int
    inputs_L: NDArray[np.int64]
    targets_L: NDArray[np.int64]
    weights_L: NDArray[np.float32]


class RowBatch(NamedTuple):
    """Rows of one forward pass, padded on the right.

    Attributes:
        samples_R: int64 [R].
        inputs_RL: int64 [R, L].
        attention_mask_RL: int64 [R, L], 1 real, 0 padding; None: there is no padding.
        targets_RL: int64 [R, L].
        weights_RL: float32 [R, L], 0 at padding.
    """

    samples_R: Tensor
    inputs_RL: Tensor
    attention_mask_RL: Tensor | None
    targets_RL: Tensor
    weights_RL: Tensor


def separate(batch: Batch) -> list[Row]:
    """Separates the pairs of each window.

    Args:
        batch: A micro batch of the trainer.

    Returns:
        A row for each pair of which something is learned.
    """
    rows = []
    for sample, weights_S in enumerate(batch.weights_BS):
        length = int(batch.lengths_B[sample])
        numbers_S = np.zeros(length, dtype=np.int32)
        if SEGMENT_IDS in batch.model_inputs:
            numbers_S = batch.model_inputs[SEGMENT_IDS][sample, :length]
        for number in np.unique(numbers_S[weights_S[:length] != 0]):
            places = np.flatnonzero(numbers_S == number)
            span = slice(places[0], places[-1] + 1)
            rows.append(
                Row(
                    sample,
                    batch.inputs_BS[sample, span],
                    batch.targets_BS[sample, span],
                    weights_S[span],
                )
            )
    return rows


def gather(rows: Sequence[Row], max_tokens: int, mask_token_id: int) -> Iterator[RowBatch]:
    """Gathers rows of similar length into passes.

    Args:
        rows: Any number.
        max_tokens: Most tokens of a pass, padding included; a longer row goes alone.
        mask_token_id: The mask token, which padding must not be.

    Yields:
        The passes, longest rows first: memory that is enough for the first is enough for all.
    """
    waiting = sorted(rows, key=lambda row: -len(row.inputs_L))
    while waiting:
        longest = len(waiting[0].inputs_L)
        count = max(1, max_tokens // longest)
        yield _pad(waiting[:count], longest, mask_token_id)
        waiting = waiting[count:]


def _pad(rows: Sequence[Row], longest: int, mask_token_id: int) -> RowBatch:
    size = (len(rows), longest)
    inputs_RL = np.full(size, 0 if mask_token_id else 1, dtype=np.int64)
    targets_RL = np.zeros(size, dtype=np.int64)
    weights_RL = np.zeros(size, dtype=np.float32)
    mask_RL = np.zeros(size, dtype=np.int64)
    for place, row in enumerate(rows):
        length = len(row.inputs_L)
        inputs_RL[place, :length] = row.inputs_L
        targets_RL[place, :length] = row.targets_L
        weights_RL[place, :length] = row.weights_L
        mask_RL[place, :length] = 1
    has_padding = not mask_RL.all()
    return RowBatch(
        torch.tensor([row.sample for row in rows]),
        torch.from_numpy(inputs_RL),
        torch.from_numpy(mask_RL) if has_padding else None,
        torch.from_numpy(targets_RL),
        torch.from_numpy(weights_RL),
    )
