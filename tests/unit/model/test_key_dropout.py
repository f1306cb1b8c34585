"""Dropped keys: causal, never the token itself, at the stated rate, independent."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from megatron_mdm.model.attention_mask import attention_mask
from megatron_mdm.model.key_dropout import DroppedKeys

SIZE = 256
SEEDS = [0, 1, 2**31 - 1]
RATES = [0.1, 0.5, 0.9]


def seen_of(seeds: list[int], rates: list[float], documents_BS: torch.Tensor | None = None):
    mask = attention_mask(
        len(seeds),
        SIZE,
        None,
        documents_BS,
        causal=True,
        block_sparse=False,
        key_dropout=DroppedKeys.of(torch.tensor(seeds), torch.tensor(rates)),
    )
    assert mask.shape == (len(seeds), 1, SIZE, SIZE)
    return mask[:, 0].numpy()


def test_a_token_sees_itself_nothing_later_and_the_stated_share_before():
    seen_BSS = seen_of(SEEDS, RATES)
    earlier = np.tri(SIZE, k=-1, dtype=bool)
    for seen_SS, rate in zip(seen_BSS, RATES, strict=True):
        assert np.diagonal(seen_SS).all()
        assert not seen_SS[~np.tri(SIZE, dtype=bool)].any()
        count = earlier.sum()
        error = (rate * (1 - rate) / count) ** 0.5
        assert abs(1 - seen_SS[earlier].mean() - rate) < 4 * error


def test_rates_of_nothing_and_everything_are_exact():
    none, all_of_them = seen_of([5, 5], [0.0, 1.0])
    np.testing.assert_array_equal(none, np.tri(SIZE, dtype=bool))
    np.testing.assert_array_equal(all_of_them, np.eye(SIZE, dtype=bool))


def test_neighbouring_places_and_seeds_are_independent():
    """Correlations of what is dropped with itself, moved or of another seed, are noise."""
    dropped_BSS = 1.0 - seen_of([7, 8], [0.5, 0.5]) * 2.0 + 1.0
    base_SS = dropped_BSS[0, 128:, :64] - 1.0
    moved = [
        dropped_BSS[0, 128 - rows : SIZE - rows, columns : 64 + columns] - 1.0
        for rows, columns in itertools.product(range(3), repeat=2)
        if rows or columns
    ]
    moved.append(dropped_BSS[1, 128:, :64] - 1.0)
    for other_SS in moved:
        assert abs((base_SS * other_SS).mean()) < 4 / base_SS.size**0.5


def test_documents_bound_what_is_left():
    documents_BS = (torch.arange(SIZE) // 100).int().repeat(1, 1)
    within = seen_of([3], [0.3], documents_BS)[0]
    whole = seen_of([3], [0.3])[0]
    same = documents_BS[0, :, None] == documents_BS[0]
    np.testing.assert_array_equal(within, whole & same.numpy())
