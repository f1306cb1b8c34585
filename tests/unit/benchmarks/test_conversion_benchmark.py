from __future__ import annotations

from collections import namedtuple

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.benchmarks import conversion
from megatron_mdm.studies.benchmarks.settings import ConversionSettings


@pytest.mark.slow
def test_import_and_export_are_timed_beside_a_copy_and_keep_to_the_memory(tmp_path):
    found = conversion.measure_conversion(tmp_path, ConversionSettings(preset="smdm-6M", repeats=1))
    assert not list(tmp_path.iterdir())
    assert set(found["cases"]) == {"copy", "from-smdm", "to-hf"}
    # 6 layers of width 256 with heads of their own, and 32,000 tokens and the mask token.
    layer = 4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256
    assert found["source_bytes"] == 4 * (6 * layer + 64_001 * 256 + 256)
    assert found["largest_tensor_bytes"] == 4 * 32_128 * 256
    for name, case in found["cases"].items():
        assert case["within_goal"]
        if name != "copy":
            # The file is twice as large, so holding it would show.
            above = case["peak_above_baseline_bytes"]["median"]
            assert above < found["source_bytes"]


def test_a_disk_without_room_and_a_foreign_preset_are_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage(10**6))
    for preset, repeats, told in (
        ("smdm-6M", 1, r"--preset=smdm-6M needs 3\d\d,.* which has 1,000,000"),
        ("dc-7M", 1, "--preset=dc-7M is not of the family smdm: use smdm-6M"),
        ("smdm-6M", 0, "--repeats=0"),
    ):
        with pytest.raises(ConfigError, match=told):
            conversion.measure_conversion(
                tmp_path, ConversionSettings(preset=preset, repeats=repeats)
            )
    assert not list(tmp_path.iterdir())
