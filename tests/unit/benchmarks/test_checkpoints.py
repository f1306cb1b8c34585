from __future__ import annotations

from megatron_mdm.studies.benchmarks import checkpoints


def test_each_case_is_saved_checked_and_loaded(tmp_path):
    found = checkpoints.measure_checkpoints(tmp_path, repeats=1, models={"tiny": (2, 128)})
    assert set(found) == {"tiny, 1 ranks", "tiny, 2 ranks"}
    for case in found.values():
        # Two layers of 128, and embedding and head of 8,192 tokens and the mask token.
        assert case["num_bytes"] > 12 * 2 * 8192 * 128
        assert all(stall["median"] > 0 for stall in case["stall_seconds"].values())
        assert all(rate["median"] > 0 for rate in case["megabytes_per_second"].values())
    assert not list(tmp_path.iterdir())
