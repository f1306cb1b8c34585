"""Counts the real collectives of a training step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from cases import Overrides, batches_of, engine_of, stage_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OPERATIONS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::send": "send",
}


class Collectives(TorchDispatchMode):
    """Sums up the whole tensors that collectives work on, by operation.

    Attributes:
        total_bytes: Reduced, gathered, scattered or sent among at least two ranks; without
            scalars, which are norms and checks for overflow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = _OPERATIONS.get(func._schema.name)
        if operation is not None and _group_size(args) > 1:
            # Of input and output the greater is whole.
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            if whole.numel() > 1:
                self.total_bytes[operation] += whole.nbytes
        return func(*args, **(kwargs or {}))


def _group_size(args: Any) -> int:
    # DeepSpeed reduces gradients over the replicas even where there is only one.
    objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    (group,) = [one for one in objects if "ProcessGroup" in one._type().str()]
    return dist.ProcessGroup.unbox(group).size()


def count(overrides: Overrides, dtype: str = "fp32") -> tuple[dict[str, int], int]:
    """Trains two steps.

    Args:
        overrides: As for `config_of`.
        dtype: `fp32` or `bf16`.

    Returns:
        Bytes of the second step by operation, and the positions that its losses ask for.
    """
    with stage_of(overrides, dtype) as stage, engine_of(stage, dtype) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        engine.train_step(0, batches.read_step(0), 1e-3)
        with Collectives() as collectives:
            engine.train_step(1, batches.read_step(1), 1e-3)
        positions = sum(int((batch.weights_BS != 0).sum()) for batch in batches.read_step(1))
        return dict(collectives.total_bytes), positions
