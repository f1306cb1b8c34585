"""Memory of tensors that are alive on a rank while the product's own engine trains."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import torch
from cases import Overrides, batches_of, engine_of, stage_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mdm.model.attention import AttentionInputs


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, from their first to their end.

    Attributes:
        current: Bytes alive now.
        peak: Most bytes alive at once since `forget_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._follow(leaf.untyped_storage())
        return result

    def forget_peak(self) -> None:
        """Starts to look for a new peak."""
        self.peak = self.current

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages or not num_bytes:
            return

        def end(_: Any) -> None:
            del self._storages[key]
            self.current -= num_bytes

        self._storages[key] = weakref.ref(storage, end)
        self.current += num_bytes
        self.peak = max(self.peak, self.current)


def peak_bytes(overrides: Overrides, dtype: str = "fp32") -> int:
    """Trains four steps.

    Args:
        overrides: As for `config_of`.
        dtype: `fp32` or `bf16`.

    Returns:
        The most bytes alive in a step, of the second to fourth the least: at times a thread of gloo
        lets go of a buffer late.
    """
    peaks = []
    with (
        LiveBytes() as live,
        stage_of(overrides, dtype) as stage,
        engine_of(stage, dtype) as engine,
    ):
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(4):
            gc.collect()
            live.forget_peak()
            engine.train_step(step, batches.read_step(step), 1e-3)
            peaks.append(live.peak)
    return min(peaks[1:])


def bytes_kept_by_a_layer(overrides: Overrides, scales: list[float] | None = None) -> int:
    """Bytes that a layer keeps between its forward and its backward pass.

    Args:
        overrides: As for `config_of`.
        scales: Of all layers, for stochastic depth; None: the batch has none.

    Returns:
        Bytes that live because of the gradients: the layer's input and what it made of it.
    """
    with LiveBytes() as live, stage_of(overrides) as stage:
        model = stage.model.train()
        batch_size, size = stage.config.batch.micro_batch_size, stage.config.data.seq_length
        rotation = model.get_rotation(size, stage.mesh.device)
        scales_BL = None if scales is None else torch.tensor(scales).repeat(batch_size, 1)
        inputs = AttentionInputs(None, rotation, scales_BL)
        local = size // (stage.mesh.tp.size if model.config.sequence_parallel else 1)
        shape = (local, batch_size, model.config.hidden_size)
        # Weights are met here, and what Megatron gathers into and keeps for the next pass.
        model.decoder.layers[1](torch.randn(shape).requires_grad_(), inputs)
        # A thread of gloo lets go of the last message when it comes round to it.
        time.sleep(0.2)
        before = live.current
        hidden_SBH = torch.randn(shape).requires_grad_()
        output_SBH, _ = model.decoder.layers[1](hidden_SBH, inputs)
        assert output_SBH.requires_grad
        time.sleep(0.2)
        return live.current - before - output_SBH.untyped_storage().nbytes()
