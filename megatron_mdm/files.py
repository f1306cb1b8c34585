"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_sibling(path: Path) -> Path:
    """Names the file that is written before it is renamed to its final name.

    Args:
        path: The final name.

    Returns:
        A hidden name in the same folder, of this process only.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name whole, when the block ends well, or not at all.

    Args:
        path: The file to create or replace. Its folder has to exist.

    Yields:
        A binary stream to a temporary sibling of the file.
    """
    temporary = temporary_sibling(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is never seen half-written.

    Args:
        path: The file to create or replace. Its folder has to exist.
        text: Content, written as UTF-8.
    """
    with whole_file(path) as stream:
        stream.write(text.encode())
