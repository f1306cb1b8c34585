"""What a rank asks of its peers: collectives and messages in order, as PyTorch hands them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of a simulation. The second step is like all that follow; the first makes the optimizer's state.
NUM_STEPS = 2
# By the names that PyTorch gives its collectives once they reach a process group.
_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}


class Call(NamedTuple):
    """One collective of a rank, or one message.

    Attributes:
        operation: `all_reduce`, `all_gather`, `reduce_scatter`, ..., `send` or `receive`.
        ranks: Of the group, by their places in the world.
        communicator: Which of the groups of just these ranks, in the order in which they were made.
        peer: Place in the world of the other end of a message; None of a collective.
        elements: Of the whole tensor: what is reduced, gathered, scattered or sent; of an
            `all_to_all` what this rank sends, itself included.
        dtype: Of its elements, as in `float32`.
        moment: What the rank was at: `start`, or a step.
    """

    operation: str
    ranks: tuple[int, ...]
    communicator: int
    peer: int | None
    elements: int
    dtype: str
    moment: str

    @property
    def total_bytes(self) -> int:
        """Size of the whole tensor."""
        return self.elements * getattr(torch, self.dtype).itemsize if self.dtype else 0


class PlayedRank(NamedTuple):
    """What a rank did.

    Attributes:
        rank: Its place in the world.
        calls: Of its start and its steps, in order.
        memory: By moment, bytes by kind when their sum was greatest; see `MemoryLog`.
        num_positions: Predictions that the last step's losses asked for.
    """

    rank: int
    calls: list[Call]
    memory: dict[str, dict[str, int]]
    num_positions: int


class CallLog(TorchDispatchMode):
    """Writes down every call among at least two ranks, while it is entered.

    Attributes:
        calls: In the order in which the rank made them.
        moment: Said of the calls to come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.moment = "start"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._write(_OPERATIONS[name], args)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """Says what the rank is at."""
        before, self.moment = self.moment, moment
        try:
            yield
        finally:
            self.moment = before

    def _write(self, operation: str, args: Any) -> None:
        group = _process_group(args)
        if group.size() < 2:
            # DeepSpeed reduces gradients over the replicas even where there is only one.
            return
        ranks, communicator = _identify(group)
        # Of input and output the greater is whole; lists of tensors count as one.
        sizes = [
            (sum(leaf.numel() for leaf in leaves), str(leaves[0].dtype).removeprefix("torch."))
            for leaves in map(_tensors, args)
            if leaves
        ]
        elements, dtype = max(sizes) if operation != "barrier" and sizes else (0, "")
        if operation == "all_to_all":
            # Behind the output; ranks differ in it.
            elements, dtype = sizes[1]
        peer = None
        if operation in ("send", "receive"):
            peer = ranks[next(arg for arg in args if isinstance(arg, int))]
        self.calls.append(Call(operation, ranks, communicator, peer, elements, dtype, self.moment))


def _tensors(argument: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor)]


def _process_group(args: Any) -> Any:
    objects: list[Any] = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    (group,) = [one for one in objects if "ProcessGroup" in one._type().str()]
    return dist.ProcessGroup.unbox(group)


def _identify(group: Any) -> tuple[tuple[int, ...], int]:
    """The ranks of a group, and its place among this rank's groups of the same ranks."""
    ranks = tuple(dist.get_process_group_ranks(group))
    # PyTorch has no public list of them; it keeps the order in which they were made.
    known = dist.distributed_c10d._world.pg_map
    alike = [one for one in known if tuple(dist.get_process_group_ranks(one)) == ranks]
    return ranks, [one.group_name for one in alike].index(group.group_name)
