"""What an engine's step asks of the device, sends to the output layer and adds up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import torch
from cases import Overrides, batches_of, engine_of, stage_of
from deepspeed.accelerator import get_accelerator
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode


class _Readings(TorchDispatchMode):
    """Counts the operations whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        # A number, or a shape that depends on numbers.
        if "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def readings_of_a_step(overrides: Overrides) -> dict[str, int]:
    """How often the host reads what a device computed.

    Args:
        overrides: As for `config_of`.

    Returns:
        Operations of the second step that wait for the device.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        mesh = stage.mesh
        batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
        engine.train_step(0, batches.read_step(0), 1e-3)
        with _Readings() as readings:
            engine.train_step(1, batches.read_step(1), 1e-3)
        return dict(readings.counts)


def waits_of_steps(overrides: Overrides, num_steps: int) -> int:
    """How often DeepSpeed lets the host wait until the device has nothing left to do.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps, each of four micro batches, with an evaluation after the last.

    Returns:
        Its calls, which do nothing on a CPU.
    """
    accelerator, waits = get_accelerator(), []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        batches = batches_of(stage.config, 0, 1)
        accelerator.synchronize = lambda *_: waits.append(1)
        try:
            for step in range(num_steps):
                engine.train_step(step, batches.read_step(step), 1e-3)
            engine.evaluate(batches.read_step(0)[0])
        finally:
            del accelerator.synchronize
    return len(waits)


def positions_of_batches(
    overrides: Overrides, num_steps: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The positions whose logits each micro batch asks for.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps; the last one predicts nothing.

    Returns:
        Weights [B, S] and positions [M] as the model gets them.
    """
    seen: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []

    def record(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["weights_BS"].numpy().copy(), kwargs["positions_M"].numpy().copy()))

    with stage_of(overrides) as stage, engine_of(stage) as engine:
        stage.model.register_forward_pre_hook(record, with_kwargs=True)
        batches = batches_of(stage.config, 0, 1)
        for step in range(num_steps):
            micro_batches = batches.read_step(step)
            if step == num_steps - 1:
                micro_batches = [
                    dataclasses.replace(batch, weights_BS=np.zeros_like(batch.weights_BS))
                    for batch in micro_batches
                ]
            engine.train_step(step, micro_batches, 0.0)
    return seen


def summed_gradients(overrides: Overrides) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Gradients of a bf16 step before they are reduced over replicas.

    Args:
        overrides: As for `config_of`.

    Returns:
        For each parameter the sum over micro batches in float64, and what the engine reduces.
    """
    with stage_of(overrides, "bf16") as stage:
        sums: dict[torch.nn.Parameter, torch.Tensor] = {}

        def add(parameter: torch.Tensor) -> None:
            known = sums.get(parameter, torch.zeros((), dtype=torch.float64))
            sums[parameter] = known + parameter.grad.double()

        for parameter in stage.model.parameters():
            parameter.register_post_accumulate_grad_hook(add)
        with engine_of(stage, "bf16") as engine:
            found = []
            reduce_tied_gradient = engine._reduce_tied_gradient

            def record() -> None:
                found.extend((sums[p].numpy(), p.grad.double().numpy()) for p in sums)
                reduce_tied_gradient()

            engine._reduce_tied_gradient = record
            batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
            engine.train_step(0, batches.read_step(0), 1e-3)
        return found
