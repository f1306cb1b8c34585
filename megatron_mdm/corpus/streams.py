"""Byte streams out of plain and compressed files, in blocks, from any position on."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from megatron_mdm.core.errors import DataError, unreadable_error

COMPRESSIONS = (".gz", ".zst")
# Small, because zstd packs zeros 10,000 to 1 and what comes out has to fit the memory.
_ZSTD_INPUT_BYTES = 1 << 14
# The largest window that `zstd --ultra --long=31` writes.
_ZSTD_MAX_WINDOW_BYTES = 1 << 31


def is_compressed(path: Path) -> bool:
    """Tells by its extension whether a file is compressed.

    Args:
        path: The file.

    Returns:
        True for `.gz` and `.zst`.
    """
    return path.suffix.lower() in COMPRESSIONS


def read_blocks(
    path: Path, block_bytes: int, *, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Reads a file in blocks, decompressed where it is compressed.

    Args:
        path: The file; `.gz` and `.zst` may hold several members or frames.
        block_bytes: About how much to hold in memory at a time.
        start: The first byte to read, counted in the decompressed stream.
        stop: The byte to stop before; None for the end.

    Yields:
        Blocks of 1 byte or more.

    Raises:
        DataError: The file cannot be read, or is damaged or truncated.
    """
    try:
        if not is_compressed(path):
            yield from _read_plain(path, block_bytes, start, stop)
            return
        if not path.stat().st_size:
            raise EOFError("it is empty")
        read = _read_gzip if path.suffix.lower() == ".gz" else _read_zstd
        position = 0
        for block in read(path, block_bytes):
            # A compressed stream cannot be entered in the middle: what comes before is dropped.
            wanted = block[max(0, start - position) :]
            position += len(block)
            if wanted:
                yield wanted
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        kind = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        raise DataError(
            f"{path} is truncated or not {kind} ({error}): copy or compress it again."
        ) from error
    except OSError as error:
        raise unreadable_error(path, error) from error


def find_line_start(path: Path, offset: int) -> int:
    """Finds the first line of a plain file that starts at or after a position.

    Args:
        path: The file.
        offset: The position in bytes.

    Returns:
        The byte where that line starts; the file's size where there is none.

    Raises:
        DataError: The file cannot be read.
    """
    if offset <= 0:
        return 0
    position = offset - 1
    for block in read_blocks(path, 1 << 16, start=position):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return path.stat().st_size


def count_lines(path: Path, stop: int) -> int:
    """Counts the lines of a plain file that end before a position.

    Args:
        path: The file.
        stop: The position in bytes.

    Returns:
        The newlines before it.

    Raises:
        DataError: The file cannot be read.
    """
    return sum(block.count(b"\n") for block in read_blocks(path, 1 << 20, stop=stop))


def _read_plain(path: Path, block_bytes: int, start: int, stop: int | None) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        position = start
        while stop is None or position < stop:
            wanted = block_bytes if stop is None else min(block_bytes, stop - position)
            block = stream.read(wanted)
            if not block:
                return
            position += len(block)
            yield block


def _read_gzip(path: Path, block_bytes: int) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while block := stream.read(block_bytes):
            yield block


def _read_zstd(path: Path, block_bytes: int) -> Iterator[bytes]:
    # The library's own stream reader takes a truncated file for a whole one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    inside_frame = False
    parts: list[bytes] = []
    num_bytes = 0
    with path.open("rb") as stream:
        while compressed := stream.read(_ZSTD_INPUT_BYTES):
            while compressed:
                parts.append(frame.decompress(compressed))
                num_bytes += len(parts[-1])
                inside_frame = not frame.eof
                compressed = b""
                if frame.eof:
                    compressed = frame.unused_data
                    frame = decompressor.decompressobj()
                if num_bytes >= block_bytes:
                    yield b"".join(parts)
                    parts, num_bytes = [], 0
    if inside_frame:
        raise EOFError("it ends inside a frame")
    if num_bytes:
        yield b"".join(parts)
