"""Checkpoints on disk: safetensors shards under global names, and a manifest in JSON.

A checkpoint folder appears whole, by one rename, or not at all. Nothing in it can run code. Tensors
carry global parameter names, so any layout reads what any other wrote. The manifest holds a sha256
of each file and of itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mdm.checkpoint.manifest import (
    MANIFEST,
    RAW,
    WEIGHT,
    FileRecord,
    find_weights_kind,
    read_manifest,
)
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.model.parameter import Parameter
from megatron_mdm.model.parameters import find_parameter
from megatron_mdm.model.sharding import Slices, find_local_shape

LATEST = "latest"


def record_file(path: Path) -> FileRecord:
    """Reads a file back and describes what is there."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(num_bytes=stream.tell(), sha256=digest)


def name_checkpoint(step: int) -> str:
    """Names the folder of the checkpoint after a number of steps."""
    return f"step_{step:08d}"


def find_latest_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint of a run.

    Returns:
        Its path, or None when the run has none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d+", name) or not (folder / name / MANIFEST).exists():
        whole = sorted(path.parent.name for path in folder.glob(f"step_*/{MANIFEST}"))
        remedy = f"write {whole[-1]} into it" if whole else "remove it to start anew"
        raise CheckpointError(
            f"{pointer} names {name!r}, which is not a whole checkpoint: {remedy}."
        )
    return folder / name


def resolve_checkpoint(path: Path) -> Path:
    """Resolves the checkpoint that a user names by its own folder or by one above it.

    Args:
        path: A `step_XXXXXXXX` folder, a `checkpoints` folder or a run's folder.

    Returns:
        The `step_XXXXXXXX` folder; of several, the one that `latest` names.

    Raises:
        CheckpointError: There is none.
    """
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if (found := find_latest_checkpoint(folder)) is not None:
            return found
    raise CheckpointError(
        f"{path} holds no checkpoint: give a folder step_XXXXXXXX, or that of a run that saved one."
    )


class _Part(NamedTuple):
    """What a tensor-parallel rank wrote of a tensor."""

    file: str
    dtype: str
    shape: list[int]


class CheckpointReader:
    """Reads tensors of a checkpoint, whole or in part, whatever layout wrote them.

    A file is mapped only while one of its tensors is in use, so that memory holds no more of the
    checkpoint than its user does.

    Args:
        path: Its folder.
        weights: What is read as the weight of a parameter: `raw`, or the name of an average.

    Raises:
        CheckpointError: A file is missing, has another size than the manifest says, or is damaged;
            or there is no such average.
    """

    def __init__(self, path: Path, weights: str = RAW) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._weights_kind = find_weights_kind(self.manifest, weights, path)
        # (kind, name) -> parts, by tensor-parallel rank
        self._parts: dict[tuple[str, str], dict[int, _Part]] = {}
        for name, record in self.manifest.files.items():
            self._index(name, record.num_bytes)

    def list_names(self) -> list[str]:
        """Global names of all parameters, sorted."""
        return sorted({name for kind, name in self._parts if kind == WEIGHT})

    def find_shape(self, name: str, kind: str = WEIGHT) -> tuple[int, ...]:
        """Global shape of a tensor, by the headers of its files.

        Raises:
            CheckpointError: The checkpoint does not hold it.
        """
        parts, parameter = self._find_parts(name, kind)
        shape = list(parts[0].shape)
        if parameter.split_dim is not None:
            shape[parameter.split_dim] *= len(parts)
        return tuple(shape)

    def load(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Loads a whole tensor.

        Returns:
            float32, of the parameter's global shape. It may be a view of the mapped file.

        Raises:
            CheckpointError: The checkpoint does not hold it.
        """
        return self.load_shard(name, [tuple(map(slice, self.find_shape(name, kind)))], kind)

    def load_shard(self, name: str, slices: Sequence[Slices], kind: str = WEIGHT) -> Tensor:
        """Loads slices of a tensor, concatenated along the first dimension. Nothing else is read.

        Args:
            name: Global parameter name.
            slices: Parts of the whole tensor, in order, each with a slice for every dimension.
            kind: `weight`, or a state of the optimizer or of a hook.

        Returns:
            float32, contiguous. It may be a view of the mapped file.

        Raises:
            CheckpointError: The checkpoint does not hold it, or holds a smaller one.
        """
        kind = self._weights_kind if kind == WEIGHT else kind
        parts, parameter = self._find_parts(name, kind)
        shape = self.find_shape(name, kind)
        for wanted in slices:
            if len(wanted) != len(shape) or any(
                cut.stop is not None and cut.stop > size
                for cut, size in zip(wanted, shape, strict=True)
            ):
                raise CheckpointError(
                    f"{self.path} holds {kind} of {name} in another shape, {list(shape)}, than "
                    "this model's: use the config that wrote it."
                )
        files = [self.path / part.file for part in parts]
        try:
            with ExitStack() as stack:
                handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
                views = [handle.get_slice(f"{kind}/{name}") for handle in handles]
                cuts = [_cut(views, parts[0].shape, parameter, wanted) for wanted in slices]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{kind} of {name} cannot be read any more from {self.path} ({error}): use another "
                "checkpoint."
            ) from None
        return (cuts[0] if len(cuts) == 1 else torch.cat(cuts)).contiguous()

    def check_complete(self) -> None:
        """Checks by the headers that every part of every tensor is there.

        Raises:
            CheckpointError: Something is missing, or has another shape or dtype.
        """
        for name, shape in self.manifest.parameters.items():
            self._check_known(name)
            for kind in self.manifest.list_kinds(name):
                self._check_parts(name, shape, kind)

    def _find_parts(self, name: str, kind: str) -> tuple[list[_Part], Parameter]:
        by_rank = self._parts.get((kind, name))
        if not by_rank:
            raise CheckpointError(
                f"{self.path} holds no {kind} of {name}: it belongs to another model."
            )
        parameter = find_parameter(name)
        parts = [by_rank[rank] for rank in sorted(by_rank)]
        tensor_size = self.manifest.layout.tensor_parallel_size
        if parameter.split_dim is None:
            return parts[:1], parameter
        if len(parts) != tensor_size:
            raise CheckpointError(
                f"{self.path} holds {kind} of {name} from {len(parts)} of {tensor_size} "
                f"tensor-parallel ranks, so {MANIFEST} leaves out files: use another checkpoint."
            )
        return parts, parameter

    def _check_known(self, name: str) -> None:
        try:
            find_parameter(name)
        except KeyError:
            raise CheckpointError(
                f"{self.path / MANIFEST} names the parameter {name!r}, which no model here has: "
                "use the version that wrote it."
            ) from None

    def _check_parts(self, name: str, shape: Sequence[int], kind: str) -> None:
        is_split = find_parameter(name).split_dim is not None
        num_parts = self.manifest.layout.tensor_parallel_size if is_split else 1
        parts = self._parts.get((kind, name), {})
        expected = list(find_local_shape(name, shape, num_parts))
        if len(parts) != num_parts:
            raise CheckpointError(
                f"{self.path} holds {len(parts)} of {num_parts} parts of the {kind} of {name}: "
                "the checkpoint is not whole; use another."
            )
        for part in parts.values():
            if part.shape != expected or part.dtype != "F32":
                raise CheckpointError(
                    f"{self.path / part.file} holds {kind} of {name} as {part.dtype} {part.shape} "
                    f"where {MANIFEST} says F32 {expected}: use another checkpoint."
                )

    def _index(self, name: str, size: int) -> None:
        path = self.path / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole; use another.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes where {MANIFEST} says {size}: the "
                "checkpoint is damaged; use another."
            )
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                views = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
                found = {
                    key: _Part(name, view.get_dtype(), view.get_shape())
                    for key, view in views.items()
                }
        # A folder in its place or a lack of permission counts as damage: another may be whole.
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror or error}): use another checkpoint."
            ) from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint.") from None
        if "tensor_rank" not in metadata:
            raise CheckpointError(
                f"{path} is damaged (it does not name its tensor-parallel rank): use another "
                "checkpoint."
            )
        rank = int(metadata["tensor_rank"])
        for key, part in found.items():
            kind, _, parameter = key.partition("/")
            self._parts.setdefault((kind, parameter), {})[rank] = part


def _cut(
    views: Sequence[Any], part_shape: Sequence[int], parameter: Parameter, wanted: Slices
) -> Tensor:
    """A slice of a tensor whose parts lie in several files; only what it needs is read."""
    dim, blocks = parameter.split_dim, parameter.blocks
    if dim is None or len(views) == 1:
        whole: Tensor = views[0][wanted]
        return whole
    # Every rank holds a part of each block, so each block of the whole goes through all ranks.
    size = part_shape[dim] // blocks
    start, stop, _ = wanted[dim].indices(len(views) * part_shape[dim])
    pieces = []
    for index in range(blocks):
        for rank, view in enumerate(views):
            first = (index * len(views) + rank) * size
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                local = slice(index * size + low - first, index * size + high - first)
                pieces.append(view[(*wanted[:dim], local, *wanted[dim + 1 :])])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
