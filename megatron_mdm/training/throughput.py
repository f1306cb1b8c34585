"""How fast a run goes, and what share of the machine that is."""

from __future__ import annotations

import time

import torch

from megatron_mdm.config import Config
from megatron_mdm.model.accounting import run_flops_per_token
from megatron_mdm.training.hooks import Hook, TrainingRun

# Dense bf16 peaks in TFLOP/s from the vendor's data sheets, by a part of the device's name; those
# of the forms NVL and PCIe have not been compared with one. The first that fits counts.
_GPU_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.0,
    "A100": 312.0,
}


class Throughput(Hook):
    """Turns steps and seconds into tokens per second and a share of peak.

    Args:
        config: The run.
        device: This rank's device.
        dtype: Dtype of forward and backward.
        world_size: Ranks in all.
        head_share: Share of positions whose logits are computed.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        world_size: int,
        head_share: float,
    ) -> None:
        self._tokens_per_step = config.batch.global_batch_size * config.data.seq_length
        self._flops_per_token = run_flops_per_token(config, head_share)
        configured = config.reporting.peak_tflops
        stated = configured * 1e12 if configured else find_peak_flops(device, dtype)
        peak = stated or measure_matmul_flops(device, dtype)
        self.peak_flops = peak * world_size
        self._num_steps = 0
        self._paused_seconds = 0.0
        self._since = time.perf_counter()

    def after_step(self, run: TrainingRun) -> None:
        """Measures the steps since the last that was logged, without what the run was paused."""
        self._num_steps += 1
        if not run.is_logged:
            return
        # A device may be behind: what is logged anyway waits for it.
        run.mean_loss()
        now = time.perf_counter()
        paused_seconds = run.paused_seconds - self._paused_seconds
        seconds = (now - self._since - paused_seconds) / self._num_steps
        self._since, self._paused_seconds, self._num_steps = now, run.paused_seconds, 0
        tokens_per_second = self._tokens_per_step / seconds
        flops = tokens_per_second * self._flops_per_token
        run.metrics |= {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens_per_second,
            "perf/model_flops_per_second": flops,
            "perf/mfu": flops / self.peak_flops,
        }


def find_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Looks up the dense bf16 peak of a GPU's data sheet.

    Returns:
        FLOP/s; None for another dtype, a CPU and a GPU that is not known.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in _GPU_PEAK_TFLOPS.items() if part in name), None)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the rate of large matrix products, the best of a few, of random numbers.

    Returns:
        FLOP/s.
    """
    # A GPU does several in a row: the host's time for one, and for waiting, is no part of it.
    size, products = (1024, 1) if device.type == "cpu" else (8192, 5)
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best
