"""The tensor files that one rank writes: of bounded size, and read back before they count."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.checkpoint.storage import MOMENTS, WEIGHT, FileRecord, record_file

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.model.parameters import NamedShard
    from megatron_mdm.parallel.topology import Topology

# Memory while saving and reshaping is bounded by one file of weights and one of moments.
MAX_FILE_BYTES = 2**30


class SavedTensor(NamedTuple):
    """A tensor on its way into a file.

    Attributes:
        kind: `weight`, `exp_avg` or `exp_avg_sq`.
        name: Global parameter name.
        value: A rank's part of it, on any device.
    """

    kind: str
    name: str
    value: Tensor


class RankFiles:
    """Writes tensors into files that are begun anew when they are full.

    Args:
        folder: Where to write.
        tensor_rank: Place in the tensor-parallel group, which the files state.
        pipeline_rank: Pipeline stage.
        data_rank: Replica.
        max_file_bytes: A file holds at most so many bytes of tensors, or one larger tensor.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensor_rank: int,
        pipeline_rank: int,
        data_rank: int,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._place = f"tp{tensor_rank}-pp{pipeline_rank}-dp{data_rank}"
        # One entry: safetensors orders several at random, and equal contents should be equal files.
        self._metadata = {"tensor_rank": str(tensor_rank)}
        self._max_file_bytes = max_file_bytes
        self._records: dict[str, FileRecord] = {}
        self._pending: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
        self._num_files = dict.fromkeys(self._pending, 0)

    def write(self, tensors: Iterable[SavedTensor]) -> dict[str, FileRecord]:
        """Writes all tensors.

        Args:
            tensors: In any order; each is kept until its file is written.

        Returns:
            The files, after reading them back.

        Raises:
            OSError: A file cannot be written, or reads back as something else.
            SafetensorError: Likewise.
        """
        for kind, name, value in tensors:
            group = "weights" if kind == WEIGHT else "optimizer"
            pending = self._pending[group]
            if pending and _num_bytes([*pending.values(), value]) > self._max_file_bytes:
                self._flush(group)
            value = value.to("cpu", torch.float32).contiguous()
            if value.untyped_storage().nbytes() != _num_bytes([value]):
                # safetensors refuses several views of the same memory.
                value = value.clone()
            self._pending[group][f"{kind}/{name}"] = value
        for group in self._pending:
            self._flush(group)
        return self._records

    def _flush(self, group: str) -> None:
        tensors, self._pending[group] = self._pending[group], {}
        if tensors:
            path = self._folder / f"{group}-{self._place}-{self._num_files[group]}.safetensors"
            self._num_files[group] += 1
            save_file(tensors, path, self._metadata)
            self._records[path.name] = _read_back(path, tensors)


class HostCopies:
    """A copy of a rank's tensors in CPU memory, which training does not change.

    Args:
        device: Where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # Page-locked memory is slow to get, so it is kept for the next save.
        self._copies: dict[tuple[str, str], Tensor] = {}

    def take(self, tensors: Iterable[SavedTensor]) -> list[SavedTensor]:
        """Copies tensors, over those of the call before.

        Args:
            tensors: The same names with every call.

        Returns:
            float32 on the CPU.
        """
        result = []
        for kind, name, value in tensors:
            copy = self._copies.get((kind, name))
            if copy is None:
                copy = self._copies[kind, name] = self._allocate(value.shape)
            copy.copy_(value, non_blocking=self._on_gpu)
            result.append(SavedTensor(kind, name, copy))
        if self._on_gpu:
            torch.cuda.synchronize()
        return result

    def _allocate(self, shape: torch.Size) -> Tensor:
        if self._on_gpu:
            # The system may allow little page-locked memory; without it the copy is only slower.
            with contextlib.suppress(RuntimeError):
                return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        return torch.empty(shape, dtype=torch.float32)


def owned_tensors(
    shards: Sequence[NamedShard], states: OptimizerStates, topology: Topology
) -> Iterator[SavedTensor]:
    """The tensors that this rank writes. All ranks have to exhaust it: ZeRO gathers.

    Args:
        shards: This rank's parameters.
        states: Their optimizer state.
        topology: This rank's place.

    Yields:
        Its share, on its device; without ZeRO the state itself.
    """
    for index, shard in enumerate(shards):
        mine = is_owned(index, shard, topology)
        for kind in (WEIGHT, *MOMENTS):
            value = states.get(shard.parameter, kind)
            if mine:
                yield SavedTensor(kind, shard.name, value)


def is_owned(index: int, shard: NamedShard, topology: Topology) -> bool:
    """Does this rank write a parameter? Replicas share the writing: each takes every R-th.

    Args:
        index: Place in the list of this rank's parameters.
        shard: The parameter.
        topology: This rank's place.
    """
    mine = index % topology.data_size == topology.data_rank
    return mine and not shard.is_copy and (shard.is_split or topology.tensor_rank == 0)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(4 * tensor.numel() for tensor in tensors)


def _read_back(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # What the page cache would give back is not what the disk holds.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with safe_open(path, framework="pt") as handle:
        for key, value in tensors.items():
            # As bits: NaN differs from itself, and 0 equals -0.
            if not torch.equal(handle.get_tensor(key).view(torch.int32), value.view(torch.int32)):
                raise OSError(5, f"{path.name} reads back other values of {key} than were written")
    return record_file(path)
