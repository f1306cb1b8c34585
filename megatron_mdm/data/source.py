"""Token sources: what a run reads its tokens from. Token stores are one; others can be written.

A source of another kind is a class that derives from `TokenSource`, anywhere on PYTHONPATH. It
opens by a path and says how many tokens and documents there are and what they are.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_mdm.data.manifest import Manifest

IntArray = npt.NDArray[np.int64]

CHUNK_ITEMS = 1 << 20
# Blocks that identify a part of a view: few, because views of thousands of parts have to open fast.
PART_BLOCKS = 32
_NUM_BLOCKS = 1024
_BLOCK_TOKENS = 512


class TokenSource(ABC):
    """A stream of tokens of documents, one after the other.

    Several threads read it at once, and every process of a run opens it and finds the same.

    Attributes:
        prefix: Where it lies, as the configuration names it.
    """

    prefix: Path

    @classmethod
    @abstractmethod
    def open(cls, prefix: Path | str) -> Self:
        """Opens what lies at a path.

        Raises:
            DataError: It is missing or damaged.
        """

    @property
    @abstractmethod
    def num_documents(self) -> int:
        """The documents."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """The tokens of all documents, ends of documents included."""

    @abstractmethod
    def read(self, start: int, stop: int) -> IntArray:
        """Reads a part of the stream into a new array.

        Args:
            start: The first token, 0 or more.
            stop: The token after the last one, at most `num_tokens`.

        Returns:
            int64 [stop - start].

        Raises:
            IndexError: The part reaches outside the stream.
            DataError: The tokens are damaged, or the storage fails.
        """

    def read_stored(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Reads as `read` does, in the integer type that costs least."""
        return self.read(start, stop)

    @property
    def manifest(self) -> Manifest | None:
        """How the tokens were made; None where nothing says so, as which token ends a document."""
        return None

    @property
    def eod_token_id(self) -> int | None:
        """The token that ends every document; None where nothing vouches for one."""
        manifest = self.manifest
        return manifest.eod_token_id if manifest is not None and manifest.append_eod else None

    @property
    def parts(self) -> Sequence[TokenSource]:
        """What holds the tokens: the source itself, unless it refers to others."""
        return (self,)

    @property
    def files(self) -> list[Path]:
        """The files that the tokens lie in. What changes them changes the source."""
        return []

    def locate_extents(self) -> IntArray:
        """Finds the stretches of the stream; int64 [N, 3]: number in `parts`, first token, tokens.

        Raises:
            DataError: They are damaged.
        """
        return np.array([[0, 0, self.num_tokens]], dtype=np.int64)

    def locate_documents(self, document_N: IntArray) -> IntArray | None:
        """Finds where documents lie, so that they can be put into another order.

        Args:
            document_N: int64 [N], each in 0..num_documents-1.

        Returns:
            int64 [N, 3]: number in `parts`, first token there, tokens; together the documents hold
            each token of the stream once. None where nothing says so.

        Raises:
            DataError: What says so is damaged.
        """
        return None

    def find_documents(self, token_N: IntArray) -> IntArray:
        """Finds the documents that hold tokens.

        Args:
            token_N: int64 [N], each in 0..num_tokens-1.

        Returns:
            int64 [N], a number for each document; where documents are not known, all are one.

        Raises:
            DataError: What says so is damaged.
        """
        return np.zeros_like(token_N)

    def fingerprint(self) -> str:
        """Identifies the stream by its content, whatever holds it.

        Returns:
            What `fingerprint_stream` gives. The tokens are read the first time.
        """
        return self._content

    @cached_property
    def _content(self) -> str:
        return fingerprint_stream(self)

    def find_token_outside(self, limit: int, reserved: int | None = None) -> tuple[int, int] | None:
        """Looks through the whole stream for a token id that a vocabulary does not have.

        Args:
            limit: The smallest id that is too large; those below 0 are found as well.
            reserved: An id that text may not hold either.

        Returns:
            The position in tokens and the id of the first one, or None.
        """
        for start, stop in split_range(self.num_tokens):
            chunk = self.read_stored(start, stop)
            is_right = chunk.min() >= 0 and chunk.max() < limit
            if is_right and (reserved is None or not (chunk == reserved).any()):
                continue
            is_wrong = (chunk < 0) | (chunk >= limit)
            if reserved is not None:
                is_wrong |= chunk == reserved
            first = int(is_wrong.argmax())
            return start + first, int(chunk[first])
        return None


def split_range(count: int) -> Iterator[tuple[int, int]]:
    """Divides a range into chunks that fit memory.

    Args:
        count: The items, 0 or more.

    Yields:
        The first item of each chunk and the one after its last.
    """
    for start in range(0, count, CHUNK_ITEMS):
        yield start, min(start + CHUNK_ITEMS, count)


def check_range(source: TokenSource, start: int, stop: int) -> None:
    """Checks that a part of a stream lies inside it.

    Args:
        source: The stream.
        start: The first token.
        stop: The token after the last one.

    Raises:
        IndexError: The part reaches outside the stream.
    """
    if not 0 <= start <= stop <= source.num_tokens:
        raise IndexError(f"tokens {start} to {stop} of {source.prefix} with {source.num_tokens}")


def spread_blocks(size: int, block: int, num_blocks: int) -> list[int]:
    """Spreads blocks evenly over a stream, its start and its end among them.

    Args:
        size: The size of the stream.
        block: The size of a block, at most that of the stream.
        num_blocks: How many blocks, at least 1.

    Returns:
        Where the blocks start, rising; fewer where they would be the same.
    """
    last = size - block
    return sorted({number * last // max(num_blocks - 1, 1) for number in range(num_blocks)})


def fingerprint_stream(source: TokenSource, num_blocks: int = _NUM_BLOCKS) -> str:
    """Identifies a stream by content, whatever files hold it: cheap at any size.

    Args:
        source: The stream.
        num_blocks: At most so many blocks are read, at least 1.

    Returns:
        The SHA-256 in hexadecimal of the numbers of tokens and documents and of blocks of 512
        tokens that are spread evenly over the stream, its start and its end among them.
    """
    num_tokens = source.num_tokens
    digest = hashlib.sha256(f"{num_tokens} {source.num_documents}".encode())
    length = min(_BLOCK_TOKENS, num_tokens)
    starts = spread_blocks(num_tokens, length, num_blocks)
    # The blocks of a short stream overlap: it is read once instead of many times over.
    whole = source.read(0, num_tokens) if len(starts) * length >= num_tokens else None
    for start in starts:
        stop = start + length
        block = source.read(start, stop) if whole is None else whole[start:stop]
        digest.update(block.tobytes())
    return digest.hexdigest()
