from __future__ import annotations

import pytest
import torch

from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.accounting import count_parameters
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


@pytest.mark.slow
def test_a_preset_is_saved_by_one_process(tmp_path):
    found = measure_checkpoints(tmp_path, CheckpointSettings(preset="dc-7M", repeats=1))
    total = count_parameters(ModelConfig.model_validate({"preset": "dc-7M"})).padded_total
    (case,) = found.values()
    assert set(found) == {"dc-7M, 1 ranks"}
    assert 12 * total < case["num_bytes"] < 12.1 * total
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--preset=dc-8M is unknown"):
        measure_checkpoints(tmp_path, CheckpointSettings(preset="dc-8M"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device=cuda needs a GPU"):
            measure_checkpoints(tmp_path, CheckpointSettings(device="cuda"))
    with pytest.raises(ConfigError, match=r"The checkpoints need [\d,]+ bytes in"):
        # Some 5e13 parameters of 12 bytes each.
        measure_checkpoints(tmp_path, CheckpointSettings(), models={"vast": (10**5, 64 * 100)})
