"""Which blocks a sample passes by: at the stated rates, by seed, position and number alone."""

from __future__ import annotations

import numpy as np

from megatron_mdm.config import parse_config
from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.stochastic_depth import StochasticDepth, build_stochastic_depth

_TREE = {
    "run": {"dir": "unused", "seed": 3},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 61,
    },
    "data": {"train": [{"path": "unused"}], "seq_length": 16},
    "batch": {"global_batch_size": 8},
    "schedule": {"steps": 1},
}


def scales_of(num_positions: int, rate: float = 0.4, num_layers: int = 4, seed: int = 3):
    depth = StochasticDepth(CounterNoise(seed), rate, num_layers)
    return np.stack([depth(position)["block_scales"] for position in range(num_positions)])


def test_blocks_are_left_out_at_rates_that_rise_linearly_and_independently():
    scales_NL = scales_of(20_000)
    out_NL = scales_NL == 0
    rates_L = np.array([0.1, 0.2, 0.3, 0.4])
    deviations_L = np.sqrt(rates_L * (1 - rates_L) / len(out_NL))
    assert (np.abs(out_NL.mean(axis=0) - rates_L) < 4 * deviations_L).all()
    assert (np.abs(scales_NL.mean(axis=0) - 1) < 4 * deviations_L / (1 - rates_L)).all()
    correlations = np.corrcoef(out_NL.T) - np.eye(4)
    assert np.abs(correlations).max() < 4 / np.sqrt(len(out_NL))
    # And from one position to the next.
    assert np.abs(np.corrcoef(out_NL[:-1, 3], out_NL[1:, 3])[0, 1]) < 4 / np.sqrt(len(out_NL))
    for block, rate in enumerate(rates_L):
        assert set(scales_NL[:, block].tolist()) == {0.0, float(np.float32(1 / (1 - rate)))}


def test_a_draw_depends_on_seed_position_and_number_alone():
    alone = StochasticDepth(CounterNoise(3), 0.4, 4)(49)["block_scales"]
    np.testing.assert_array_equal(alone, scales_of(50)[49])
    assert (scales_of(50, seed=4) != scales_of(50)).any()
    # Twice the layers at twice the rate have the first ones' rates.
    np.testing.assert_array_equal(scales_of(200, 0.8, 8)[:, :4], scales_of(200))
    # Blocks that a lower rate leaves out are left out by a higher one too.
    low, high = scales_of(200, 0.2), scales_of(200, 0.6)
    assert (high[low == 0] == 0).all()


def test_a_run_without_it_draws_nothing():
    assert build_stochastic_depth(parse_config(_TREE)) is None
    tree = _TREE | {"model": _TREE["model"] | {"stochastic_depth": 0.25}}
    depth = build_stochastic_depth(parse_config(tree))
    assert depth is not None
    np.testing.assert_allclose(depth.rates_L, [1 / 16, 1 / 8, 3 / 16, 1 / 4])
