"""Windows of `seq_length` tokens over the concatenated token streams of shard sets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_mdm.config import Config, SourceConfig, TrainSourceConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.document_order import DocumentOrder
from megatron_mdm.data.order import DocumentKey
from megatron_mdm.data.source import IntArray, TokenSource
from megatron_mdm.diffusion.samples import TextWindow


class WindowReader(Protocol):
    """Windows that can be read."""

    @property
    def num_windows(self) -> int:
        """Windows of a pass."""
        ...

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Reads a window."""
        ...


class WindowSource(ABC):
    """The windows of one set of shards.

    Attributes:
        source: The tokens that the windows are cut out of.
    """

    source: TokenSource

    @classmethod
    @abstractmethod
    def open(cls, config: Config, source: SourceConfig, tokens: TokenSource) -> Self:
        """Cuts what a run reads into windows.

        Args:
            config: The run.
            source: The shards' place in it.
            tokens: The open shards.

        Returns:
            The windows.

        Raises:
            DataError: There is not one window, or the shards are not of this kind.
        """

    @property
    @abstractmethod
    def num_windows(self) -> int:
        """Windows of a pass. Tokens that do not fill a window are left out of it."""

    @property
    @abstractmethod
    def learned_share(self) -> float:
        """Share of the tokens that are learned, in (0, 1]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies what a sample order refers to, by content; a sha256."""

    @abstractmethod
    def find_documents(self, window_N: IntArray) -> IntArray:
        """Finds which document each window is of; int64 [N], a number for each document."""

    @abstractmethod
    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Reads a window.

        Args:
            window: Index in 0..num_windows-1.
            shift: Tokens by which all windows start later, 0 or more.
            document_key: Names the order of documents that they are cut out of; None: documents
                stand as they are stored.

        Returns:
            The window.

        Raises:
            IndexError: There is no such window.
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """


class SourceWindows(WindowSource):
    """Fixed-length windows over one shard set.

    Args:
        source: An open shard set.
        seq_length: Tokens per window, S.
        vocab_size: Every token id must be below it.
        max_unique_tokens: Use only the first so many tokens; None: all.
        by_document: Number the documents of every window.
        shuffles_documents: Windows are asked for by order of documents.

    Raises:
        DataError: There is not one whole window, or nothing says where documents end or lie.
    """

    def __init__(
        self,
        source: TokenSource,
        seq_length: int,
        vocab_size: int,
        max_unique_tokens: int | None = None,
        *,
        by_document: bool = False,
        shuffles_documents: bool = False,
    ) -> None:
        self.source = source
        self._by_document = by_document
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._num_tokens = min(source.num_tokens, max_unique_tokens or source.num_tokens)
        if self._num_tokens < seq_length:
            limit = f" of which max_unique_tokens={max_unique_tokens}" if max_unique_tokens else ""
            raise DataError(
                f"{source.prefix} holds {source.num_tokens} tokens{limit}, less than one window of "
                f"data.seq_length={seq_length}: use a longer corpus or a shorter window."
            )

        if by_document and self.source.eod_token_id is None:
            raise DataError(
                f"data.attention=document needs to know where documents end, and {source.prefix} "
                "has no manifest that names an end-of-document token: make the shards with "
                "mdm prepare, or use data.attention=window."
            )
        self._documents = DocumentOrder(source, self._num_tokens) if shuffles_documents else None

    @classmethod
    def open(cls, config: Config, source: SourceConfig, tokens: TokenSource) -> SourceWindows:
        """See `WindowSource.open`."""
        is_trained = isinstance(source, TrainSourceConfig)
        limit = source.max_unique_tokens if isinstance(source, TrainSourceConfig) else None
        return cls(
            tokens,
            config.data.seq_length,
            config.model.vocab_size,
            limit,
            by_document=config.data.attention == "document",
            shuffles_documents=is_trained and config.data.order == "documents",
        )

    @property
    def num_windows(self) -> int:
        """See `WindowSource.num_windows`."""
        return int(self._num_tokens // self.seq_length)

    @property
    def learned_share(self) -> float:
        """See `WindowSource.learned_share`: all."""
        return 1.0

    def fingerprint(self) -> str:
        """See `WindowSource.fingerprint`."""
        told = f"{self.source.fingerprint()} {self.seq_length} {self._num_tokens}"
        if self._documents is not None:
            told += f" {self._documents.describe()}"
        return hashlib.sha256(told.encode()).hexdigest()

    def find_documents(self, window_N: IntArray) -> IntArray:
        """See `WindowSource.find_documents`: the one of the token in the window's middle."""
        return self.source.find_documents(window_N * self.seq_length + self.seq_length // 2)

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """See `WindowSource.read_window`: its tokens, and their documents where these are numbered.

        The last windows of a shifted pass go on at the start of the stream, so that it shows the
        same number of tokens at any shift.
        """
        blocks = self._read_blocks(window, shift, document_key)
        tokens_S = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        if not self._by_document or self.source.eod_token_id is None:
            return TextWindow(tokens_S)
        # What follows a document that nothing ends, such as one that is cut, is another one.
        begins = np.cumsum([len(block) for block in blocks[:-1]]) if document_key else ()
        return TextWindow(tokens_S, number_documents(tokens_S, self.source.eod_token_id, begins))

    def read(self, window: int, shift: int = 0) -> IntArray:
        """Reads the tokens of a window, int64 [seq_length]; else as `read_window`."""
        return self.read_window(window, shift).tokens_S

    def _read_blocks(
        self, window: int, shift: int, document_key: DocumentKey | None
    ) -> list[IntArray]:
        """Reads the stretches of the source that make up a window, in order."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} of {self.num_windows} in {self.source.prefix}")
        start = window * self.seq_length + shift
        if document_key is None:
            start %= self._num_tokens
            after_end = max(0, start + self.seq_length - self._num_tokens)
            blocks = [self._read_checked(self.source, start, start + self.seq_length - after_end)]
            if after_end:
                blocks.append(self._read_checked(self.source, 0, after_end))
            return blocks
        if self._documents is None:
            raise ValueError("the windows were opened without an order of documents")
        pieces = self._documents.locate(document_key, start, start + self.seq_length)
        parts = self.source.parts
        return [self._read_checked(parts[one.part], one.start, one.stop) for one in pieces]

    def _read_checked(self, source: TokenSource, start: int, stop: int) -> IntArray:
        tokens_N = source.read(start, stop)
        offset = find_token_beyond(tokens_N, self._vocab_size)
        if offset is not None:
            raise DataError(
                f"{source.prefix} holds the token id {tokens_N[offset]} at token {start + offset}, "
                f"beyond the model's vocabulary of {self._vocab_size}: the shards are damaged or "
                "of another tokenizer; make them anew with mdm prepare."
            )
        return tokens_N


class Windows:
    """The windows of one or more shard sets, in the order of the config, under one numbering.

    A window never crosses from one shard set into the next.

    Args:
        sources: Windows of each shard set.
    """

    def __init__(self, sources: Sequence[WindowSource]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(source.num_windows for source in sources)])

    @property
    def num_windows(self) -> int:
        """Windows in all."""
        return int(self._starts[-1])

    def fingerprint(self) -> str:
        """Identifies the data that a sample order refers to, by content.

        Returns:
            A sha256 over the fingerprints of all shard sets.
        """
        told = " ".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(told.encode()).hexdigest()

    def find_documents(self, number_N: IntArray) -> IntArray:
        """Finds which document each window is of.

        Args:
            number_N: int64 [N], each in 0..num_windows-1.

        Returns:
            int64 [N, 2]: set of shards, document there.
        """
        source_N = np.searchsorted(self._starts, number_N, side="right") - 1
        document_N = np.empty_like(number_N)
        for source in np.unique(source_N).tolist():
            mine = source_N == source
            inside = number_N[mine] - int(self._starts[source])
            document_N[mine] = self.sources[source].find_documents(inside)
        return np.stack([source_N, document_N], axis=1)

    def read_window(self, number: int) -> TextWindow:
        """Reads a window.

        Args:
            number: In 0..num_windows-1.

        Returns:
            The window.

        Raises:
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """
        if not 0 <= number < self.num_windows:
            raise IndexError(f"window {number} of {self.num_windows}")
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sources[source].read_window(number - int(self._starts[source]))


def find_token_beyond(tokens_S: IntArray, vocab_size: int) -> int | None:
    """Finds a token id outside of the vocabulary.

    Args:
        tokens_S: int64 [S].
        vocab_size: Ids are 0..vocab_size-1.

    Returns:
        The place of the first, or None.
    """
    # Compared as unsigned, a negative id is beyond the vocabulary too.
    beyond_S = tokens_S.view(np.uint64) >= vocab_size
    return int(beyond_S.argmax()) if beyond_S.any() else None


def number_documents(
    tokens_S: IntArray, eod_token_id: int, begins: ArrayLike = ()
) -> NDArray[np.int32]:
    """Numbers the documents of a window. A document ends with its end-of-document token.

    Args:
        tokens_S: int64 [S], clean tokens.
        eod_token_id: The token that ends a document, which text cannot produce.
        begins: Further places, from 1, where one is known to begin.

    Returns:
        int32 [S]: 0 for the tokens of the first document, 1 for those of the second, and so on.
    """
    numbers_S = np.zeros(len(tokens_S), dtype=np.int32)
    is_end_S = tokens_S[:-1] == eod_token_id
    is_end_S[np.asarray(begins, dtype=np.int64) - 1] = True
    np.cumsum(is_end_S, out=numbers_S[1:])
    return numbers_S
