"""How fast a run goes, and what share of the machine that is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from megatron_mdm.config import Config
from megatron_mdm.diffusion.objectives import objective_of
from megatron_mdm.model.accounting import training_flops_per_token

# Dense bf16 peaks in TFLOP/s from the vendor's data sheets, by a part of the device's name.
_GPU_PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "V100": 125.0}


class Throughput:
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
        self._flops_per_token = training_flops_per_token(
            config.model,
            config.data.seq_length,
            causal=objective_of(config).attention.is_causal,
            head_share=head_share,
        )
        configured = config.reporting.peak_tflops
        peak = configured * 1e12 if configured else device_peak_flops(device, dtype)
        self.peak_flops = peak * world_size
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Starts the first measurement now."""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves the time of the block, such as a validation, out of the measurement."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def measure(self, num_steps: int) -> dict[str, float]:
        """Rates over the steps since the last call.

        Args:
            num_steps: Optimizer steps since then.

        Returns:
            Metrics under `perf/`.
        """
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / num_steps, now
        tokens_per_second = self._tokens_per_step / seconds
        flops = tokens_per_second * self._flops_per_token
        return {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens_per_second,
            "perf/model_flops_per_second": flops,
            "perf/mfu": flops / self.peak_flops,
        }


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak of a device: a known GPU's data sheet, otherwise the best of a few large matmuls.

    Args:
        device: This rank's device.
        dtype: Dtype of forward and backward.

    Returns:
        FLOP/s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in _GPU_PEAK_TFLOPS.items():
            if part in name and dtype == torch.bfloat16:
                return tflops * 1e12
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
