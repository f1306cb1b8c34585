"""safetensors files written one tensor after the other: memory holds a tensor, not a file.

The format: the length of the header in 8 bytes, little-endian; the header in JSON, with dtype,
shape and offsets of each tensor, filled up with spaces to a multiple of 8 bytes; then the bytes of
the tensors without gaps. Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import FileRecord

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT_BYTES = 8
_CHUNK_BYTES = 2**20


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor.

    Attributes:
        name: Its key in the file.
        dtype: float32, bfloat16 or float16.
        shape: Its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file that is being written, in the order of its header.

    It is whole only after `finish`; `close` gives it up.

    Args:
        path: The file to make or replace.
        tensors: All that it will hold, in order.
        metadata: Text that the header holds besides, in order.
        has_digest: Make the digest that `record` tells.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, str],
        *,
        has_digest: bool = True,
    ) -> None:
        self._path = path
        self._expected = list(reversed(tensors))
        self._crc = 0
        self._digest = hashlib.sha256() if has_digest else None
        # A digest takes longer than a disk, so it is made beside the writing.
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._num_bytes = 0
        self._stream = path.open("wb")
        self._append(_format_header(tensors, metadata))

    @property
    def is_full(self) -> bool:
        """Is every tensor written?"""
        return not self._expected

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor.

        Args:
            name: Its key; it has to be the next of the header.
            tensor: Of the dtype and shape that were announced, on any device.

        Raises:
            OSError: It cannot be written.
            ValueError: It is not the tensor that is due.
        """
        due = self._expected.pop() if self._expected else None
        found = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        if found != due:
            raise ValueError(f"{self._path.name} has to go on with {due}, not with {found}.")
        # numpy knows no bfloat16; bytes are all that is needed.
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        self._append(flat.numpy().data)

    def finish(self) -> None:
        """Ends the file: its bytes are on the disk and read back as what was written.

        Raises:
            OSError: It cannot be written, or reads back as something else.
            ValueError: A tensor is missing.
        """
        if self._expected:
            raise ValueError(f"{self._path.name} lacks {self._expected[-1]}.")
        self._hasher.shutdown()
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                # Or the page cache would answer the reading back, and not the disk.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _read_back(self._path) != (self._num_bytes, self._crc):
            raise OSError(5, f"{self._path.name} reads back other bytes than were written")

    def record(self) -> FileRecord:
        """Size and digest of the finished file."""
        if self._digest is None:
            raise ValueError(f"{self._path.name} is written without a digest.")
        return FileRecord(num_bytes=self._num_bytes, sha256=self._digest.hexdigest())

    def close(self) -> None:
        """Closes the file, whole or not, without errors."""
        self._hasher.shutdown()
        # What is buffered may not fit on the disk, which is why the file was given up.
        with contextlib.suppress(OSError):
            self._stream.close()

    def _append(self, content: bytes | memoryview) -> None:
        hashing = None
        if self._digest is not None:
            hashing = self._hasher.submit(self._digest.update, content)
        # A cheap checksum, which changes with any short error of the disk.
        self._crc = zlib.crc32(content, self._crc)
        self._num_bytes += self._stream.write(content)
        if hashing is not None:
            # Until the digest has it, the caller must not reuse the memory.
            hashing.result()


def _read_back(path: Path) -> tuple[int, int]:
    """Size and checksum of what the disk holds."""
    crc, num_bytes = 0, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            num_bytes += len(chunk)
    return num_bytes, crc


def _format_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in tensors:
        fields[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
