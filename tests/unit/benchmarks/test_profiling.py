from __future__ import annotations

from types import SimpleNamespace

from torch.autograd import DeviceType

from megatron_mdm.studies.benchmarks.profiling import describe_kernels


def event(name: str, start: float, end: float, **others):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        **({"device_type": DeviceType.CUDA, "is_user_annotation": False} | others),
    )


def test_kernels_are_ranked_and_gaps_are_what_no_kernel_covers():
    """Two steps of 100 microseconds each; kernels of two streams may run at the same time."""
    events = [
        event("step", 0, 200, is_user_annotation=True),
        event("aten::mm", 0, 200, device_type=DeviceType.CPU),
        event("gemm", 10, 50),
        event("copy", 40, 60),
        event("gemm", 100, 160),
        event("norm", 165, 170),
    ]
    found = describe_kernels(events, steps=2, seconds=200e-6)
    assert [row["name"] for row in found["kernels"]] == ["gemm", "copy", "norm"]
    gemm = found["kernels"][0]
    assert gemm == {
        "name": "gemm", "calls_per_step": 1.0, "milliseconds_per_step": 0.05, "share": 100 / 125
    }  # fmt: skip
    # 10 to 60, 100 to 160 and 165 to 170 are covered.
    assert abs(found["idle_share"] - (1 - 115 / 200)) < 1e-9
    assert found["largest_gaps_milliseconds"] == [0.04, 0.005, 0.0]


def test_a_cpu_has_no_kernels():
    assert describe_kernels([event("aten::mm", 0, 9, device_type=DeviceType.CPU)], 1, 1.0) == {}
