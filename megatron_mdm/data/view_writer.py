"""Writes views: what they say of themselves, and the extents of subsets. Whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mdm.core.files import open_whole_file
from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.references import ViewRecord
from megatron_mdm.data.shards import shard_paths
from megatron_mdm.data.source import IntArray


class ExtentsWriter:
    """Writes a file of extents one chunk after the other. Make it with `write_extents`.

    Attributes:
        num_documents: The extents written so far.
        num_tokens: The tokens that they hold.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self._stream = stream
        self._digest = hashlib.sha256()
        self.write_header()

    def sha256(self) -> str:
        """Identifies the extents written so far, for `Extents.verify`.

        Returns:
            The SHA-256 in hexadecimal of all rows and the number of tokens.
        """
        digest = self._digest.copy()
        digest.update(str(self.num_tokens).encode())
        return digest.hexdigest()

    def write_header(self) -> None:
        """Writes the header with the number of rows so far, at the start of the file."""
        # NumPy pads headers, so that this one keeps its length whatever the number of rows is.
        self._stream.seek(0)
        np.lib.format.write_array_header_1_0(
            self._stream, {"descr": "<i8", "fortran_order": False, "shape": (self.num_documents, 3)}
        )

    def append(self, located_N3: IntArray) -> None:
        """Appends extents.

        Args:
            located_N3: int64 [N, 3]: part number, first token there, tokens, at least 1.
        """
        ends = located_N3[:, 2].cumsum() + self.num_tokens
        rows = np.stack([ends - located_N3[:, 2], located_N3[:, 0], located_N3[:, 1]], axis=1)
        content = rows.astype("<i8").tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self.num_documents += len(rows)
        self.num_tokens = int(ends[-1]) if len(ends) else self.num_tokens


@contextmanager
def write_extents(path: Path) -> Iterator[ExtentsWriter]:
    """Opens a file of extents that appears whole when the block ends well, or not at all.

    Args:
        path: The `.npy` file to create or replace.

    Yields:
        The writer.
    """
    with open_whole_file(path) as stream:
        writer = ExtentsWriter(stream)
        yield writer
        writer.write_header()


def write_view(prefix: Path, view: ViewRecord) -> None:
    """Writes a view, whose extents are there, in place of shards or another view.

    Args:
        prefix: The path of the view without extension.
        view: What is said of it.
    """
    for path in shard_paths(prefix):
        path.unlink(missing_ok=True)
    view.write(manifest_path(prefix))
