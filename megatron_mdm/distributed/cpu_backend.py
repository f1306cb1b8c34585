"""Everything that lets Megatron-Core run on a CPU, in one place.

Megatron-Core names CUDA in a few spots. Without a GPU those are redirected: the current device is
the CPU, `device="cuda"` means the CPU, and the CUDA generator is the CPU generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """Within this context `device="cuda"` and `Tensor.cuda()` mean the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function with CUDA devices replaced."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return func(*args, **kwargs)


def redirect_megatron_to_cpu() -> None:
    """Redirects Megatron-Core's CUDA calls to the CPU for the rest of the process. Idempotent."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state


def seed_cpu_generators(default_seed: int, tensor_parallel_seed: int) -> None:
    """Does on the CPU what `model_parallel_cuda_manual_seed` does on a GPU.

    Args:
        default_seed: Seed of the generator that tensor-parallel peers share.
        tensor_parallel_seed: Seed of the generator that differs between them.
    """
    torch.manual_seed(default_seed)
    tracker = megatron_random.get_cuda_rng_tracker()
    state = torch.Generator().manual_seed(tensor_parallel_seed).get_state()
    tracker.set_states({megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME: state})


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)
