from __future__ import annotations

import pytest

from megatron_mdm.studies.benchmarks.checkpoints import measure_checkpoints
from megatron_mdm.studies.benchmarks.settings import CheckpointSettings


@pytest.mark.slow
def test_each_case_is_saved_checked_and_loaded(tmp_path):
    settings = CheckpointSettings(repeats=1)
    found = measure_checkpoints(tmp_path, settings, models={"tiny": (2, 128)})
    assert set(found) == {"tiny, 1 ranks", "tiny, 2 ranks"}
    for case in found.values():
        # Two layers of 128, and embedding and head of 8,192 tokens and the mask token.
        assert case["num_bytes"] > 12 * 2 * 8192 * 128
        assert set(case["stall_seconds"]) == {"foreground", "background"}
        rates = ["background_save", "foreground_save", "load", "verify"]
        assert sorted(case["megabytes_per_second"]) == rates
    assert not list(tmp_path.iterdir())
