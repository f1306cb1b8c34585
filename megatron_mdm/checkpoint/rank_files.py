"""The tensor files that one rank writes: of bounded size, and read back before they count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import WEIGHT, FileRecord, is_hook_kind
from megatron_mdm.checkpoint.streaming import TensorFile, TensorInfo

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.distributed.mesh import Mesh
    from megatron_mdm.model.shards import NamedShard

# Files of this size are checked and copied side by side.
MAX_FILE_BYTES = 2**30


class PlannedTensor(NamedTuple):
    """What is known of a tensor before it is written.

    Attributes:
        kind: `weight`, or a state of the optimizer or of a hook.
        name: Global parameter name.
        shape: Shape of a rank's part of it.
    """

    kind: str
    name: str
    shape: tuple[int, ...]


class SavedTensor(NamedTuple):
    """A tensor on its way into a file.

    Attributes:
        kind: `weight`, or a state of the optimizer or of a hook.
        name: Global parameter name.
        value: A rank's part of it, on any device.
    """

    kind: str
    name: str
    value: Tensor


class RankFiles:
    """Writes tensors, as they come, into files of bounded size.

    Weights, optimizer states and those of hooks go into files of their own. Memory holds one
    tensor.

    Args:
        folder: Where to write.
        planned: What will come; weights in this order, and so the states of each sort.
        tensor_rank: Place in the tensor-parallel group, which the files state.
        pipeline_rank: Pipeline stage.
        data_rank: Replica.
        max_file_bytes: A file holds at most so many bytes of tensors, or one larger tensor.
    """

    def __init__(
        self,
        folder: Path,
        planned: Iterable[PlannedTensor],
        *,
        tensor_rank: int,
        pipeline_rank: int,
        data_rank: int,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._place = f"tp{tensor_rank}-pp{pipeline_rank}-dp{data_rank}"
        self._metadata = {"tensor_rank": str(tensor_rank)}
        self._records: dict[str, FileRecord] = {}
        self._waiting = _divide(planned, max_file_bytes)
        self._num_files = dict.fromkeys(self._waiting, 0)
        self._open: dict[str, TensorFile] = {}

    def write(self, tensors: Iterable[SavedTensor]) -> dict[str, FileRecord]:
        """Writes all tensors.

        Returns:
            The files, after reading them back.

        Raises:
            OSError: A file cannot be written, or reads back as something else.
        """
        try:
            for tensor in tensors:
                self.put(tensor)
            return self.finish()
        finally:
            self.close()

    def put(self, tensor: SavedTensor) -> None:
        """Writes one tensor.

        Args:
            tensor: The next of its group that was planned.

        Raises:
            OSError: A file cannot be written, or reads back as something else.
        """
        kind, name, value = tensor
        group = _choose_group(kind)
        if group not in self._open:
            infos = self._waiting[group].pop(0)
            self._open[group] = TensorFile(self._name_file(group), infos, self._metadata)
        file = self._open[group]
        file.write(f"{kind}/{name}", value.to("cpu", torch.float32))
        if file.is_full:
            file.finish()
            self._records[self._name_file(group).name] = file.record()
            self._num_files[group] += 1
            del self._open[group]

    def finish(self) -> dict[str, FileRecord]:
        """Ends the writing.

        Returns:
            Sizes and digests of the files, after reading them back.

        Raises:
            ValueError: Something that was planned has not come.
        """
        if self._open or any(self._waiting.values()):
            raise ValueError(f"{self._folder} lacks tensors that were planned.")
        return self._records

    def close(self) -> None:
        """Closes the files that are not whole."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _name_file(self, group: str) -> Path:
        return self._folder / f"{group}-{self._place}-{self._num_files[group]}.safetensors"


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


def list_owned(shards: Sequence[NamedShard], mesh: Mesh) -> list[NamedShard]:
    """Lists the parameters that this rank writes: of R replicas each writes every R-th."""
    return [
        shard
        for index, shard in enumerate(shards)
        if shard.is_own and index % mesh.dp.size == mesh.dp.rank
    ]


def read_owned(
    shards: Sequence[NamedShard], owned: Sequence[NamedShard], states: OptimizerStates
) -> Iterator[SavedTensor]:
    """Reads the tensors that this rank writes. All ranks have to exhaust it: ZeRO gathers.

    Args:
        shards: This rank's parameters.
        owned: Those among them that it writes.
        states: Their optimizer state.

    Yields:
        Its share, on its device; without ZeRO the state itself.
    """
    mine = {*map(id, owned)}
    for shard in shards:
        for kind in states.list_kinds(shard):
            value = states.get(shard.parameter, kind)
            if id(shard) in mine:
                yield SavedTensor(kind, shard.name, value)


def _choose_group(kind: str) -> str:
    if kind == WEIGHT:
        return "weights"
    return "hooks" if is_hook_kind(kind) else "optimizer"


def _divide(
    planned: Iterable[PlannedTensor], max_file_bytes: int
) -> dict[str, list[list[TensorInfo]]]:
    """The content of each file, by group."""
    files: dict[str, list[list[TensorInfo]]] = {"weights": [], "optimizer": [], "hooks": []}
    num_bytes = dict.fromkeys(files, 0)
    for kind, name, shape in planned:
        group = _choose_group(kind)
        info = TensorInfo(f"{kind}/{name}", torch.float32, shape)
        if not files[group] or num_bytes[group] + info.num_bytes > max_file_bytes:
            files[group].append([])
            num_bytes[group] = 0
        files[group][-1].append(info)
        num_bytes[group] += info.num_bytes
    return files
