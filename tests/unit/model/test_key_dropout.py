"""Dropped keys: causal, never the token itself, at the stated rates, independent."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import attention_examples
import numpy as np
import pytest
import torch
from attention_examples import Dropping
from megatron.core.transformer.enums import AttnMaskType
from scipy.stats import kstest
from tiny_objectives import build_objective
from torch.nn.attention.flex_attention import create_mask

from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.key_dropout import DroppedKeys
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.model.attention import AttentionInputs, ScaledDotProductCoreAttention
from megatron_mdm.model.elementwise import Rotation

SIZE = 256
SEEDS = [0, 1, 2**31 - 1]
RATES = [0.1, 0.5, 0.9]
# Standard deviation of U(0.001, 1).
SPREAD = 0.999 / math.sqrt(12)


def mask_of(dropout: DroppedKeys, size: int = SIZE, documents_BS: torch.Tensor | None = None):
    mask = attention_examples.mask_of(
        Dropping(dropout), len(dropout.seeds_B), size, None, documents_BS
    )
    assert mask.shape == (len(dropout.seeds_B), 1, size, size)
    return mask[:, 0].numpy()


def seen_of(seeds: list[int], rates: list[float], documents_BS: torch.Tensor | None = None):
    dropout = DroppedKeys.from_chances(torch.tensor(seeds), torch.tensor(rates))
    return mask_of(dropout, documents_BS=documents_BS)


def trained_dropout(positions: range, size: int, **settings) -> DroppedKeys:
    """What the model makes of the samples of a run."""
    objective = build_objective(
        kind="ar",
        key_dropout=True,
        **settings,
        seed=3,
        global_batch_size=8,
        mask_token_id=size,
    )
    window = TextWindow(np.arange(size))
    batch = Batch.stack([objective.sample(window, position) for position in positions])
    rates_B3 = torch.from_numpy(batch.model_inputs["dropped_keys_rates"])
    seeds_B = torch.from_numpy(batch.model_inputs["dropped_keys_seed"])
    return DroppedKeys.from_chances(seeds_B, *rates_B3.unbind(1))


def dropped_shares(positions: range, size: int, **settings) -> np.ndarray:
    """Share of the earlier keys that each query loses, [B, size - 1], without the first query."""
    before_S = np.arange(1, size)
    found = []
    for position in positions:
        dropout = trained_dropout(range(position, position + 1), size, **settings)
        found.append(1 - (mask_of(dropout, size)[0].sum(1)[1:] - 1) / before_S)
    return np.stack(found)


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


def test_every_query_has_a_rate_of_its_own():
    """The published ablation at its length: all rates within a sample, samples alike."""
    shares_BS = dropped_shares(range(12), 2048)
    # From query 128 on a share is within 0.045 of its rate, which widens 0.288 by 0.0017 at most.
    assert np.allclose(shares_BS[:, 128:].std(axis=1), SPREAD, atol=0.02)
    means_B = shares_BS[:, 128:].mean(axis=1)
    assert means_B.std(ddof=1) < 0.02
    # Twelve samples know it to a fifth.
    assert means_B.std(ddof=1) == pytest.approx(SPREAD / math.sqrt(1919), rel=0.7)
    assert abs(means_B.mean() - 0.5005) < 4 * SPREAD / math.sqrt(12 * 1919)
    # A pooled share of many keys is uniform, as the rates are.
    assert kstest(shares_BS[:, 1024:].ravel()[::4], "uniform").pvalue > 1e-4


def test_with_a_rate_per_sample_the_spread_lies_between_samples():
    shares_BS = dropped_shares(range(60), 512, key_dropout_rate_per="sample")
    assert (shares_BS[:, 128:].std(axis=1) < 0.05).all()
    # 60 samples know the spread of a uniform distribution to 6%.
    assert shares_BS.mean(axis=1).std(ddof=1) == pytest.approx(SPREAD, rel=0.24)


def test_a_share_of_the_queries_loses_keys_and_the_others_none():
    shares_BS = dropped_shares(range(12), 1024, key_dropout_ratio=0.3)[:, 256:]
    # A chosen query whose rate is tiny may lose none either: about 1 / 640 of them.
    chosen_BS = shares_BS > 0
    error = math.sqrt(0.3 * 0.7 / chosen_BS.size)
    assert abs(chosen_BS.mean() - 0.3 * (1 - 1 / 640)) < 4 * error
    assert shares_BS[chosen_BS].std() == pytest.approx(SPREAD, rel=0.05)
    assert abs(shares_BS[chosen_BS].mean() - 0.5) < 4 * SPREAD / math.sqrt(chosen_BS.sum())


def test_a_share_of_the_samples_loses_keys_and_the_others_none():
    shares_BS = dropped_shares(range(200), 64, key_dropout_rate_per="sample", key_dropout_ratio=0.3)
    chosen_B = shares_BS.any(axis=1)
    assert abs(chosen_B.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 200)


def test_rates_and_choices_of_neighbouring_queries_are_independent():
    shares_BS = dropped_shares(range(8), 1024)[:, 256:] - 0.5
    # Correlations of so many pairs; a share is nearly its rate.
    for distance in (1, 2, 3):
        product_BS = shares_BS[:, distance:] * shares_BS[:, :-distance]
        assert abs(product_BS.mean()) < 4 * SPREAD**2 / math.sqrt(product_BS.size)
    chosen_BS = dropped_shares(range(8), 1024, key_dropout_ratio=0.5)[:, 256:] > 0
    signs_BS = np.where(chosen_BS, 1.0, -1.0)
    assert abs((signs_BS[:, 1:] * signs_BS[:, :-1]).mean()) < 4 / math.sqrt(signs_BS.size)


def test_given_its_rate_a_query_loses_keys_independently():
    """The variance over queries of what the second half of keys loses, given the first half."""
    seen_SS = mask_of(trained_dropout(range(1), 4096), 4096)[0]
    lost_2Q = 1.0 - np.stack([seen_SS[3072:, :1024], seen_SS[3072:, 1024:2048]]).mean(axis=2)
    # Both halves share the rate; their difference has the binomial variance 2 E[p (1 - p)] / 1024.
    variance = (lost_2Q[0] - lost_2Q[1]).var()
    assert variance == pytest.approx(2 * (1 / 6) / 1024, rel=4 * math.sqrt(2 / 1024))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"key_dropout_ratio": 0.5},
        {"key_dropout_rate_per": "sample", "key_dropout_ratio": 0.5},
    ],
)
@pytest.mark.parametrize("has_documents", [False, True])
def test_blocks_and_the_mask_that_is_written_out_drop_the_same_keys(settings, has_documents):
    dropout = trained_dropout(range(4), SIZE, **settings)
    documents_BS = (torch.arange(SIZE) // 100).int().repeat(4, 1) if has_documents else None
    masks = [
        attention_examples.mask_of(
            Dropping(dropout), 4, SIZE, None, documents_BS, block_sparse=sparse
        )
        for sparse in (True, False)
    ]
    assert torch.equal(create_mask(masks[0].mask_mod, 4, 1, SIZE, SIZE, "cpu"), masks[1])
    config = SimpleNamespace(attention_dropout=0.0, num_query_groups=2, num_attention_heads=4)
    core = ScaledDotProductCoreAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(SIZE, 4, heads, 8, generator=generator) for heads in (4, 2, 2)]
    rotation = Rotation.build(SIZE, 8, 10000.0, qkv[0].device)
    blocks, written = (core(*qkv, AttentionInputs(mask, rotation)) for mask in masks)
    torch.testing.assert_close(blocks, written, rtol=1e-5, atol=1e-6)
