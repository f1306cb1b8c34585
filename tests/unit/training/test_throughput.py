from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mdm.config import parse_config
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.accounting import training_flops_per_token
from megatron_mdm.training import throughput
from megatron_mdm.training.throughput import Throughput, find_peak_flops


def test_rates_count_steps_but_not_the_time_left_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "smdm-6M"},
            "data": {"train": [{"path": "unused"}], "seq_length": 128},
            "batch": {"global_batch_size": 4},
            "schedule": {"steps": 10},
            "reporting": {"peak_tflops": 2.0},
        }
    )
    share = build_objective(config).predicted_share(128)
    meter = Throughput(config, torch.device("cpu"), torch.float32, world_size=3, head_share=share)
    run = SimpleNamespace(is_logged=False, paused_seconds=0.0, metrics={}, mean_loss=lambda: 1.0)
    for _ in range(4):
        meter.after_step(run)
    now[0] += 60.0
    run.paused_seconds += 50.0  # a validation between two logged steps
    run.is_logged = True
    meter.after_step(run)
    rates = run.metrics
    tokens_per_second = 5 * 4 * 128 / 10
    flops = training_flops_per_token(config.model, 128, causal=False, head_share=share)
    assert rates["perf/step_seconds"] == 2.0
    assert rates["perf/tokens_per_second"] == tokens_per_second
    assert rates["perf/model_flops_per_second"] == tokens_per_second * flops
    assert rates["perf/mfu"] == tokens_per_second * flops / (3 * 2e12)
    now[0] += 1.0
    meter.after_step(run)
    assert run.metrics["perf/step_seconds"] == 1.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GB200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_form(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak_flops(torch.device("cuda", 0), torch.bfloat16) == tflops * 1e12
