"""The benchmark of scoring: both ways come to the same numbers, and every case is timed."""

from __future__ import annotations

import pytest

from megatron_mdm.benchmarks.scoring import ScoreSettings, measure_scoring
from megatron_mdm.errors import ConfigError


def test_both_ways_come_to_the_same_numbers():
    settings = ScoreSettings(
        num_requests=6, context_tokens=8, continuation_tokens=4, draws=16, repeats=1
    )
    found = measure_scoring(None, settings)
    for name in ("fixed_count", "monte_carlo", "chain_rule", "autoregressive"):
        assert found[name]["most_different_nats"] < 1e-3
        assert found[name]["ours_over_public"]["median"] > 0
    errors = found["draws_for_the_same_error"]
    assert errors["num_requests"] == 2
    assert errors["fixed_count"] == 1
    assert errors["monte_carlo_independent_t"] > 1


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="--draws=1 has to be at least 2"):
        measure_scoring(None, ScoreSettings(draws=1))
