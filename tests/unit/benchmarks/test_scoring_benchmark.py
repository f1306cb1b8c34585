"""The benchmark of scoring: both ways come to the same numbers, and every case is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.benchmarks.scoring import _describe, _Run, measure_scoring
from megatron_mdm.studies.benchmarks.settings import ScoreSettings


@pytest.mark.slow
def test_both_ways_come_to_the_same_numbers():
    settings = ScoreSettings(
        num_questions=1, draws=16, repeats=1, tasks=("openbookqa", "piqa", "boolq")
    )
    found = measure_scoring(settings)
    assert found is not None
    for kind in ("fixed_count", "monte_carlo", "chain_rule"):
        for case in (found[kind], found[kind + "_guided"]):
            assert case["most_different_nats"] < 1e-3
            assert set(case["tasks"]) == {"openbookqa", "piqa", "boolq"}
            # The last block and the output layer are run at fewer positions.
            assert case["public_flops_over_ours"] > 1
    # The context of both answers is run once.
    assert found["autoregressive"]["tasks"]["boolq"]["public_flops_over_ours"] > 2
    assert found["autoregressive"]["most_different_nats"] < 1e-3
    errors = found["draws_for_the_same_error"]
    assert errors["num_requests"] == 2
    assert errors["fixed_count"] == 1
    assert errors["monte_carlo_independent_t"] > 1


@pytest.mark.slow
def test_processes_share_the_requests_and_one_reports():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/benchmark.py", "score", "--tasks", "openbookqa", "--num-questions", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--draws", "8", "--repeats", "1"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    report = json.loads(done.stdout)
    assert report["settings"]["num_processes"] == 2
    for name in ("monte_carlo_guided", "autoregressive"):
        assert report["results"][name]["most_different_nats"] < 1e-3


def test_draws_that_hide_nothing_have_no_ratio_of_operations():
    run = _Run(0.5, [0.0])
    found = _describe([(run, run)], num_requests=1, flops=(0, 0))
    assert found["public_flops_over_ours"] is None
    assert found["ours_over_public"]["median"] == 1


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="--draws=1 has to be at least 2"):
        measure_scoring(ScoreSettings(draws=1))
